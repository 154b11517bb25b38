"""The settings of an evaluation, and the folder that it is resumed from."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import Field, PositiveInt, TypeAdapter, ValidationError

from baklava.allocation.plan_spec import ResolvedPlan
from baklava.data.windows import Window, read_windows, write_windows
from baklava.errors import UserError, first_duplicate
from baklava.evaluation.evaluator import PromptResult, WindowResult
from baklava.evaluation.speed import Speed
from baklava.evaluation.tasks import TASKS, Prompt
from baklava.plan.budget_plan import BudgetPlan
from baklava.runtime.dtypes import DTYPES, DType
from baklava.runtime.model_loader import LoadedModel
from baklava.serialization import FrozenModel, atomic_write_text
from tuning.study.journal import Journal
from tuning.study.settings import Replicas, absolute_if_file, short_name
from tuning.tracking.client import now_ms

Names = Annotated[tuple[str, ...], Field(min_length=1)]

DEFAULT_MAX_WINDOWS = 12

_RULES = {
    "replicas": "--replicas is auto or a number, at least 1",
    "dtype": f"--dtype is one of {', '.join(DTYPES)}",
    "seed": "--seed is a number, at least 0",
    "plans": "--plan is given at least once",
    "texts": "--texts names at least one text",
}


class EvaluationSettings(FrozenModel):
    """The arguments of an evaluation.

    `windows` is a file that replaces the windows of `texts`. `lengths` are the tokens of a prompt with its question;
    without any, those of a window. `limit` is the maximum number of windows, by default `DEFAULT_MAX_WINDOWS` of texts
    and all of a file. `prompts` is the number of prompts of each task and length.
    """

    model: str = "demo"
    dtype: DType | None = None
    plans: Names
    texts: Names = ("ifcraft",)
    calibration: Names = ("botocore",)
    windows: str | None = None
    context: PositiveInt = 3072
    continuation: PositiveInt = 512
    limit: PositiveInt | None = None
    tasks: tuple[str, ...] = ()
    lengths: tuple[PositiveInt, ...] = ()
    prompts: PositiveInt = 3
    speed: bool = True
    prefill_chunk: PositiveInt | None = None
    replicas: Replicas = "auto"
    threads: PositiveInt | None = None
    seed: Annotated[int, Field(ge=0)] = 0

    @property
    def model_name(self) -> str:
        """The last part of the model's name, as a registry accepts it."""
        return short_name(self.model)

    @classmethod
    def from_options(cls, **values: Any) -> Self:
        """Return checked settings; files are made absolute, so that an evaluation can be resumed from any folder.

        `all` among the tasks stands for every task that is generated from texts.

        Raises:
            UserError: a value out of range, or a plan, task or length that is given twice.
        """
        for field in ("texts", "calibration"):
            if field in values:
                values[field] = tuple(absolute_if_file(name) for name in values[field])
        if "model" in values:
            values["model"] = absolute_if_file(values["model"])
        if values.get("windows"):
            values["windows"] = str(Path(values["windows"]).absolute())
        values["plans"] = tuple(values["plans"])
        values["tasks"] = tuple(
            task for name in values.get("tasks", ()) for task in (tuple(TASKS) if name == "all" else (name,))
        )
        repeatable = {"plan": values["plans"], "tasks": values["tasks"], "lengths": values.get("lengths", ())}
        for option, names in repeatable.items():
            if duplicate := first_duplicate(names):
                raise UserError(f"--{option} {duplicate} is given twice; give it once")
        try:
            return cls(**values)
        except ValidationError as error:
            first = error.errors()[0]
            field = str(first["loc"][0])
            rule = _RULES.get(field, f"{first['msg']}; correct --{field}")
            raise UserError(f"--{field} {values.get(field, '')} is out of range: {rule}") from None


class EvaluationRecord(FrozenModel):
    """What an evaluation needs to be resumed: its settings, the digest of the weights, and when it started."""

    settings: EvaluationSettings
    weights: str
    started_ms: int = Field(default_factory=now_ms)

    def check_unchanged(self, loaded: LoadedModel) -> None:
        """Raise UserError if the model has other weights now."""
        if loaded.weights_digest != self.weights:
            raise UserError(
                f"the weights of {self.settings.model} changed since this evaluation began; start a new one"
            )


class TaskPrompt(FrozenModel):
    """A prompt and the name of the task that it counts for."""

    task: str
    prompt: Prompt


Result = Annotated[WindowResult | PromptResult, Field(discriminator="kind")]
RESULT: TypeAdapter[WindowResult | PromptResult] = TypeAdapter(Result)
SPEEDS: TypeAdapter[dict[str, Speed]] = TypeAdapter(dict[str, Speed])
PROMPTS: TypeAdapter[tuple[TaskPrompt, ...]] = TypeAdapter(tuple[TaskPrompt, ...])

ItemKey = tuple[str, str]
"""The kind and the name of an item."""

Item = Window | TaskPrompt
"""A unit of work: it is prefilled once for all plans."""


@dataclass(frozen=True)
class EvaluationInputs:
    """The plans, and the windows and prompts that they are compared on."""

    plans: tuple[ResolvedPlan, ...]
    windows: tuple[Window, ...]
    prompts: tuple[TaskPrompt, ...]

    @property
    def min_context_length(self) -> int:
        """Tokens that every plan is made for."""
        return min(named.plan.context_length for named in self.plans)

    @property
    def items(self) -> Iterator[tuple[ItemKey, Item]]:
        """All items with their keys."""
        yield from ((("window", window.name), window) for window in self.windows)
        yield from ((("prompt", prompt.prompt.name), prompt) for prompt in self.prompts)


@dataclass(frozen=True)
class EvaluationDir:
    """The folder of an evaluation."""

    path: Path

    @property
    def report_path(self) -> Path:
        """The report."""
        return self.path / "report.html"

    @property
    def scores_path(self) -> Path:
        """The scores as JSON."""
        return self.path / "scores.json"

    @property
    def windows_path(self) -> Path:
        """The windows, so that other systems can be scored on the same text."""
        return self.path / "windows.json"

    @property
    def mlflow_run_path(self) -> Path:
        """The id of the run in MLflow, once it is complete there."""
        return self.path / "mlflow-run"

    def write_inputs(self, record: EvaluationRecord, inputs: EvaluationInputs) -> None:
        """Write the inputs; the record is written last, since it says that the rest is there."""
        (self.path / "plans").mkdir(parents=True, exist_ok=True)
        for number, named in enumerate(inputs.plans):
            named.plan.write(self._plan_path(number))
        write_windows(self.windows_path, inputs.windows)
        atomic_write_text(self.path / "prompts.json", PROMPTS.dump_json(inputs.prompts, indent=1).decode() + "\n")
        atomic_write_text(self.path / "evaluation.json", record.model_dump_json(indent=1) + "\n")

    def read_record(self) -> EvaluationRecord:
        """Return the record; raise UserError if the folder has none."""
        try:
            return EvaluationRecord.model_validate_json((self.path / "evaluation.json").read_text())
        except (OSError, ValueError):
            raise UserError(
                f"--resume {self.path} has no valid evaluation.json; give the --out folder of an evaluation"
            ) from None

    def read_inputs(self, settings: EvaluationSettings, vocab_size: int) -> EvaluationInputs:
        """Return the inputs as they were written; raise UserError if a part of them is missing."""
        plans = (BudgetPlan.read(self._plan_path(number)) for number in range(len(settings.plans)))
        try:
            prompts = PROMPTS.validate_json((self.path / "prompts.json").read_bytes())
        except (OSError, ValidationError):
            raise UserError(f"{self.path}/prompts.json is missing or was changed; start a new evaluation") from None
        named = tuple(ResolvedPlan(name, plan) for name, plan in zip(settings.plans, plans, strict=True))
        return EvaluationInputs(named, tuple(read_windows(self.windows_path, vocab_size)), prompts)

    def open_journal(self) -> "Journal[Any]":
        """Return the journal with the results so far."""
        return Journal.open(self.path / "results.jsonl", RESULT.validate_json)

    def read_speeds(self) -> dict[str, Speed] | None:
        """Return the speeds by plan, None if they have not been measured."""
        path = self.path / "speeds.json"
        return SPEEDS.validate_json(path.read_bytes()) if path.exists() else None

    def write_speeds(self, speeds: Mapping[str, Speed]) -> None:
        """Write the speeds, which take minutes to measure."""
        atomic_write_text(self.path / "speeds.json", SPEEDS.dump_json(dict(speeds), indent=1).decode() + "\n")

    def write_scores(self, content: Mapping[str, Any]) -> None:
        """Write the scores; a folder that has them is a complete evaluation."""
        atomic_write_text(self.scores_path, json.dumps(content, indent=1, allow_nan=False) + "\n")

    def _plan_path(self, number: int) -> Path:
        return self.path / "plans" / f"{number}.json"


def in_item_order(results: Sequence[Any], keys: Sequence[ItemKey]) -> list[Any]:
    """Return the results of these items in the items' order; workers return them in any."""
    by_key = {(result.kind, result.name): result for result in results}
    return [by_key[key] for key in keys]
