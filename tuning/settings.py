"""What a search is asked to do: one frozen record, kept beside its results so that it can be resumed."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, PositiveInt, ValidationError

from baklava.errors import UserError
from baklava.files import write_whole
from baklava.geometry import ModelIdentity
from baklava.records import Record

FILE = "search.json"

Objective = Literal["kl", "ppl"]
Replicas = Literal["auto"] | Annotated[int, Field(ge=1)]

_RULES = {
    "budget": "--budget is a fraction of the full cache's bytes, above 0 and at most 1, such as 0.30",
    "context": "--context is a number of tokens, at least 1",
    "continuation": "--continuation is a number of tokens, at least 1",
    "trials": "--trials is a number of trials, at least 1",
    "objective": "--objective is kl or ppl",
    "replicas": "--replicas is auto or a number, at least 1",
    "seed": "--seed is a number, at least 0",
}


class SearchSettings(Record):
    """The arguments of a search. `budget` is a fraction of the 16-bit full cache's bytes at `context_length` tokens."""

    model: str
    texts: Annotated[tuple[str, ...], Field(min_length=1)]
    budget: Annotated[float, Field(gt=0, le=1)]
    context: PositiveInt
    continuation: PositiveInt
    trials: PositiveInt
    objective: Objective = "kl"
    replicas: Replicas = "auto"
    seed: Annotated[int, Field(ge=0)] = 0

    @property
    def context_length(self) -> int:
        """Tokens of one window, at which the ratio of bytes is stated."""
        return self.context + self.continuation

    @property
    def model_name(self) -> str:
        """The last part of the model's name, fit for a registry: `demo`, `qwen2.5-0.5b`."""
        return short_name(self.model)

    @classmethod
    def of(cls, *, model: str, texts: Sequence[str], **values: Any) -> Self:
        """Checked settings; files are made absolute, so that a resumed search finds them from any folder."""
        try:
            return cls(model=settled(model), texts=tuple(map(settled, texts)), **values)
        except ValidationError as error:
            first = error.errors()[0]
            field = str(first["loc"][0])
            raise UserError(
                f"--{field} {values.get(field, '')} is out of range: {_RULES.get(field, first['msg'])}"
            ) from None


class SearchRecord(Record):
    """What a search needs to go on after a kill: its settings, what they stood for, and its MLflow parent run.

    `corpora` maps the name of each text to the digest of what it held: recorded trials compare only on equal texts.
    """

    settings: SearchSettings
    model: ModelIdentity
    corpora: dict[str, str]
    run: str

    def write(self, out: Path) -> None:
        """Keep the record in a search's folder."""
        write_whole(out / FILE, self.model_dump_json(indent=1) + "\n")

    @classmethod
    def read(cls, out: Path) -> Self:
        """The record of an earlier search; raises UserError when its folder holds none."""
        try:
            return cls.model_validate_json((out / FILE).read_text())
        except (OSError, ValidationError):
            raise UserError(f"--resume {out} holds no valid {FILE}; give the --out folder of a search") from None

    def check_same(self, model: ModelIdentity, corpora: dict[str, str]) -> None:
        """Raise UserError when the model or a text has changed since."""
        changed = [name for name in self.corpora if corpora.get(name) != self.corpora[name]]
        if model != self.model:
            changed.append(self.settings.model)
        if changed:
            raise UserError(
                f"{', '.join(changed)} changed since this search began; start a new search without --resume"
            )


def short_name(model: str) -> str:
    """The last part of a model's name or path, fit for a registry."""
    short = model.rstrip("/").rsplit("/", 1)[-1].lower()
    return re.sub(r"[^\w.-]+", "-", short).strip("-.") or "model"


def settled(name: str) -> str:
    """A name as it is; a file that exists made absolute."""
    path = Path(name).expanduser()
    return str(path.absolute()) if path.exists() else name
