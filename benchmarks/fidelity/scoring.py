"""Plans on a window: one prefill, then a row a plan."""

import hashlib
from collections.abc import Iterator, Sequence

from baklava.evaluation import gain
from baklava.eviction import eviction_of
from baklava.model import LoadedModel
from baklava.plan import BudgetPlan
from baklava.records import Record
from baklava.scoring import prefill, score
from baklava.windows import Window


class Row(Record):
    """One plan on one window; NLLs, KL and gain in nats per token.

    `run` stands for the weights and the window's ids, `plan` is the plan's digest, `code` the commit that scored it.
    """

    run: str
    plan: str
    window: str
    nll_full: float
    nll: float
    kl: float
    gain: float
    allocated_bytes: int
    seconds: float
    code: str

    @property
    def key(self) -> tuple[str, str]:
        """What is not scored twice."""
        return self.run, self.plan


def run_of(weights: str, window: Window) -> str:
    """Stands for these weights on this window."""
    return hashlib.sha256(f"{weights} {window.ids} {window.context}".encode()).hexdigest()[:16]


def rows(loaded: LoadedModel, window: Window, plans: Sequence[BudgetPlan], code: str) -> Iterator[Row]:
    """Score plans on a window that is prefilled once for all of them.

    Raises:
        RuntimeError: a cache held more than its plan promised.
    """
    run = run_of(loaded.weights_digest, window)
    prefilled = prefill(loaded, window, tuple(dict.fromkeys(eviction_of(plan.eviction) for plan in plans)))
    worth = gain(loaded, prefilled)
    for plan in plans:
        found = score(loaded, prefilled, plan)
        if found.allocated_bytes > plan.bytes_per_sequence:
            raise RuntimeError(
                f"plan {plan.digest} held {found.allocated_bytes} bytes on {window.name}, but promised "
                f"{plan.bytes_per_sequence}"
            )
        yield Row(
            run=run,
            plan=plan.digest,
            window=window.name,
            nll_full=found.nll_full,
            nll=found.nll,
            kl=found.kl,
            gain=worth,
            allocated_bytes=found.allocated_bytes,
            seconds=found.seconds,
            code=code,
        )
