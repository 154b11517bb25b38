"""What an evaluation is asked to do: one frozen record, kept beside its results so that it can be resumed."""

from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import Field, PositiveInt, ValidationError

from baklava.errors import UserError
from baklava.model import LoadedModel
from baklava.names import given_twice
from baklava.records import Record
from baklava.tasks import TASKS
from tuning.settings import Replicas, settled, short_name

Names = Annotated[tuple[str, ...], Field(min_length=1)]

MOST_WINDOWS = 12

_RULES = {
    "replicas": "--replicas is auto or a number, at least 1",
    "seed": "--seed is a number, at least 0",
    "plans": "--plan is given at least once",
    "texts": "--texts names at least one text",
}


class EvaluationSettings(Record):
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
                values[field] = tuple(settled(name) for name in values[field])
        values["plans"] = tuple(values["plans"])
        values["tasks"] = _expanded(values.get("tasks", ()))
        given = {"plan": values["plans"], "tasks": values["tasks"], "lengths": values.get("lengths", ())}
        for field, names in given.items():
            if twice := given_twice(names):
                raise UserError(f"--{field} {twice} is given twice; give it once")
        if values.get("windows"):
            values["windows"] = str(Path(values["windows"]).absolute())
        if "model" in values:
            values["model"] = settled(values["model"])
        try:
            return cls(**values)
        except ValidationError as error:
            first = error.errors()[0]
            field = str(first["loc"][0])
            reason = _RULES.get(field, f"{first['msg']}; correct --{field}")
            raise UserError(f"--{field} {values.get(field, '')} is out of range: {reason}") from None


class EvaluationRecord(Record):
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
