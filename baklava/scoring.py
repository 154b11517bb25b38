"""Scoring: prefill once, then try many plans on a copy of the prompt's cache."""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from baklava.cache import BudgetedCache
from baklava.errors import UserError
from baklava.eviction import Eviction
from baklava.model import LoadedModel
from baklava.plan import BudgetPlan
from baklava.recording import Recording, RecordingCache
from baklava.windows import Window


@dataclass(frozen=True)
class Prefilled:
    """A window whose context has been prefilled: what every plan shares.

    `log_probs[i]` is the full cache's distribution over continuation token i, in float16.
    """

    window: Window
    recording: Recording
    log_probs: Float[Tensor, "continuation vocabulary"]

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        tensors = (*self.recording.keys, *self.recording.values, self.log_probs)
        return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


@dataclass(frozen=True)
class Score:
    """What a plan costs on one window. NLLs are in nats per continuation token; dnll and kl are lower for better."""

    window: str
    document: str
    nll_full: float
    nll: float
    kl: float
    allocated_bytes: int
    seconds: float

    @property
    def dnll(self) -> float:
        """NLL above the full cache's."""
        return self.nll - self.nll_full


@torch.inference_mode()
def prefill(loaded: LoadedModel, window: Window, evictions: Sequence[Eviction]) -> Prefilled:
    """Prefill a window's context with the full cache, scoring it for these eviction methods, and run the continuation.

    Raises:
        UserError: the model has sliding layers, or the window is longer than the model's positions.
    """
    if len(loaded.geometry.budgetable) != loaded.geometry.layers:
        raise UserError(
            f"{loaded.identity.id} has sliding layers, which scoring does not support; choose another model"
        )
    if len(window.ids) > loaded.max_length:
        raise UserError(
            f"window {window.name} has {len(window.ids)} tokens, but {loaded.identity.id} takes {loaded.max_length}; "
            "lower --context or --continuation"
        )
    ids = torch.tensor([window.ids], device=loaded.device)
    cache = RecordingCache(loaded.geometry.layers, evictions)
    first = loaded.model(ids[:, : window.context], past_key_values=cache, logits_to_keep=1).logits
    rest = loaded.model(ids[:, window.context : -1], past_key_values=cache).logits if window.continuation > 1 else first
    logits = torch.cat([first, rest], 1)[0] if window.continuation > 1 else first[0]
    log_probs = torch.log_softmax(logits.float(), -1).half()
    return Prefilled(window, cache.recording(window.context), log_probs)


@torch.inference_mode()
def score(loaded: LoadedModel, prefilled: Prefilled, plan: BudgetPlan) -> Score:
    """Score a plan on a prefilled window, exactly as a server that decodes token by token would meet the text.

    Raises:
        UserError: the plan is for another model, or its eviction method was not observed in the prefill.
    """
    plan.check_fits(loaded.identity, loaded.geometry)
    started = time.perf_counter()
    cache = BudgetedCache.cut(plan, prefilled.recording)
    held, nll, kl = cache.nbytes, 0.0, 0.0
    full, targets = prefilled.log_probs, torch.tensor(prefilled.window.ids[prefilled.window.context :])
    nll_full = _nll(_renormalised(full), targets)
    for logits, at in _continuation(loaded, prefilled, cache):
        reference = _renormalised(full[at])
        log_probs = reference if logits is None else torch.log_softmax(logits.float(), -1)
        nll += _nll(log_probs, targets[at])
        kl += float((reference.exp() * (reference - log_probs)).sum())
        held = max(held, cache.nbytes)
    cache.check_integrity()
    count = len(targets)
    return Score(
        window=prefilled.window.name,
        document=prefilled.window.document,
        nll_full=nll_full / count,
        nll=nll / count,
        kl=kl / count,
        allocated_bytes=held,
        seconds=time.perf_counter() - started,
    )


def _continuation(
    loaded: LoadedModel, prefilled: Prefilled, cache: BudgetedCache
) -> Iterator[tuple[Tensor | None, slice]]:
    """Logits of the continuation tokens, forward by forward; None for the first, which no plan changes."""
    yield None, slice(0, 1)
    ids = torch.tensor([prefilled.window.ids[prefilled.window.context : -1]], device=loaded.device)
    with cache.teacher_forcing() as at_most:
        step = at_most or max(1, ids.shape[1])
        for start in range(0, ids.shape[1], step):
            chunk = ids[:, start : start + step]
            logits = loaded.model(chunk, past_key_values=cache).logits[0]
            yield logits, slice(start + 1, start + 1 + chunk.shape[1])


def _renormalised(log_probs: Tensor) -> Tensor:
    """Back to float32; without the sum to one, the rounding of float16 would show up in a small KL."""
    return torch.log_softmax(log_probs.float(), -1)


def _nll(log_probs: Tensor, targets: Tensor) -> float:
    return float(-log_probs.gather(-1, targets.to(log_probs.device)[:, None]).sum())


def perplexity(nll: float) -> float:
    """Perplexity of a mean NLL in nats."""
    return math.exp(nll)
