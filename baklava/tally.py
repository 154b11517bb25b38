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
    def smallest(self) -> int:
        """Capacity of the smallest head in entries: no sequence up to this length loses any."""
        return min((tokens for row in self.plan.tokens for tokens in row), default=0)

    def count(self, context: int, decoded: int) -> None:
        """Count a request of `context` prefilled tokens, behind which `decoded` forwards predicted more tokens."""
        self.requests += 1
        if self._lost(context, decoded):
            self.touched += 1
        elif context > self.smallest:
            self.exact += 1

    def _lost(self, context: int, decoded: int) -> bool:
        if decoded:
            return context + decoded > self.smallest
        chunk = self.plan.prefill.chunk
        return chunk is not None and (context - 1) // chunk * chunk > self.smallest

    def sentences(self) -> str:
        """What to tell whoever reads the results."""
        said = [
            f"{self.kind}: {self.touched} of {self.requests} requests had tokens predicted from a cache that had lost "
            f"entries; the smallest head holds {self.smallest}"
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
