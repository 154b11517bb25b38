"""A text that enters a budgeted cache as if it were decoded, with how likely the model found each of its tokens."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from baklava.entering import Entered, Entering
from baklava.errors import UserError
from baklava.likelihood import log_probabilities
from baklava.model import LoadedModel
from baklava.plan import BudgetPlan
from baklava.prefilling import prefill


@dataclass(frozen=True)
class Judged:
    """A token's log-probability in nats, and the likeliest tokens in its place with theirs, the likeliest first."""

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class Spelling(Entering):
    """The first token is the prompt; each other sees what it would see when decoded, as in `likelihood.ending`.

    `judged` has the tokens behind the first, as far as they are known, each with `top` alternatives.
    """

    def __init__(
        self, loaded: LoadedModel, plan: BudgetPlan, ids: Sequence[int], room: int | None = None, top: int = 0
    ) -> None:
        plan.check_fits(loaded.identity, loaded.geometry)
        if not ids:
            raise UserError("a text of 0 tokens has no likelihood; give at least one token")
        self._loaded, self._ids, self._top = loaded, tuple(ids), top
        self._cache, self._logits = prefill(
            loaded, plan, torch.tensor([list(ids[:1])], device=loaded.device), room=room
        )
        self._fed = 1
        self.judged: list[Judged] = []
        self._judge(self._logits)

    @override
    @torch.inference_mode()
    def step(self, tokens: int) -> Entered | None:
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
    def taken(self) -> int:
        return self._fed

    @override
    @property
    def nbytes(self) -> int:
        return self._cache.nbytes

    def _judge(self, logits: Tensor) -> None:
        start = len(self.judged) + 1
        self.judged += judged(logits, self._ids[start : start + len(logits)], self._top)


@torch.inference_mode()
def judged(logits: Tensor, ids: Sequence[int], top: int = 0) -> list[Judged]:
    """What the model, by its logits [tokens, vocabulary], made of these tokens."""
    if not ids:
        return []
    log_probs, found = log_probabilities(logits[: len(ids)], ids)
    best = log_probs.topk(min(top, log_probs.shape[-1]))
    pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    alternatives = [tuple(zip(*pair, strict=True)) for pair in pairs]
    return [Judged(*each) for each in zip(ids, found.tolist(), alternatives, strict=True)]
