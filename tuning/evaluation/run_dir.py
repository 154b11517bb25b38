"""What an evaluation is asked to do: one frozen record, kept beside its results so that it can be resumed."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import Field, PositiveInt, TypeAdapter, ValidationError

from baklava.allocation.plan_spec import NamedPlan
from baklava.data.windows import Window, read_windows, write_windows
from baklava.errors import UserError, first_duplicate
from baklava.evaluation.evaluator import PromptResult, WindowResult
from baklava.evaluation.speed.latency import Speed
from baklava.evaluation.tasks import TASKS, Prompt
from baklava.plan.budget_plan import BudgetPlan
from baklava.runtime.model_loader import LoadedModel
from baklava.serialization import FrozenModel, atomic_write_text
from tuning.study.journal import Journal
from tuning.study.settings import Replicas, absolute_if_file, short_name

Names = Annotated[tuple[str, ...], Field(min_length=1)]

MOST_WINDOWS = 12

_RULES = {
    "replicas": "--replicas is auto or a number, at least 1",
    "seed": "--seed is a number, at least 0",
    "plans": "--plan is given at least once",
    "texts": "--texts names at least one text",
}


class EvaluationSettings(FrozenModel):
    """The arguments of an evaluation. `windows` is a file that replaces the windows of `texts`.

    `lengths` are the tokens of a prompt with its question; without any, those of a window. `limit` is the most windows,
    by default `MOST_WINDOWS` of texts and all of a file; `prompts` are those of each task and length.
    """

    model: str = "demo"
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
    replicas: Replicas = "auto"
    threads: PositiveInt | None = None
    seed: Annotated[int, Field(ge=0)] = 0

    @property
    def model_name(self) -> str:
        """The last part of the model's name, fit for a registry."""
        return short_name(self.model)

    @classmethod
    def of(cls, **values: Any) -> Self:
        """Checked settings; files are made absolute, so that a resumed evaluation finds them from any folder.

        Raises:
            UserError: a value out of range, a plan or a task that is named twice.
        """
        for field in ("texts", "calibration"):
            if field in values:
                values[field] = tuple(absolute_if_file(name) for name in values[field])
        values["plans"] = tuple(values["plans"])
        values["tasks"] = _expanded(values.get("tasks", ()))
        given = {"plan": values["plans"], "tasks": values["tasks"], "lengths": values.get("lengths", ())}
        for field, names in given.items():
            if twice := first_duplicate(names):
                raise UserError(f"--{field} {twice} is given twice; give it once")
        if values.get("windows"):
            values["windows"] = str(Path(values["windows"]).absolute())
        if "model" in values:
            values["model"] = absolute_if_file(values["model"])
        try:
            return cls(**values)
        except ValidationError as error:
            first = error.errors()[0]
            field = str(first["loc"][0])
            reason = _RULES.get(field, f"{first['msg']}; correct --{field}")
            raise UserError(f"--{field} {values.get(field, '')} is out of range: {reason}") from None


class EvaluationRecord(FrozenModel):
    """What an evaluation needs to go on after a kill: its settings, and the weights that its results are of."""

    settings: EvaluationSettings
    weights: str

    def check_same(self, loaded: LoadedModel) -> None:
        """Raise UserError when the model has other weights by now."""
        if loaded.weights_digest != self.weights:
            raise UserError(
                f"the weights of {self.settings.model} changed since this evaluation began; begin a new one"
            )


def _expanded(tasks: tuple[str, ...]) -> tuple[str, ...]:
    """`all` stands for every task that is made here."""
    return tuple(name for given in tasks for name in (tuple(TASKS) if given == "all" else (given,)))


Result = Annotated[WindowResult | PromptResult, Field(discriminator="kind")]
RESULT: TypeAdapter[WindowResult | PromptResult] = TypeAdapter(Result)
SPEEDS: TypeAdapter[dict[str, Speed]] = TypeAdapter(dict[str, Speed])


class Asked(FrozenModel):
    """A prompt and the name of the task that it counts for."""

    task: str
    prompt: Prompt


PROMPTS: TypeAdapter[tuple[Asked, ...]] = TypeAdapter(tuple[Asked, ...])

Key = tuple[str, str]
Item = Window | Asked
"""One piece of work: what is prefilled once for all plans."""


@dataclass(frozen=True)
class Material:
    """All that is compared and all that it is compared on."""

    plans: tuple[NamedPlan, ...]
    windows: tuple[Window, ...]
    prompts: tuple[Asked, ...]

    @property
    def shortest(self) -> int:
        """Tokens that every plan is made for."""
        return min(named.plan.context_length for named in self.plans)

    @property
    def items(self) -> Iterator[tuple[Key, Item]]:
        """Every piece of work by its kind and name."""
        yield from ((("window", window.name), window) for window in self.windows)
        yield from ((("prompt", asked.prompt.name), asked) for asked in self.prompts)


@dataclass(frozen=True)
class Folder:
    """Where an evaluation keeps everything."""

    path: Path

    @property
    def report(self) -> Path:
        """The report."""
        return self.path / "report.html"

    @property
    def scores(self) -> Path:
        """The figures for machines."""
        return self.path / "scores.json"

    @property
    def recorded(self) -> Path:
        """The id of the run in MLflow, once it is complete there."""
        return self.path / "mlflow-run"

    @property
    def windows(self) -> Path:
        """The windows, for other systems to be scored on the same text."""
        return self.path / "windows.json"

    def begin(self, record: EvaluationRecord, material: Material) -> None:
        """Write what is going to be done; the record last, since it says that the rest is there."""
        (self.path / "plans").mkdir(parents=True, exist_ok=True)
        for number, named in enumerate(material.plans):
            named.plan.write(self._plan(number))
        write_windows(self.windows, material.windows)
        atomic_write_text(self.path / "prompts.json", PROMPTS.dump_json(material.prompts, indent=1).decode() + "\n")
        atomic_write_text(self.path / "evaluation.json", record.model_dump_json(indent=1) + "\n")

    def record(self) -> EvaluationRecord:
        """What was asked; raises UserError when the folder holds no evaluation."""
        try:
            return EvaluationRecord.model_validate_json((self.path / "evaluation.json").read_text())
        except (OSError, ValueError):
            raise UserError(
                f"--resume {self.path} holds no valid evaluation.json; give the --out folder of an evaluation"
            ) from None

    def material(self, settings: EvaluationSettings, vocabulary: int) -> Material:
        """What was written when it began; raises UserError when a part of it is gone."""
        plans = (BudgetPlan.read(self._plan(number)) for number in range(len(settings.plans)))
        try:
            prompts = PROMPTS.validate_json((self.path / "prompts.json").read_bytes())
        except (OSError, ValidationError):
            raise UserError(f"{self.path}/prompts.json is missing or was changed; begin a new evaluation") from None
        named = tuple(NamedPlan(name, plan) for name, plan in zip(settings.plans, plans, strict=True))
        return Material(named, tuple(read_windows(self.windows, vocabulary)), prompts)

    def journal(self) -> "Journal[Any]":
        """The results so far."""
        return Journal.open(self.path / "results.jsonl", RESULT.validate_json)

    def speeds(self) -> dict[str, Speed] | None:
        """The speeds by plan, None where they are still to be measured."""
        path = self.path / "speeds.json"
        return SPEEDS.validate_json(path.read_bytes()) if path.exists() else None

    def write_speeds(self, speeds: Mapping[str, Speed]) -> None:
        """Keep the speeds, which take minutes to measure."""
        atomic_write_text(self.path / "speeds.json", SPEEDS.dump_json(dict(speeds), indent=1).decode() + "\n")

    def write_scores(self, content: Mapping[str, Any]) -> None:
        """Write the figures, last of all: where they are, the evaluation is complete."""
        atomic_write_text(self.scores, json.dumps(content, indent=1, allow_nan=False) + "\n")

    def _plan(self, number: int) -> Path:
        return self.path / "plans" / f"{number}.json"


def in_order(results: Sequence[Any], keys: Sequence[Key]) -> list[Any]:
    """The results of these items, in the items' order; replicas end in any."""
    by_key = {(result.kind, result.name): result for result in results}
    return [by_key[key] for key in keys]
