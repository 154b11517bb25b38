"""How likely a text is to a model that lives inside a plan: every token through the budgeted cache."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from baklava.cache.budgeted_cache import BudgetedCache
from baklava.errors import UserError
from baklava.plan.budget_plan import BudgetPlan
from baklava.runtime.model_loader import LoadedModel
from baklava.runtime.prefill import PrefillResult, PrefillTask, prefill

STEP = 512
"""Tokens of a text per forward, so that the logits of a long one are never held at once; no token sees a difference."""


@dataclass(frozen=True)
class Loglikelihood:
    """Sum of a text's log-probabilities in nats, and whether greedy decoding would have written exactly this text."""

    log_prob: float
    is_greedy: bool


@torch.inference_mode()
def score_continuations(
    loaded: LoadedModel, plan: BudgetPlan, context: Sequence[int], texts: Sequence[Sequence[int]]
) -> list[Loglikelihood]:
    """How likely each of these texts is behind the same context, which is prefilled once, as the plan says.

    The first token of a text is predicted by the prefill, which a dense plan does with the full cache; every other one
    as if it were decoded.

    Raises:
        UserError: the plan is for another model, or the context is empty.
        RuntimeError: the cache held more than its plan, or never saw the tokens.
    """
    cache, logits = prefill(loaded, plan, torch.tensor([list(context)], device=loaded.device))
    check_consumed(cache, len(context))
    found = []
    for number, text in enumerate(texts, 1):
        own = cache if number == len(texts) or len(text) == 1 else copy.deepcopy(cache)
        first, rest = _judged(logits, text[:1]), _one_by_one(loaded, own, text)
        check_consumed(own, len(context) + len(text) - 1)
        found.append(_likelihood([first, *rest], len(text)))
    return found


@torch.inference_mode()
def score_suffix(loaded: LoadedModel, plan: BudgetPlan, ids: Sequence[int], scored: int) -> Loglikelihood:
    """How likely the last `scored` tokens of a text are when its first one is the prompt and the others are decoded.

    So the budget holds from the first token on, and all that matters of how a plan prefills is how it takes one token.
    """
    cache, logits = prefill(loaded, plan, torch.tensor([ids[:1]], device=loaded.device))
    judged = [_judged(logits, ids[1:2]), *_one_by_one(loaded, cache, ids[1:])]
    check_consumed(cache, len(ids) - 1)
    return _likelihood(judged, scored)


def check_consumed(cache: BudgetedCache, tokens: int) -> None:
    """Raise RuntimeError unless the cache has seen this many tokens and is inside its plan."""
    if cache.get_seq_length() != tokens:
        raise RuntimeError(f"the cache saw {cache.get_seq_length()} tokens of {tokens}, so the plan was not applied")
    cache.check_integrity()


def _one_by_one(loaded: LoadedModel, cache: BudgetedCache, ids: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
    """What the model makes of each token but the first, having seen those before it one by one."""
    judged = []
    with cache.teacher_forcing():
        for start in range(0, len(ids) - 1, STEP):
            targets = ids[start + 1 : start + 1 + STEP]
            fed = torch.tensor([ids[start : start + len(targets)]], device=loaded.device)
            judged.append(_judged(loaded.model(fed, past_key_values=cache).logits[0], targets))
    return judged


def _judged(logits: Tensor, targets: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Per token its log-probability, and whether it is the likeliest one."""
    log_probs, found = log_probabilities(logits, targets)
    return found, log_probs.argmax(-1) == torch.tensor(list(targets), device=logits.device)


def log_probabilities(logits: Tensor, targets: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Log-probabilities [tokens, vocabulary] in nats, and those of the targets alone, a token each."""
    log_probs = torch.log_softmax(logits.float(), -1)
    return log_probs, log_probs.gather(-1, torch.tensor(list(targets), device=logits.device)[:, None])[:, 0]


def _likelihood(judged: Sequence[tuple[Tensor, Tensor]], scored: int) -> Loglikelihood:
    log_probs, likeliest = (torch.cat(parts)[-scored:] for parts in zip(*judged, strict=True))
    return Loglikelihood(float(log_probs.double().sum()), bool(likeliest.all()))


@dataclass(frozen=True)
class TokenLogprob:
    """A token's log-probability in nats, and the likeliest tokens in its place with theirs, the likeliest first."""

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class PromptLogprobsTask(PrefillTask):
    """The first token is the prompt; each other sees what it would see when decoded, as in `likelihood.ending`.

    `judged` has the tokens behind the first, as far as they are known, each with `top` alternatives.
    """

    def __init__(
        self, loaded: LoadedModel, plan: BudgetPlan, ids: Sequence[int], max_tokens: int | None = None, top: int = 0
    ) -> None:
        plan.check_fits(loaded.identity, loaded.geometry)
        if not ids:
            raise UserError("a text of 0 tokens has no likelihood; give at least one token")
        self._loaded, self._ids, self._top = loaded, tuple(ids), top
        self._cache, self._logits = prefill(
            loaded, plan, torch.tensor([list(ids[:1])], device=loaded.device), max_tokens=max_tokens
        )
        self._fed = 1
        self.token_logprobs: list[TokenLogprob] = []
        self._judge(self._logits)

    @override
    @torch.inference_mode()
    def step(self, tokens: int) -> PrefillResult | None:
        if part := self._ids[self._fed : self._fed + max(1, tokens)]:
            fed = torch.tensor([part], device=self._loaded.device)
            with self._cache.teacher_forcing():
                logits = self._loaded.model(fed, past_key_values=self._cache, use_cache=True).logits[0]
            self._fed += len(part)
            self._judge(logits)
            self._logits = logits[-1:].clone()
        return (self._cache, self._logits) if self._fed == len(self._ids) else None

    @override
    @property
    def num_processed(self) -> int:
        return self._fed

    @override
    @property
    def nbytes(self) -> int:
        return self._cache.nbytes

    def _judge(self, logits: Tensor) -> None:
        start = len(self.token_logprobs) + 1
        self.token_logprobs += token_logprobs(logits, self._ids[start : start + len(logits)], self._top)


@torch.inference_mode()
def token_logprobs(logits: Tensor, ids: Sequence[int], top: int = 0) -> list[TokenLogprob]:
    """What the model, by its logits [tokens, vocabulary], made of these tokens."""
    if not ids:
        return []
    log_probs, found = log_probabilities(logits[: len(ids)], ids)
    best = log_probs.topk(min(top, log_probs.shape[-1]))
    pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    alternatives = [tuple(zip(*pair, strict=True)) for pair in pairs]
    return [TokenLogprob(*each) for each in zip(ids, found.tolist(), alternatives, strict=True)]
