"""Another plan for new requests, while those under way end in theirs: by POST /v1/plan, or by a signal."""

import json
import time
from collections.abc import Callable
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from baklava.plan.budget_plan import BudgetPlan
from serve_app.openai.errors import ApiError
from serve_app.replication.coordinator import EVERY, Notices, Report

PATIENCE = 10.0
"""Seconds in which replicas are to take up a plan or to refuse it; then they are not waited for any more."""


class PlanRequest(BaseModel):
    """The plan as its JSON, or as `models:/NAME@ALIAS` in the registry that the server knows; never a path."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    plan: dict[str, Any] | Annotated[str, Field(max_length=256)]

    def resolved(self, resolve: Callable[[str], BudgetPlan], registry: str) -> BudgetPlan:
        """The plan itself; raises ApiError and UserError."""
        if isinstance(self.plan, str):
            if not self.plan.startswith(registry):
                raise ApiError(f"plan: give a plan's JSON or {registry}NAME@ALIAS, no path.", param="plan")
            return resolve(self.plan)
        try:
            return BudgetPlan.model_validate_json(json.dumps(self.plan))  # as a file is read
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "plan"
            raise ApiError(f"plan: not a valid plan ({where}: {first['msg']}).", param="plan") from None


def settled(reports: Callable[[], list[Report]], version: int) -> list[Report]:
    """What all replicas say once each has taken up or refused this version of the plan, or after some seconds."""
    until, found = time.monotonic() + PATIENCE, reports()
    while time.monotonic() < until and not all(report.heard(version) for report in found):
        time.sleep(EVERY)
        found = reports()
    return found


def put_in_force(board: Notices, plan: BudgetPlan) -> str:
    """Offer a plan to all replicas; a sentence on what has come of it."""
    try:
        version = board.offer(plan.model_dump_json()).version
        reports = settled(board.reports, version)
    except Exception as error:  # whatever the cluster raises
        return f"the replicas cannot be told of plan {plan.digest} ({str(error).splitlines()[0]}); try again"
    refused = [report.failed for report in reports if report.refused >= version]
    taken = sum(report.order.version >= version for report in reports)
    if refused:
        return f"{len(refused)} of {len(reports)} replicas stay in the plan that they have: {refused[0]}"
    if not 0 < taken == len(reports):
        return f"plan {plan.digest} is offered; {taken} of {len(reports)} replicas have taken it up so far"
    return f"new requests live inside plan {plan.digest} ({plan.ratio:.1%})"
