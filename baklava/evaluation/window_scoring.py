"""Scoring: prefill once, then try many plans on a copy of the prompt's cache."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import torch
from jaxtyping import Float, Int
from torch import Tensor

from baklava.data.windows import Window
from baklava.eviction import Eviction
from baklava.plan.budget_plan import BudgetPlan
from baklava.runtime.model_loader import LoadedModel
from baklava.runtime.prefill import PrefilledPrompt, compress, prefill_and_record


@dataclass(frozen=True)
class Prefilled:
    """A window whose context has been prefilled: what every plan shares.

    `log_probs[i]` is the full cache's distribution over continuation token i, in float16 for the KL; `nll[i]` its NLL
    of that token in nats, before that rounding.
    """

    window: Window
    recorded: PrefilledPrompt
    log_probs: Float[Tensor, "continuation vocabulary"]
    nll: Float[Tensor, " continuation"]


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
    loaded.check_length(len(window.ids))
    ids = torch.tensor([window.ids], device=loaded.device)
    recorded = prefill_and_record(loaded, ids[:, : window.context_length], evictions)
    logits = recorded.logits
    if window.continuation_length > 1:
        rest = loaded.model(
            ids[:, window.context_length : -1], past_key_values=recorded.recording.to_dynamic_cache()
        ).logits
        logits = torch.cat([logits, rest[0]])
    log_probs = torch.log_softmax(logits.float(), -1)
    nll = -log_probs.gather(-1, ids[0, window.context_length :, None])[:, 0]
    return Prefilled(window, recorded, log_probs.half(), nll)


@torch.inference_mode()
def score(loaded: LoadedModel, prefilled: Prefilled, plan: BudgetPlan) -> Score:
    """Score a plan on a prefilled window, exactly as a server that decodes token by token would meet the text.

    Raises:
        UserError: the plan is for another model, or its eviction method was not observed in the prefill.
    """
    started = time.perf_counter()
    cache, logits = compress(loaded, prefilled.recorded, plan)
    nll, kl = _first(logits, prefilled)
    targets, held = _targets(prefilled), cache.nbytes
    if len(targets) > 1:
        # Layer by layer the whole continuation in one forward: the weights are read once, not once per token.
        with cache.teacher_forcing():
            logits = loaded.model(targets[None, :-1], past_key_values=cache).logits[0]
        losses = _losses(logits, targets[1:], prefilled.log_probs[1:])
        nll, kl, held = nll + losses[0], kl + losses[1], max(held, cache.nbytes)
    cache.check_integrity()
    count = len(targets)
    return Score(
        window=prefilled.window.name,
        document=prefilled.window.document,
        nll_full=float(prefilled.nll.mean()),
        nll=nll / count,
        kl=kl / count,
        allocated_bytes=held,
        seconds=time.perf_counter() - started,
    )


@torch.inference_mode()
def decode_seconds(loaded: LoadedModel, prefilled: Prefilled, plan: BudgetPlan, steps: int = 8) -> float:
    """Median seconds of one decoding step inside a plan, behind the window's context; a step before warms up."""
    cache, _ = compress(loaded, prefilled.recorded, plan)
    taken = []
    for token in _targets(prefilled)[: steps + 1]:
        started = time.perf_counter()
        logits = loaded.model(token[None, None], past_key_values=cache).logits
        float(logits[0, -1, 0])  # a GPU answers only when it is done
        taken.append(time.perf_counter() - started)
    return median(taken[1:] or taken)


def _first(logits: Tensor, prefilled: Prefilled) -> tuple[float, float]:
    """NLL and KL of the first token, which differs from the full cache's only where a plan prefills in chunks."""
    if logits is prefilled.recorded.logits:
        return float(prefilled.nll[0]), 0.0
    return _losses(logits, _targets(prefilled)[:1], prefilled.log_probs[:1])


def _losses(logits: Tensor, targets: Tensor, full: Tensor) -> tuple[float, float]:
    """Sums over tokens of the NLL and of the KL to the full cache's log-probabilities."""
    log_probs, reference = torch.log_softmax(logits.float(), -1), _renormalised(full)
    nll = -log_probs.gather(-1, targets[:, None]).sum()
    return float(nll), float((reference.exp() * (reference - log_probs)).sum())


def _targets(prefilled: Prefilled) -> Int[Tensor, " continuation"]:
    """Token ids of the continuation."""
    return torch.tensor(prefilled.window.ids[prefilled.window.context_length :], device=prefilled.nll.device)


def _renormalised(log_probs: Tensor) -> Tensor:
    """Back to float32; without the sum to one, the rounding of float16 would show up in a small KL."""
    return torch.log_softmax(log_probs.float(), -1)
