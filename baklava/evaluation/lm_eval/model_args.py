"""What a run of lm-evaluation-harness is told: the model, and the plan that it lives in."""

from collections.abc import Mapping
from typing import Any

import torch
from pydantic import Field, PositiveInt, ValidationError

from baklava.allocation.plan_spec import resolve_plan
from baklava.console import log
from baklava.data.documents import load_documents
from baklava.data.windows import make_splits
from baklava.errors import UserError
from baklava.plan.budget_plan import BudgetPlan
from baklava.profiling.profile import Profile
from baklava.profiling.profiler import cached_profile
from baklava.runtime.model_loader import LoadedModel, load
from baklava.serialization import FrozenModel

CONTEXT_LENGTH = 4096
"""Tokens at which METHOD:BUDGET states its bytes, unless told otherwise or the model takes fewer."""


class ModelArgs(FrozenModel):
    """`--model_args`, and those options of the harness that a model is handed.

    METHOD:BUDGET states its bytes at `context_length` tokens and is profiled on the text `calibration`; a plan file
    says both itself. Nothing longer than `max_length` tokens is fed.
    """

    pretrained: str = Field(coerce_numbers_to_str=True)
    plan: str
    context_length: PositiveInt | None = None
    calibration: str = "botocore"
    max_length: PositiveInt | None = None
    device: str | None = None
    batch_size: int | str = 1
    max_batch_size: int | None = None

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> "ModelArgs":
        """These arguments; raises UserError where one is unknown, missing or wrong."""
        try:
            made = cls(**given)
        except ValidationError as error:
            first = error.errors()[0]
            raise UserError(
                f"--model_args {'.'.join(map(str, first['loc']))}: {first['msg']}; write pretrained=demo|DIR|HUB_ID,"
                "plan=PLAN.json|full|METHOD:BUDGET and, where needed, context_length, calibration or max_length"
            ) from None
        if str(made.batch_size) != "1" and not str(made.batch_size).startswith("auto"):
            raise UserError(
                f"batch_size {made.batch_size}: a plan bounds one sequence at a time; leave it at 1 or auto"
            )
        return made

    def loaded(self) -> LoadedModel:
        """The model, on the device that the harness named, whose default is a GPU also where there is none."""
        device = self.device
        if device and device.startswith("cuda") and not torch.cuda.is_available():
            log(f"baklava: there is no {device} here, so the model runs on the CPU")
            device = "cpu"
        return load(self.pretrained, device=device)

    def checked_length(self, loaded: LoadedModel) -> int:
        """Most tokens to feed; raises UserError where that is more than the model was made for."""
        if (self.max_length or 0) > loaded.max_length:
            raise UserError(
                f"max_length={self.max_length}, but {loaded.identity.id} takes {loaded.max_length}; leave it out"
            )
        return self.max_length or loaded.max_length

    def named_plan(self, loaded: LoadedModel, most: int) -> BudgetPlan:
        """The plan, for sequences of at most `most` tokens, all of which `full` holds.

        Raises:
            UserError: no such plan, or one for another model or context length.
        """
        usual = most if self.plan == "full" else min(CONTEXT_LENGTH, most)
        length = self.context_length or usual
        plan = resolve_plan(self.plan, loaded, length, lambda: self._profile(loaded, length)).plan
        if self.context_length not in (None, plan.context_length):
            raise UserError(
                f"context_length={self.context_length}, but {self.plan} was made for {plan.context_length} tokens; "
                "leave it out"
            )
        return plan

    def _profile(self, loaded: LoadedModel, length: int) -> Profile:
        texts, continuation = load_documents([self.calibration]), max(1, length // 8)
        splits = make_splits(texts, loaded.tokenizer, context=length - continuation, continuation=continuation, seed=0)
        return cached_profile(loaded, splits.calibration)
