"""What the replicas of a server know of each other: which plan is in force, and how each of them is doing."""

import dataclasses
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from pydantic import ValidationError

from baklava.errors import UserError
from baklava.plan.budget_plan import BudgetPlan
from serve_app.engine.engine import Engine
from serve_app.openai.errors import ApiError

SILENT_SECONDS = 10.0
"""After so long without a word a replica counts as gone."""


@dataclass(frozen=True)
class Order:
    """What every replica is to do: live inside a plan (JSON, "" the one that it started with), or drain.

    A higher `version` is a newer plan.
    """

    version: int = 0
    plan: str = ""
    draining: bool = False


@dataclass(frozen=True)
class Report:
    """What a replica says of itself: the order that it follows, what it does, and its metrics.

    `failed` is why it could not follow the order of version `refused`.
    """

    replica: str
    order: Order
    state: dict[str, Any]
    card: dict[str, Any]
    metrics: str
    failed: str = ""
    refused: int = 0
    at: float = field(default_factory=time.time)

    def heard(self, version: int) -> bool:
        """Whether it has taken up or refused this version of the plan."""
        return max(self.order.version, self.refused) >= version


class Board:
    """Keeps the newest order and the last report of every replica. An actor where there is a cluster, else an object.

    It holds nothing that the replicas do not: one that was restarted learns the order from the next report.
    """

    def __init__(self) -> None:
        self._order = Order()
        self._reports: dict[str, Report] = {}

    def report(self, report: Report) -> Order:
        """Hear a replica, and tell it what to do."""
        self._reports[report.replica] = dataclasses.replace(report, at=time.time())
        if report.order.version > self._order.version and not report.failed:
            self._order = dataclasses.replace(self._order, version=report.order.version, plan=report.order.plan)
        return self._order

    def order(self) -> Order:
        """What is in force."""
        return self._order

    def offer(self, plan: str) -> Order:
        """Put a plan in force; every replica takes it up with its next report."""
        self._order = dataclasses.replace(self._order, version=self._order.version + 1, plan=plan)
        return self._order

    def drain(self) -> Order:
        """Tell all replicas to take no more requests."""
        self._order = dataclasses.replace(self._order, draining=True)
        return self._order

    def leave(self, replica: str) -> None:
        """A replica ends."""
        self._reports.pop(replica, None)

    def reports(self) -> list[Report]:
        """The last word of every replica that was heard of lately, by name."""
        now = time.time()
        self._reports = {name: one for name, one in self._reports.items() if now - one.at < SILENT_SECONDS}
        return [self._reports[name] for name in sorted(self._reports)]


logger = logging.getLogger("ray.serve")

EVERY = 0.5
"""Seconds between two reports; so old is what one replica knows of another."""


class Notices(Protocol):
    """The board as replicas see it."""

    def report(self, report: Report) -> Order:
        """Hear a replica, and tell it what to do."""

    def offer(self, plan: str) -> Order:
        """Put a plan in force."""

    def leave(self, replica: str) -> None:
        """A replica ends."""

    def reports(self) -> list[Report]:
        """The last word of every replica."""


class Follower:
    """Follows the board's orders for one engine. `card` and `metrics` are what is reported beside its state."""

    def __init__(
        self,
        engine: Engine,
        board: Notices,
        replica: str,
        card: Callable[[], dict[str, Any]],
        metrics: Callable[[], str],
        order: Order | None = None,
    ) -> None:
        self._engine, self._board, self.replica = engine, board, replica
        self._card, self._metrics = card, metrics
        self._order = order or Order()
        self._failed, self._refused = "", 0
        self._lock = threading.Lock()
        self._over = threading.Event()

    def start(self) -> None:
        """Report twice a second from a thread of its own, until `stop`."""
        threading.Thread(target=self._loop, name="follow", daemon=True).start()

    def stop(self) -> None:
        """This replica ends: no more reports, and the others do not wait until it counts as gone."""
        self._over.set()
        with self._lock:
            self._board.leave(self.replica)

    def say(self) -> Report:
        """What this replica would report now."""
        state = dataclasses.asdict(self._engine.state())
        return Report(self.replica, self._order, state, self._card(), self._metrics(), self._failed, self._refused)

    def once(self) -> None:
        """Report, and do what is said."""
        with self._lock:
            if not self._over.is_set():
                self._follow(self._board.report(self.say()))

    def propose(self, plan: BudgetPlan) -> int:
        """Swap this replica's plan and then everybody's; the version that this is.

        Raises:
            UserError: the plan is for another model, or the pool does not hold one sequence.
            ApiError: 503, the others cannot be told; this replica is back in the plan that it had.
        """
        with self._lock:
            before = self._engine.plan
            self._engine.swap(plan)
            try:
                order = self._board.offer(plan.model_dump_json())
            except Exception:  # whatever the cluster raises
                self._engine.swap(before)
                logger.warning("the board of the replicas does not answer", exc_info=True)
                raise ApiError("The other replicas cannot be told; the plan stays.", 503, retry_after=5) from None
            self._order, self._failed = dataclasses.replace(order, draining=self._order.draining), ""
            return order.version

    def everyone(self) -> list[Report]:
        """What all replicas say, this one as it is now."""
        return sorted([self.say(), *self.others()], key=lambda report: report.replica)

    def others(self) -> list[Report]:
        """What all other replicas said last; none where the board cannot be reached."""
        try:
            return [report for report in self._board.reports() if report.replica != self.replica]
        except Exception:  # whatever the cluster raises
            logger.warning("the board of the replicas does not answer", exc_info=True)
            return []

    def _loop(self) -> None:
        while not self._over.wait(EVERY):
            try:
                self.once()
            except Exception:
                logger.warning("cannot report to the other replicas", exc_info=True, extra={"log_to_stderr": False})

    def _follow(self, order: Order) -> None:
        if order.draining:  # the engine of a replica that comes up only now has not heard of it
            self._engine.drain()
            self._order = dataclasses.replace(self._order, draining=True)
        if order.version > max(self._order.version, self._refused):
            self._take(order)

    def _take(self, order: Order) -> None:
        try:
            self._engine.swap(BudgetPlan.model_validate_json(order.plan))
        except (UserError, ValidationError) as error:
            self._failed, self._refused = str(error), order.version
            logger.error("stays in plan %s: %s", self._engine.plan.digest, error)
        else:
            self._order = dataclasses.replace(order, draining=self._order.draining)
            self._failed = ""
