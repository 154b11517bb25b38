"""Score plans on a window: prefill once, then try every plan on a copy of the recorded prompt."""

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
from baklava.runtime.logprobs import forced_logits
from baklava.runtime.model_loader import LoadedModel
from baklava.runtime.prefill import PrefilledPrompt, compress, prefill_and_record


@dataclass(frozen=True)
class PrefilledWindow:
    """A window whose context has been prefilled, which all plans share.

    Attributes:
        window: the window.
        prompt: its context as the full cache attended to it.
        full_log_probs: the full cache's distribution over each token of the continuation, in float16, for the KL.
        full_nll: the full cache's NLL of each of these tokens in nats, from float32.
    """

    window: Window
    prompt: PrefilledPrompt
    full_log_probs: Float[Tensor, "continuation vocabulary"]
    full_nll: Float[Tensor, " continuation"]


@dataclass(frozen=True)
class WindowScore:
    """What a plan costs on one window, in nats per token of the continuation; lower is better.

    `kl` is the divergence of the plan's predictions from the full cache's, `allocated_bytes` the peak of the cache.
    """

    window: str
    document: str
    nll_full: float
    nll: float
    kl: float
    allocated_bytes: int
    seconds: float

    @property
    def dnll(self) -> float:
        """The NLL minus the full cache's."""
        return self.nll - self.nll_full


@torch.inference_mode()
def prefill_window(loaded: LoadedModel, window: Window, evictions: Sequence[Eviction]) -> PrefilledWindow:
    """Prefill a window with the full cache, and score its context for these eviction methods.

    Raises:
        UserError: the window is longer than the model's positions.
    """
    loaded.check_length(len(window.ids))
    ids = loaded.as_batch(window.ids)
    prompt = prefill_and_record(loaded, ids[:, : window.context_length], evictions)
    logits = prompt.logits
    if window.continuation_length > 1:
        full_cache = prompt.recording.to_dynamic_cache()
        logits = torch.cat([logits, forced_logits(loaded, full_cache, ids[0, window.context_length : -1])])
    log_probs = torch.log_softmax(logits.float(), -1)
    nll = -log_probs.gather(-1, ids[0, window.context_length :, None])[:, 0]
    return PrefilledWindow(window, prompt, log_probs.half(), nll)


@torch.inference_mode()
def score_plan(loaded: LoadedModel, prefilled: PrefilledWindow, plan: BudgetPlan) -> WindowScore:
    """Score a plan on a prefilled window, exactly as if the continuation were decoded token by token.

    Raises:
        UserError: the plan is for another model, or its eviction method was not observed in the prefill.
    """
    started = time.perf_counter()
    cache, logits = compress(loaded, prefilled.prompt, plan)
    targets = _continuation(prefilled)
    if logits is prefilled.prompt.logits:
        nll, kl = float(prefilled.full_nll[0]), 0.0
    else:  # a plan with chunked prefill predicts the first token from a compressed cache
        nll, kl = _sum_losses(logits, targets[:1], prefilled.full_log_probs[:1])
    peak_bytes = cache.nbytes
    if len(targets) > 1:
        # One forward for the whole continuation reads the weights once instead of once per token.
        logits = forced_logits(loaded, cache, targets[:-1])
        rest_nll, rest_kl = _sum_losses(logits, targets[1:], prefilled.full_log_probs[1:])
        nll, kl = nll + rest_nll, kl + rest_kl
        peak_bytes = max(peak_bytes, cache.nbytes)
    cache.check_integrity(len(prefilled.window.ids) - 1)
    return WindowScore(
        window=prefilled.window.name,
        document=prefilled.window.document,
        nll_full=float(prefilled.full_nll.mean()),
        nll=nll / len(targets),
        kl=kl / len(targets),
        allocated_bytes=peak_bytes,
        seconds=time.perf_counter() - started,
    )


@torch.inference_mode()
def median_decode_seconds(loaded: LoadedModel, prefilled: PrefilledWindow, plan: BudgetPlan, steps: int = 8) -> float:
    """Return the median time of a decode step under a plan after the window's context; one more step warms up."""
    cache, _ = compress(loaded, prefilled.prompt, plan)
    seconds = []
    for token in _continuation(prefilled)[: steps + 1]:
        started = time.perf_counter()
        logits = loaded.model(token[None, None], past_key_values=cache).logits
        float(logits[0, -1, 0])  # waits for a GPU to finish
        seconds.append(time.perf_counter() - started)
    return median(seconds[1:] or seconds)


def _sum_losses(logits: Tensor, targets: Tensor, full_log_probs: Tensor) -> tuple[float, float]:
    """Return the NLL and the KL from the full cache's log-probabilities, both summed over tokens."""
    log_probs = torch.log_softmax(logits.float(), -1)
    # Normalised again in float32, because the rounding of float16 would show up in a small KL.
    reference = torch.log_softmax(full_log_probs.float(), -1)
    nll = -log_probs.gather(-1, targets[:, None]).sum()
    return float(nll), float((reference.exp() * (reference - log_probs)).sum())


def _continuation(prefilled: PrefilledWindow) -> Int[Tensor, " continuation"]:
    return torch.tensor(prefilled.window.ids[prefilled.window.context_length :], device=prefilled.full_nll.device)
