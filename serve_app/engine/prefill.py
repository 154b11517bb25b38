"""The way of one prompt into a cache: from a snapshot, from its beginning, or token by token where it is judged."""

import time
from dataclasses import dataclass

from baklava.plan.budget_plan import BudgetPlan
from baklava.runtime.logprobs import PromptLogprobsTask
from baklava.runtime.model_loader import LoadedModel
from baklava.runtime.prefill import PrefillResult, PrefillTask, ContinuationPrefill, make_prefill_task, prefill_workspace_bytes
from serve_app.engine.prefix_cache import Prefix, Snapshot, Snapshots
from serve_app.engine.sequence import Request, as_logprob
from serve_app.engine.types import Logprob


@dataclass(frozen=True)
class Needs:
    """Bytes that a request needs: its caches, what its prompt holds beside them while it enters, and a new snapshot.

    `prefix` is the declared prompt that it begins with, if any.
    """

    caches: int
    transient: int
    snapshot: int
    prefix: Prefix | None

    @property
    def total(self) -> int:
        """All that must fit before the prompt may enter."""
        return self.caches + self.transient + self.snapshot


def needs(loaded: LoadedModel, plan: BudgetPlan, request: Request, snapshots: Snapshots) -> Needs:
    """What a request needs inside a plan, given the snapshots that there are."""
    work, prefix = request.work, _prefix(request, snapshots)
    caches = work.n * plan.bytes_for(request.tokens) if work.sampling_params.max_tokens or prefix != work.prompt else 0
    if prefix is None:
        entering = 0 if work.prompt_logprobs is not None else len(work.prompt)
        return Needs(caches, transient(loaded, plan, entering), 0, None)
    if snapshots.of(prefix):
        return Needs(caches, 0, 0, prefix)
    return Needs(caches, transient(loaded, plan, len(prefix)), plan.bytes_for(len(prefix)), prefix)


def transient(loaded: LoadedModel, plan: BudgetPlan, tokens: int) -> int:
    """Bytes that so many tokens hold beside their cache while they enter."""
    return prefill_workspace_bytes(plan, tokens, loaded.model.dtype.itemsize)


def _prefix(request: Request, snapshots: Snapshots) -> Prefix | None:
    return None if request.work.prompt_logprobs is not None else snapshots.begins(request.work.prompt)


class Entrance:
    """The one prompt that is entering, since the time.monotonic() `admitted`.

    A declared prefix is always entered alone, and the rest behind it in turns: so nothing depends on whether its
    snapshot was there. Where it was not, this leaves it.
    """

    def __init__(
        self, loaded: LoadedModel, plan: BudgetPlan, request: Request, prefix: Prefix | None, snapshots: Snapshots
    ) -> None:
        self.plan, self.request, self.prefix, self.cached_tokens = plan, request, prefix, 0
        self._loaded, self._snapshots, self._entered = loaded, snapshots, 0
        self.admitted = time.monotonic()
        self._entry, self._begins = self._start()

    def _start(self) -> tuple[PrefillTask, bool]:
        """Where to begin, and whether that is with a declared prefix that has no snapshot."""
        work, room = self.request.work, self.request.tokens
        if work.prompt_logprobs is not None:
            return PromptLogprobsTask(self._loaded, self.plan, work.prompt, room, work.prompt_logprobs), False
        if self.prefix is None:
            return make_prefill_task(self._loaded, self.plan, work.prompt, room), False
        if snapshot := self._snapshots.of(self.prefix):
            self.cached_tokens = len(self.prefix)
            return self._behind(snapshot, self.prefix), False
        return make_prefill_task(self._loaded, self.plan, self.prefix, len(self.prefix)), True

    def _behind(self, snapshot: Snapshot, prefix: Prefix) -> ContinuationPrefill:
        rest = self.request.work.prompt[len(prefix) :]
        return ContinuationPrefill(self._loaded, snapshot.cache.copy(self.request.tokens), snapshot.logits, rest)

    def step(self, tokens: int) -> PrefillResult | None:
        """Take about so many tokens more in; at the end, the cache that holds the prompt, and the logits behind it."""
        entered = self._entry.step(tokens)
        if entered is None or not self._begins or self.prefix is None:
            return entered
        snapshot, self._begins = Snapshot(*entered), False
        self._snapshots.keep(self.prefix, snapshot)
        if len(self.prefix) == len(self.request.work.prompt) and not self.request.work.sampling_params.max_tokens:
            return entered
        self._entered += self._entry.num_processed
        self._entry = self._behind(snapshot, self.prefix)
        return None

    @property
    def prompt_logprobs(self) -> tuple[Logprob | None, ...]:
        """One per token of the prompt, where they were asked for."""
        if not isinstance(self._entry, PromptLogprobsTask):
            return ()
        return (None, *map(as_logprob, self._entry.token_logprobs))

    @property
    def taken(self) -> int:
        """Tokens taken in so far, or work that takes as long."""
        return self._entered + self._entry.num_processed

    @property
    def nbytes(self) -> int:
        """Bytes held between two steps."""
        return self._entry.nbytes
