"""How likely a text is to a model that lives inside a plan: every token through the budgeted cache."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from baklava.cache import BudgetedCache
from baklava.model import LoadedModel
from baklava.plan import BudgetPlan
from baklava.prefilling import prefill

STEP = 512
"""Tokens of a text per forward, so that the logits of a long one are never held at once; no token sees a difference."""


@dataclass(frozen=True)
class Likelihood:
    """Sum of a text's log-probabilities in nats, and whether greedy decoding would have written exactly this text."""

    log_prob: float
    greedy: bool


@torch.inference_mode()
def continuations(
    loaded: LoadedModel, plan: BudgetPlan, context: Sequence[int], texts: Sequence[Sequence[int]]
) -> list[Likelihood]:
    """How likely each of these texts is behind the same context, which is prefilled once, as the plan says.

    The first token of a text is predicted by the prefill, which a dense plan does with the full cache; every other one
    as if it were decoded.

    Raises:
        UserError: the plan is for another model, or the context is empty.
        RuntimeError: the cache held more than its plan, or never saw the tokens.
    """
    cache, logits = prefill(loaded, plan, torch.tensor([list(context)], device=loaded.device))
    check_fed(cache, len(context))
    found = []
    for number, text in enumerate(texts, 1):
        own = cache if number == len(texts) or len(text) == 1 else copy.deepcopy(cache)
        first, rest = _judged(logits, text[:1]), _one_by_one(loaded, own, text)
        check_fed(own, len(context) + len(text) - 1)
        found.append(_likelihood([first, *rest], len(text)))
    return found


@torch.inference_mode()
def ending(loaded: LoadedModel, plan: BudgetPlan, ids: Sequence[int], scored: int) -> Likelihood:
    """How likely the last `scored` tokens of a text are when its first one is the prompt and the others are decoded.

    So the budget holds from the first token on, and all that matters of how a plan prefills is how it takes one token.
    """
    cache, logits = prefill(loaded, plan, torch.tensor([ids[:1]], device=loaded.device))
    judged = [_judged(logits, ids[1:2]), *_one_by_one(loaded, cache, ids[1:])]
    check_fed(cache, len(ids) - 1)
    return _likelihood(judged, scored)


def check_fed(cache: BudgetedCache, tokens: int) -> None:
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


def _likelihood(judged: Sequence[tuple[Tensor, Tensor]], scored: int) -> Likelihood:
    log_probs, likeliest = (torch.cat(parts)[-scored:] for parts in zip(*judged, strict=True))
    return Likelihood(float(log_probs.double().sum()), bool(likeliest.all()))
