"""One sequence at a time through the model, inside the plan's bytes."""

import logging
import threading
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from baklava.cache import BudgetedCache
from baklava.eviction import eviction_of
from baklava.model import LoadedModel
from baklava.plan import BudgetPlan
from baklava.prefilling import prefill
from serve_app.sampling import Sampler, Sampling

logger = logging.getLogger("ray.serve")

Finish = Literal["stop", "length"]


@dataclass(frozen=True)
class Token:
    """A generated token, and why the text ends with it, if it does."""

    id: int
    finish: Finish | None = None


class BrokenPromiseError(RuntimeError):
    """A cache held more bytes than its plan promised: a fault of ours, never the client's."""


class Engine:
    """Generates with a fresh budgeted cache for each sequence; a second caller waits for the first to end.

    `held_last` and `held_most` are the bytes that the caches were measured to hold: by the latest sequence, and ever.

    Raises:
        UserError: the plan was made for another model, or names an eviction method that does not exist.
    """

    def __init__(self, loaded: LoadedModel, plan: BudgetPlan) -> None:
        plan.check_fits(loaded.identity, loaded.geometry)
        eviction_of(plan.eviction)  # a plan that no cache can be made of is refused before the first request
        self.plan = plan
        self.held_last = self.held_most = 0
        self._loaded, self._device = loaded, loaded.device
        self._end_ids = loaded.end_ids
        self._turn = threading.Lock()

    @torch.inference_mode()
    def generate(self, prompt: Sequence[int], sampling: Sampling) -> Generator[Token]:
        """Yield tokens as they are made: the prompt enters as the plan says, then one forward per token.

        Closing the generator ends the sequence. Raises BrokenPromiseError rather than hand out a token of a cache that
        outgrew its plan.
        """
        with self._turn:
            sampler = Sampler(sampling, self._device)
            ends = sampling.stop_ids if sampling.ignore_eos else sampling.stop_ids | self._end_ids
            cache, logits = prefill(self._loaded, self.plan, torch.tensor([list(prompt)], device=self._device))
            for made in range(sampling.max_tokens):
                self._measure(cache)
                if made < sampling.min_tokens:
                    logits[:, list(ends)] = -torch.inf
                token = sampler.draw(logits)
                finish = _finish(token, ends, last=made + 1 == sampling.max_tokens)
                yield Token(token, finish)
                if finish:
                    return
                ids = torch.tensor([[token]], device=self._device)
                logits = self._loaded.model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]

    def _measure(self, cache: BudgetedCache) -> None:
        self.held_last = cache.nbytes
        self.held_most = max(self.held_most, self.held_last)
        if cache.nbytes > cache.promised_bytes:
            message = f"the cache holds {cache.nbytes} bytes, but its plan promises at most {cache.promised_bytes}"
            logger.error(message)
            raise BrokenPromiseError(message)


def _finish(token: int, ends: frozenset[int], *, last: bool) -> Finish | None:
    if token in ends:
        return "stop"
    return "length" if last else None
