"""A new plan for new requests, while running ones end under theirs: by POST /v1/plan, or by a signal."""

import json
from collections.abc import Callable
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from baklava.plan.budget_plan import BudgetPlan
from serve_app.openai.errors import ApiError, error_summary
from serve_app.replication.replica_sync import ReplicaGroup, ReplicaReport


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
