"""Evaluation: what plans cost in quality and hold in bytes, side by side on the same windows."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from baklava import allocation, eviction
from baklava.bootstrap import Interval, interval
from baklava.errors import UserError
from baklava.eviction import eviction_of
from baklava.model import LoadedModel
from baklava.plan import BudgetPlan, full_plan
from baklava.profile import Profile, flat_profile
from baklava.progress import bar
from baklava.scoring import Score, prefill, score
from baklava.windows import Window

SHORT_CONTEXT = 512
"""Context that a corpus's gain compares with."""


@dataclass(frozen=True)
class NamedPlan:
    """A plan under the name that the user gave it by."""

    name: str
    plan: BudgetPlan


@dataclass(frozen=True)
class Evaluation:
    """One plan's scores, window by window. `gain` is what context is worth on each window, in nats per token."""

    named: NamedPlan
    scores: tuple[Score, ...]
    gain: tuple[float, ...]

    def mean(self, metric: str) -> Interval:
        """Mean of `dnll` or `kl` over the windows, with its interval over documents."""
        values = self.gain if metric == "gain" else [getattr(score, metric) for score in self.scores]
        return interval(values, [score.document for score in self.scores])

    @property
    def allocated_bytes(self) -> int:
        """Most bytes that the cache was measured to hold on any window."""
        return max(score.allocated_bytes for score in self.scores)

    def as_json(self) -> dict[str, Any]:
        """What other people's scripts read."""
        plan = self.named.plan
        return {
            "name": self.named.name,
            "plan": {
                "bytes_per_sequence": plan.bytes_per_sequence,
                "full_bytes_per_sequence": plan.full_bytes_per_sequence,
                "ratio": plan.ratio,
                "digest": plan.digest,
            },
            "allocated_bytes": self.allocated_bytes,
            "windows": [
                {"name": s.window, "nll_full": s.nll_full, "nll": s.nll, "dnll": s.dnll, "kl": s.kl, "gain": gain}
                for s, gain in zip(self.scores, self.gain, strict=True)
            ],
            "mean": {metric: self.mean(metric).mean for metric in ("dnll", "kl", "gain")},
            "interval": {metric: _strict(asdict(self.mean(metric))) for metric in ("dnll", "kl", "gain")},
        }


def _strict(values: dict[str, Any]) -> dict[str, Any]:
    """JSON has no NaN: a bound that one document cannot give is null."""
    return {name: None if value != value else value for name, value in values.items()}


def named_plan(spec: str, loaded: LoadedModel, context_length: int, profile: Callable[[], Profile]) -> NamedPlan:
    """The plan that a user names: a file, `full`, or METHOD[+EVICTION]:BUDGET such as baklava+heavy_hitter:0.3.

    Without an eviction method it is sinks + recent, as in the literature. `profile` is called only where needed.

    Raises:
        UserError: none of these, an unknown method, a bad budget, or a plan for another model.
    """
    if spec == "full":
        return NamedPlan(spec, full_plan(loaded.identity, loaded.geometry, context_length))
    if ":" in spec and not Path(spec).exists():
        return NamedPlan(spec, _allocated(spec, loaded, context_length, profile))
    if spec.partition("+")[0] in allocation.METHODS:
        raise UserError(f"plan {spec!r} names a method without a budget; write {spec}:0.3")
    plan = BudgetPlan.read(spec)
    plan.check_fits(loaded.identity, loaded.geometry)
    return NamedPlan(spec, plan)


def _allocated(spec: str, loaded: LoadedModel, context_length: int, profile: Callable[[], Profile]) -> BudgetPlan:
    method, _, budget = spec.partition(":")
    spreading, _, keeping = method.partition("+")
    spread = allocation.method_of(spreading)()
    keep = eviction.method_of(keeping or eviction.Streaming.name)()
    try:
        share = float(budget)
    except ValueError:
        raise UserError(f"budget {budget!r} is not a number; write {method}:0.3 for 30 % of the bytes") from None
    measured = profile() if spread.profiled else flat_profile(loaded.identity, loaded.geometry)
    return allocation.allocate(measured, budget=share, context_length=context_length, method=spread, eviction=keep)


def evaluate(loaded: LoadedModel, plans: Sequence[NamedPlan], windows: Sequence[Window]) -> list[Evaluation]:
    """Score every plan on every window; each window is prefilled once."""
    evictions = [eviction_of(named.plan.eviction) for named in plans]
    rows: list[list[Score]] = [[] for _ in plans]
    gains: list[float] = []
    with bar(len(windows) * (len(plans) + 1), "evaluating", "score") as progress:
        for window in windows:
            prefilled = prefill(loaded, window, evictions)
            progress.update(1)
            for row, named in zip(rows, plans, strict=True):
                row.append(score(loaded, prefilled, named.plan))
                progress.update(1)
            gains.append(_short_nll(loaded, window) - rows[0][-1].nll_full)
    return [Evaluation(named, tuple(row), tuple(gains)) for named, row in zip(plans, rows, strict=True)]


@torch.inference_mode()
def _short_nll(loaded: LoadedModel, window: Window) -> float:
    """NLL of the continuation with only the last tokens of its context."""
    start = max(0, window.context - SHORT_CONTEXT)
    ids = torch.tensor([window.ids[start:]], device=loaded.device)
    logits = loaded.model(ids, use_cache=False, logits_to_keep=window.continuation + 1).logits[0, :-1]
    targets = ids[0, -window.continuation :]
    return float(torch.nn.functional.cross_entropy(logits.float(), targets))
