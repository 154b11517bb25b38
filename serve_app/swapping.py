"""POST /v1/plan: another plan for new requests, while those under way end in theirs."""

from collections.abc import Callable
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from baklava.plan import BudgetPlan
from serve_app.errors import ApiError


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
            return BudgetPlan.model_validate(self.plan, strict=False)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "plan"
            raise ApiError(f"plan: not a valid plan ({where}: {first['msg']}).", param="plan") from None
