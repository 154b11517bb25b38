"""Log-probabilities of a text under a plan: every token attends through the budgeted cache, as if it were decoded."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import Cache
from typing_extensions import override

from baklava.cache.budgeted_cache import BudgetedCache
from baklava.errors import UserError
from baklava.plan.budget_plan import BudgetPlan
from baklava.runtime.model_loader import LoadedModel
from baklava.runtime.prefill import PrefillResult, PrefillTask, prefill

LOGITS_CHUNK_TOKENS = 512
"""Tokens of a text per forward, which limits the logits that are allocated at once. No result depends on it."""

TokenLogits = Float[Tensor, "tokens vocabulary"]


@torch.inference_mode()
def forced_logits(loaded: LoadedModel, cache: Cache, ids: Sequence[int] | Int[Tensor, " tokens"]) -> TokenLogits:
    """Feed tokens to a cache by teacher forcing, and return the logits after each of them.

    All tokens are processed in one forward, but in a `BudgetedCache` each attends to exactly the entries that would be
    cached if they were decoded one by one.

    Args:
        loaded: The model.
        cache: The cache to continue, which changes; budgeted, or any of transformers.
        ids: At least one token.
    """
    with cache.teacher_forcing() if isinstance(cache, BudgetedCache) else nullcontext():
        logits: TokenLogits = loaded.model(loaded.as_batch(ids), past_key_values=cache, use_cache=True).logits[0]
    return logits


@dataclass(frozen=True)
class Loglikelihood:
    """Sum of a text's log-probabilities in nats, and whether greedy decoding would have written exactly this text."""

    log_prob: float
    is_greedy: bool


@torch.inference_mode()
def score_continuations(
    loaded: LoadedModel, plan: BudgetPlan, context: Sequence[int], continuations: Sequence[Sequence[int]]
) -> list[Loglikelihood]:
    """Return the loglikelihood of each continuation of one context, which is prefilled once, as the plan says.

    The first token of a continuation is predicted by the prefill, which a dense plan does with the full cache. The
    other tokens are teacher-forced.

    Raises:
        UserError: the plan is for another model, or the context is empty.
        RuntimeError: the cache exceeded its plan, or did not see the tokens.
    """
    cache, logits = prefill(loaded, plan, loaded.as_batch(context))
    cache.check_integrity(len(context))
    results = []
    for number, ids in enumerate(continuations, 1):
        own = cache if number == len(continuations) or len(ids) == 1 else cache.copy(cache.max_tokens)
        results.append(_loglikelihood(loaded, own, logits, ids, len(ids)))
        own.check_integrity(len(context) + len(ids) - 1)
    return results


@torch.inference_mode()
def score_suffix(loaded: LoadedModel, plan: BudgetPlan, ids: Sequence[int], num_scored: int) -> Loglikelihood:
    """Return the loglikelihood of the last `num_scored` tokens of a text, whose first token alone is prefilled.

    So the budget applies from the first token on, and how the plan prefills does not matter.
    """
    cache, logits = prefill(loaded, plan, loaded.as_batch(ids[:1]))
    result = _loglikelihood(loaded, cache, logits, ids[1:], num_scored)
    cache.check_integrity(len(ids) - 1)
    return result


def _loglikelihood(
    loaded: LoadedModel, cache: BudgetedCache, logits: TokenLogits, ids: Sequence[int], num_scored: int
) -> Loglikelihood:
    """Score the last `num_scored` of these tokens, of which the first has these logits; the last one is not fed."""
    scores = [_score_tokens(logits, ids[:1])]
    # Entered once per text, since it dequantizes the cache
    with cache.teacher_forcing() if len(ids) > 1 else nullcontext():
        for start in range(0, len(ids) - 1, LOGITS_CHUNK_TOKENS):
            targets = ids[start + 1 : start + 1 + LOGITS_CHUNK_TOKENS]
            fed = loaded.as_batch(ids[start : start + len(targets)])
            output = loaded.model(fed, past_key_values=cache, use_cache=True)
            scores.append(_score_tokens(output.logits[0], targets))
    log_probs, is_likeliest = (torch.cat(parts)[-num_scored:] for parts in zip(*scores, strict=True))
    return Loglikelihood(float(log_probs.double().sum()), bool(is_likeliest.all()))


def _score_tokens(logits: TokenLogits, ids: Sequence[int]) -> tuple[Float[Tensor, " scored"], Bool[Tensor, " scored"]]:
    """Return the log-probability of each token in nats, and whether it is the likeliest one."""
    targets = torch.tensor(list(ids), dtype=torch.long, device=logits.device)
    log_probs = torch.log_softmax(logits[: len(ids)].float(), -1)
    return log_probs.gather(-1, targets[:, None])[:, 0], log_probs.argmax(-1) == targets


@dataclass(frozen=True)
class TokenLogprob:
    """A token's log-probability in nats, and the likeliest tokens in its place with theirs, the likeliest first."""

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@torch.inference_mode()
def token_logprobs(logits: TokenLogits, ids: Sequence[int], top: int = 0) -> list[TokenLogprob]:
    """Return the log-probability of each token and the `top` likeliest alternatives, given the logits before it."""
    if not ids:
        return []
    log_probs = torch.log_softmax(logits[: len(ids)].float(), -1)
    own = log_probs.gather(-1, torch.tensor(list(ids), device=logits.device)[:, None])[:, 0]
    best = log_probs.topk(min(top, log_probs.shape[-1]))
    rows = zip(ids, own.tolist(), best.indices.tolist(), best.values.tolist(), strict=True)
    return [TokenLogprob(id, logprob, tuple(zip(*alternatives, strict=True))) for id, logprob, *alternatives in rows]


def prompt_logprobs_workspace_bytes(plan: BudgetPlan, max_tokens: int | None, itemsize: int) -> int:
    """Return the bytes that `PromptLogprobsTask` allocates in addition to its cache: the dequantized entries.

    Args:
        plan: The plan of the cache.
        max_tokens: As in `prefill`.
        itemsize: Bytes of one number of the model's dtype.
    """
    slots = 0
    for layer in filter(None, plan.layers):
        for tokens, *bits in zip(layer.tokens, layer.key_bits, layer.value_bits, strict=True):
            num_converted = sum(number != 8 * itemsize for number in bits)  # of keys and values
            slots += num_converted * (tokens if max_tokens is None else min(tokens, max_tokens))
    return slots * plan.geometry.head_dim * itemsize


class PromptLogprobsTask(PrefillTask):
    """A prompt whose tokens are scored: the first is prefilled, the others are teacher-forced, as in `score_suffix`.

    `token_logprobs` has those of the tokens processed so far, from the second one on.

    Args:
        loaded: The model.
        plan: The plan of the cache.
        ids: The prompt.
        max_tokens: As in `prefill`.
        top: Alternatives per token.

    Raises:
        UserError: the plan is for another model, or the prompt is empty.
    """

    def __init__(
        self, loaded: LoadedModel, plan: BudgetPlan, ids: Sequence[int], max_tokens: int | None = None, top: int = 0
    ) -> None:
        if not ids:
            raise UserError("a text of 0 tokens has no likelihood; give at least one token")
        self._loaded, self._ids, self._top = loaded, tuple(ids), top
        self._cache, self._logits = prefill(loaded, plan, loaded.as_batch(ids[:1]), max_tokens=max_tokens)
        self._num_processed = 1
        self.token_logprobs = token_logprobs(self._logits, self._ids[1:2], top)

    @override
    @torch.inference_mode()
    def step(self, tokens: int) -> PrefillResult | None:
        start = self._num_processed
        if part := self._ids[start : start + max(1, tokens)]:
            logits = forced_logits(self._loaded, self._cache, part)
            self._num_processed += len(part)
            self.token_logprobs += token_logprobs(logits, self._ids[start + 1 : start + 1 + len(part)], self._top)
            self._logits = logits[-1:].clone()
        return (self._cache, self._logits) if self._num_processed == len(self._ids) else None
