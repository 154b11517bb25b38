"""What requests had to do with a plan: a score that no eviction could change says nothing about it."""

from dataclasses import dataclass

from baklava.plan import BudgetPlan


@dataclass
class Tally:
    """Counts over requests of one kind: all, those a plan touched, and those whose context had to be truncated.

    A request is touched when one of its tokens was predicted from a cache that had lost entries. `exact` counts those
    that were long enough, but asked for one token only, which a dense prefill predicts before it evicts anything.
    """

    plan: BudgetPlan
    kind: str
    requests: int = 0
    touched: int = 0
    exact: int = 0
    truncated: int = 0

    @property
    def lossless(self) -> int:
        """Tokens up to which no head loses an entry."""
        return self.plan.lossless_tokens

    def count(self, context: int, decoded: int) -> None:
        """Count a request of `context` prefilled tokens, behind which `decoded` forwards of one predicted the rest."""
        self.requests += 1
        if self._lost(context, decoded):
            self.touched += 1
        elif context > self.lossless:
            self.exact += 1

    def _lost(self, context: int, decoded: int) -> bool:
        """Whether entries were gone when the last token was predicted."""
        eviction, chunk = self.plan.eviction, self.plan.prefill.chunk
        every = eviction.interval if eviction.scored else 1
        start = max(0, context - 1) // chunk * chunk if chunk else 0
        if start and context - start <= every:  # so short a last chunk is decoded
            context, decoded = start, decoded + context - start
        if not decoded:
            return start > self.lossless
        # A ring makes room before it attends, a method that scores evicts afterwards and every `interval` tokens.
        gone_at = context + ((decoded - 1) // every * every if eviction.scored else decoded)
        return gone_at > self.lossless

    def sentences(self) -> str:
        """What to tell whoever reads the results."""
        said = [
            f"{self.kind}: {self.touched} of {self.requests} requests had tokens predicted from a cache that had lost "
            f"entries, which the plan does beyond {self.lossless} tokens"
        ]
        if self.exact:
            said.append(
                f"{self.exact} were longer but asked for one token only, predicted before anything was evicted, as a "
                "dense prefill always does"
            )
        if self.requests and not self.touched:
            said.append("all of these results are the full cache's and say nothing about the plan")
        if self.truncated:
            said.append(f"{self.truncated} were longer than the model takes and lost the beginning of their context")
        return "; ".join(said)
