"""Keeps the replicas of a server in step: each applies the desired state, reports, and takes a new plan.

New requests run under a new plan, while running ones end under theirs. It comes by POST /v1/plan, or by a signal.
"""

import dataclasses
import json
import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Protocol

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from baklava.errors import UserError
from baklava.plan.budget_plan import BudgetPlan
from serve_app.engine.engine import Engine
from serve_app.openai.errors import ApiError, error_summary
from serve_app.replication.coordinator import INITIAL_STATE, DesiredState

logger = logging.getLogger("ray.serve")

MAX_REPORT_AGE_SECONDS = 10.0
"""For this long a replica that does not answer is shown by its last report."""


@dataclass(frozen=True)
class ReplicaReport:
    """What a replica says about itself.

    Args:
        applied: the desired state that it follows.
        state: its `EngineState` as a dict.
        metrics: its metrics in Prometheus's text format.
        failure: why it could not apply the plan of version `rejected_version`.
    """

    replica: str
    applied: DesiredState
    state: dict[str, Any]
    metrics: str
    failure: str = ""
    rejected_version: int = 0


class ReplicaGroup(Protocol):
    """All replicas of a server and their coordinator. Every method raises whatever the cluster raises."""

    def sync(self, applied: DesiredState) -> DesiredState:
        """Exchange states with the coordinator."""

    def publish_plan(self, plan: str) -> DesiredState:
        """Make a plan (JSON) the active one for replicas that sync from now on."""

    def broadcast(self, desired: DesiredState | None = None) -> Sequence[ReplicaReport | BaseException]:
        """Have every running replica apply the state, if one is given, and return their reports.

        A replica that does not answer is an exception in its place.
        """


class ReplicaSync:
    """Applies the desired state to one engine. Its methods may be called from any thread."""

    def __init__(
        self,
        engine: Engine,
        group: ReplicaGroup,
        replica: str,
        metrics: Callable[[], str],
        applied: DesiredState = INITIAL_STATE,
    ) -> None:
        self._engine, self._group, self.replica, self._metrics = engine, group, replica, metrics
        self._applied = applied
        self._failure, self._rejected_version = "", 0
        self._last_reports: dict[str, tuple[float, ReplicaReport]] = {}  # with the time at which each came
        self._lock = threading.Lock()

    def report(self) -> ReplicaReport:
        """Return what this replica is doing now."""
        state = dataclasses.asdict(self._engine.state())
        return ReplicaReport(self.replica, self._applied, state, self._metrics(), self._failure, self._rejected_version)

    def apply(self, desired: DesiredState) -> ReplicaReport:
        """Drain, and swap the plan if it is a newer one. A plan that the engine rejects is not tried again."""
        with self._lock:
            if desired.draining:
                self._engine.drain()
                self._applied = dataclasses.replace(self._applied, draining=True)
            if desired.version > max(self._applied.version, self._rejected_version):
                try:
                    self._engine.swap_plan(BudgetPlan.model_validate_json(desired.plan))
                except (UserError, ValidationError) as error:
                    self._failure, self._rejected_version = str(error), desired.version
                    logger.error("a new plan is rejected, %s stays active: %s", self._engine.plan.digest, error)
                else:
                    self._applied = dataclasses.replace(desired, draining=self._applied.draining)
                    self._failure = ""
        return self.report()

    def sync(self) -> None:
        """Apply what was published while this replica started, or could not be reached."""
        self.apply(self._group.sync(self._applied))

    def publish(self, plan: BudgetPlan) -> list[ReplicaReport]:
        """Swap this replica's plan and then everybody's. Return what the replicas say afterwards.

        Raises:
            UserError: the plan is for another model, or the pool does not hold one sequence.
            ApiError: 503, the coordinator does not answer; this replica is back under the plan that it had.
        """
        with self._lock:
            previous = self._engine.plan
            self._engine.swap_plan(plan)
            try:
                desired = self._group.publish_plan(plan.model_dump_json())
            except Exception:  # whatever the cluster raises
                self._engine.swap_plan(previous)
                logger.warning("the coordinator of the replicas does not answer", exc_info=True)
                message = "The other replicas cannot be reached; the plan stays."
                raise ApiError(message, 503, retry_after=5) from None
            self._applied, self._failure = dataclasses.replace(desired, draining=self._applied.draining), ""
        return self.all_reports(desired)

    def all_reports(self, desired: DesiredState | None = None) -> list[ReplicaReport]:
        """Return the reports of all replicas, after they applied the state if one is given.

        Without one, a replica that does not answer is represented by its last report if that is recent.
        """
        try:
            answers = self._group.broadcast(desired)
        except Exception:  # whatever the cluster raises
            logger.warning("the other replicas do not answer", exc_info=True)
            answers = []
        for answer in answers:
            if isinstance(answer, BaseException):
                logger.warning("a replica does not answer: %s", answer)
        now = time.monotonic()
        reports = {answer.replica: answer for answer in answers if isinstance(answer, ReplicaReport)}
        reports[self.replica] = self.report()
        with self._lock:
            recent = {
                name: (time_received, report)
                for name, (time_received, report) in self._last_reports.items()
                if now - time_received < MAX_REPORT_AGE_SECONDS
            }
            self._last_reports = recent | {name: (now, report) for name, report in reports.items()}
            if desired is None:
                reports = {name: report for name, (_, report) in self._last_reports.items()}
        return sorted(reports.values(), key=lambda report: report.replica)


class PlanRequest(BaseModel):
    """A plan's JSON, or `models:/NAME@ALIAS` in the registry that the server knows; never a path."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    plan: dict[str, Any] | Annotated[str, Field(max_length=256)]

    def load(self, load_plan: Callable[[str], BudgetPlan], scheme: str) -> BudgetPlan:
        """Return the plan itself. Raises ApiError and UserError."""
        if isinstance(self.plan, str):
            if not self.plan.startswith(scheme):
                raise ApiError(f"plan: give a plan's JSON or {scheme}NAME@ALIAS, not a path.", param="plan")
            return load_plan(self.plan)
        try:
            return BudgetPlan.model_validate_json(json.dumps(self.plan))  # as a file is read
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "plan"
            raise ApiError(f"plan: not a valid plan ({where}: {first['msg']}).", param="plan") from None


def rollout_plan(group: ReplicaGroup, plan: BudgetPlan) -> str:
    """Send a plan to all replicas. Return a sentence about the result."""
    try:
        desired = group.publish_plan(plan.model_dump_json())
        answers = group.broadcast(desired)
    except Exception as error:  # whatever the cluster raises
        return f"plan {plan.digest} cannot be sent to the replicas ({error_summary(error)}); try again"
    reports = [answer for answer in answers if isinstance(answer, ReplicaReport)]
    failures = [report.failure for report in reports if report.rejected_version >= desired.version]
    applied = sum(report.applied.version >= desired.version for report in reports)
    if failures:
        return f"{len(failures)} of {len(answers)} replicas keep the plan that they have: {failures[0]}"
    if not 0 < applied == len(answers):
        return f"plan {plan.digest} is published; {applied} of {len(answers)} replicas run it so far"
    return f"new requests run under plan {plan.digest} ({plan.ratio:.1%})"
