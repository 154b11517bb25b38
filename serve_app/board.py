"""What the replicas of a server know of each other: which plan is in force, and how each of them is doing."""

import dataclasses
import time
from dataclasses import dataclass, field
from typing import Any

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
