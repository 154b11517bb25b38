"""The settings of a search: one frozen record, saved with its results so that it can be resumed."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import Field, PositiveInt, ValidationError, model_validator

from baklava.errors import UserError
from baklava.plan.geometry import ModelIdentity
from baklava.runtime.dtypes import DTYPES, DType
from baklava.serialization import FrozenModel, atomic_write_text
from tuning.study.objective import Goal, Objective

SEARCH_FILE = "search.json"

BitsName = Literal["16", "8", "k8v4", "k6v5", "k6v4", "k5v4", "4", "k4v3", "k4v2", "3", "k3v2", "2", "curves"]
ALL_BITS: tuple[BitsName, ...] = get_args(BitsName)
"""Bits of keys and values that plans may store in; "curves" gives each head its own by its loss curves."""

INTERVAL_CHOICES = (8, 16, 32)
"""Eviction intervals that trials sample."""

RESIDUAL_LENGTHS = (0, 8, 16, 32)
"""Newest entries in 16 bits that trials sample."""

LARGEST_INTERVAL = max(INTERVAL_CHOICES)

CENTROID_CHOICES = (0, 4, 8, 16)
"""Centroids per head that trials sample."""

SamplerName = Literal["tpe", "cmaes", "nsga2", "random", "qmc"]
"""Optuna samplers that sample the trials; qmc is quasi-random. Later trials come from the local search."""

Replicas = Literal["auto"] | Annotated[int, Field(ge=1)]

_RULES = {
    "dtype": f"--dtype is one of {', '.join(DTYPES)}",
    "budget": "--budget is a fraction of the full cache's bytes, above 0 and at most 1, such as 0.30",
    "max_dnll": "--max-dnll is a loss in nats per token above the full cache's, above 0, such as 0.01",
    "refine": "--refine is a number of trials, at least 0",
    "bits": f"--bits are some of {', '.join(ALL_BITS)}",
    "context": "--context is a number of tokens, at least 1",
    "continuation": "--continuation is a number of tokens, at least 1",
    "trials": "--trials is a number of trials, at least 1",
    "objective": "--objective is kl or ppl",
    "replicas": "--replicas is auto or a number, at least 1",
    "seed": "--seed is a number, at least 0",
    "sampler": f"--sampler is one of {', '.join(get_args(SamplerName))}",
    "concurrent": "--concurrent is a number of trials, at least 1",
    "gpus_per_replica": "--gpus-per-replica is a number of GPUs, at least 1",
    "prefill_chunk": f"--prefill-chunk is a number of tokens above {LARGEST_INTERVAL}, the largest eviction interval",
    "memory": "--memory is a number of GiB, above 0",
}


class SearchSettings(FrozenModel):
    """The arguments of a search. `budget` is a fraction of the 16-bit full cache's bytes at `context_length` tokens.

    A search is for a `budget`, for the fewest bytes that lose at most `max_dnll`, or for a `front` of both, of which
    `budget` may choose a point. The last `refine` trials refine the best of the others, a third of all if None. `dtype`
    is the precision of `load`, by default the same on all CPUs. `warm_start` is the folder of an earlier search. A
    replica spans `gpus_per_replica` GPUs if there are any, and stores at most `memory` GiB of prefilled windows next to
    the model. `concurrent` trials run at a time.
    """

    model: str
    dtype: DType | None = None
    texts: Annotated[tuple[str, ...], Field(min_length=1)]
    budget: Annotated[float, Field(gt=0, le=1)] | None = None
    max_dnll: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    front: bool = False
    latency: bool = False
    context: PositiveInt
    continuation: PositiveInt
    trials: PositiveInt
    refine: Annotated[int, Field(ge=0)] | None = None
    bits: Annotated[tuple[BitsName, ...], Field(min_length=1)] = ALL_BITS
    objective: Objective = "kl"
    replicas: Replicas = "auto"
    seed: Annotated[int, Field(ge=0)] = 0
    sampler: SamplerName = "tpe"
    warm_start: str | None = None
    concurrent: PositiveInt | None = None
    gpus_per_replica: PositiveInt = 1
    memory: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    prefill_chunk: Annotated[int, Field(gt=LARGEST_INTERVAL)] | None = None

    @model_validator(mode="after")
    def _check_goal(self) -> "SearchSettings":
        if self.budget is None and not self.front and self.max_dnll is None:
            raise ValueError("a search needs a goal: give --budget, --max-dnll or --front")
        if self.max_dnll is not None and (self.front or self.budget is not None):
            other = "--front" if self.front else "--budget"
            raise ValueError(f"--max-dnll {self.max_dnll:g} and {other} are two goals; give one of them")
        if self.latency and not self.front:
            raise ValueError("--latency is a part of --front; give both, or leave out --latency")
        if self.refine is not None and self.refine >= self.trials:
            raise ValueError(
                f"--refine {self.refine} leaves none of {self.trials} trials to refine from; refine fewer, or give "
                "more --trials"
            )
        return self

    @property
    def goal(self) -> Goal:
        """What the search minimises."""
        return Goal.model_validate(self.model_dump(include=set(Goal.model_fields)))

    @property
    def num_refinements(self) -> int:
        """Number of trials that refine the best of the others."""
        return self.trials // 3 if self.refine is None else self.refine

    @property
    def context_length(self) -> int:
        """Tokens of one window, for which the ratio of bytes is stated."""
        return self.context + self.continuation

    @property
    def model_name(self) -> str:
        """The last part of the model's name, as a registry accepts it: `demo`, `qwen2.5-0.5b`."""
        return short_name(self.model)

    @classmethod
    def from_options(cls, *, model: str, texts: Sequence[str], **values: Any) -> Self:
        """Return checked settings, with absolute paths, so that a resumed search finds its files from any folder.

        Raises:
            UserError: an option is out of range.
        """
        try:
            if values.get("warm_start"):
                values["warm_start"] = absolute_if_file(values["warm_start"])
            return cls(model=absolute_if_file(model), texts=tuple(map(absolute_if_file, texts)), **values)
        except ValidationError as error:
            raise UserError(_validation_message(error, values)) from None


class SearchRecord(FrozenModel):
    """What a search needs to resume: its settings, what they stood for, and its MLflow parent run.

    `corpora` maps the name of each text to the digest of its content; `profile` is the digest of the model's profile on
    the calibration windows. Recorded trials compare only if both are equal.
    """

    settings: SearchSettings
    model: ModelIdentity
    corpora: dict[str, str]
    profile: str
    run: str

    def write(self, out: Path) -> None:
        """Write the record into the folder of a search."""
        atomic_write_text(out / SEARCH_FILE, self.model_dump_json(indent=1) + "\n")

    @classmethod
    def read(cls, out: Path, option: str = "--resume") -> Self:
        """Return the record of an earlier search; raise UserError if its folder has none."""
        try:
            return cls.model_validate_json((out / SEARCH_FILE).read_text())
        except (OSError, ValueError):
            raise UserError(f"{option} {out} has no valid {SEARCH_FILE}; give the --out folder of a search") from None

    def check_unchanged(self, model: ModelIdentity, profile: str, corpora: dict[str, str]) -> None:
        """Raise UserError if the model or a text has changed since."""
        changed = [name for name in self.corpora if corpora.get(name) != self.corpora[name]]
        if (model, profile) != (self.model, self.profile):
            changed.append(self.settings.model)
        if changed:
            raise UserError(
                f"{', '.join(changed)} changed since this search began, or another version of baklava began it; "
                "start a new search without --resume"
            )


def _validation_message(error: ValidationError, values: dict[str, Any]) -> str:
    first = error.errors()[0]
    if not first["loc"]:
        return str(first["ctx"]["error"])
    field = str(first["loc"][0])
    value = values.get(field, "")
    shown = " ".join(map(str, value)) if isinstance(value, list | tuple) else value
    return f"--{field.replace('_', '-')} {shown} is out of range: {_RULES.get(field, first['msg'])}"


def short_name(model: str) -> str:
    """Return the last part of a model's name or path, as a registry accepts it."""
    short = model.rstrip("/").rsplit("/", 1)[-1].lower()
    return re.sub(r"[^\w.-]+", "-", short).strip("-.") or "model"


def absolute_if_file(name: str) -> str:
    """Return an absolute path if a file of this name exists, else the name as it is."""
    path = Path(name).expanduser()
    return str(path.absolute()) if path.exists() else name
