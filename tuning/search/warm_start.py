"""A warm start: what an earlier search found, for the sampler of a new one."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from baklava.console import log
from baklava.errors import UserError
from baklava.serialization import FrozenModel, atomic_write_text
from tuning.optimizers.samplers import in_space
from tuning.search.inputs import Material
from tuning.selection.validation import top_trials
from tuning.study.journal import Journal
from tuning.study.search_space import SearchTask
from tuning.study.settings import SearchRecord, SearchSettings
from tuning.study.trial import TRIALS_FILE, TrialRecord, finished_trials

POINTS = 4
"""The best earlier trials that are tried again, first of all."""


KEPT = "warm.json"


class Warm(FrozenModel):
    """Parameters to begin with, and trials whose scores count as if they were of this search.

    `told` are those among the `scored` that are not tried again. It is kept beside the results: whatever becomes of
    the earlier search, a resumed one goes on from the same.
    """

    points: tuple[dict[str, Any], ...] = ()
    scored: tuple[TrialRecord, ...] = ()

    @property
    def told(self) -> tuple[TrialRecord, ...]:
        """What the sampler learns at once."""
        return tuple(record for record in self.scored if record.params not in self.points)

    def write(self, out: Path) -> None:
        """Keep it in a search's folder, if there is anything to keep."""
        if self.points:
            atomic_write_text(out / KEPT, self.model_dump_json(exclude_none=True) + "\n")

    @classmethod
    def read(cls, out: Path) -> Self:
        """What a search began with, nothing where it began with nothing; raises UserError for a file of other kinds."""
        try:
            return cls.model_validate_json((out / KEPT).read_text())
        except FileNotFoundError:
            return cls()
        except (OSError, ValueError):
            raise UserError(f"{out / KEPT} is not what the search wrote there; put that back") from None


def warm_start(settings: SearchSettings, material: Material, task: SearchTask) -> Warm:
    """What the search asks to start from, nothing where it asks for nothing.

    Scores are taken over where they were measured on the same windows for plans of the same size; else only the best
    parameters are, to be scored anew.

    Raises:
        UserError: no search there, one of another model, or one with no trial that this space holds.
    """
    if settings.warm_start is None:
        return Warm()
    out = Path(settings.warm_start)
    record = SearchRecord.read(out, "--warm-start")
    if record.model.config_hash != material.identity.config_hash:
        raise UserError(
            f"--warm-start {out} searched plans for {record.settings.model}, which are none for {settings.model}; "
            "give a search of the same model, or leave it out"
        )
    trials = _fitting(Journal.read(out / TRIALS_FILE, TrialRecord.model_validate_json), task)
    if not finished_trials(trials):
        raise UserError(
            f"--warm-start {out} has no finished trial that this search could draw; leave it out, or search the same "
            "--bits"
        )
    reason = differs(record, settings, material)
    log(f"warm start: {_taken(reason, len(trials))} of {out}")
    best = tuple(each.params for each in top_trials(finished_trials(trials), record.settings.goal, POINTS))
    # The best are tried again, which costs nothing where their scores are known, so that they can win.
    return Warm(points=best, scored=() if reason else tuple(trials))


def differs(record: SearchRecord, settings: SearchSettings, material: Material) -> str | None:
    """Why the scores of an earlier search do not compare with this one's; None where they do."""
    earlier = record.settings
    for option in ("context", "continuation", "seed"):
        if getattr(earlier, option) != getattr(settings, option):
            return f"its --{option} was {getattr(earlier, option)}"
    if record.corpora != material.corpora:
        return "its texts were others"
    if record.profile != material.profile.digest:
        return "its weights or calibration were others"
    if settings.latency and not earlier.latency:
        return "it timed no decoding"
    goals = earlier.goal, settings.goal
    if goals[0].samples_budget != goals[1].samples_budget or (
        not goals[1].samples_budget and goals[0].budget != goals[1].budget
    ):
        return "it was for another size"
    return None


def _taken(reason: str | None, trials: int) -> str:
    return f"the best parameters, not their scores ({reason})," if reason else f"{trials} trials and their scores"


def _fitting(records: Sequence[TrialRecord], task: SearchTask) -> list[TrialRecord]:
    """The drawn trials that this search could have drawn, with a size where it draws one and without where not."""
    sizes = task.space.sizes
    fitting = []
    for record in records:
        params = {name: value for name, value in record.params.items() if name != "budget"}
        if sizes:
            size = record.params.get("budget", record.metrics.get("ratio", sizes[1]))
            params["budget"] = min(sizes[1], max(sizes[0], size))
        if not record.parent_trial and in_space(task.space, params):
            fitting.append(record.model_copy(update={"params": params}))
    return fitting
