"""A warm start: the trials of an earlier search, for the sampler of a new one."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from baklava.console import log
from baklava.errors import UserError
from baklava.serialization import FrozenModel, atomic_write_text
from tuning.optimizers.samplers import in_space
from tuning.search.inputs import SearchInputs
from tuning.selection.validation import top_trials
from tuning.study.journal import Journal
from tuning.study.search_space import SearchTask
from tuning.study.settings import SearchRecord, SearchSettings
from tuning.study.trial import TRIALS_FILE, TrialRecord, finished_trials

NUM_ENQUEUED = 4
"""How many of the best earlier trials are tried again, before any other."""

WARM_START_FILE = "warm.json"


class WarmStart(FrozenModel):
    """Parameters to try first, and trials whose scores count as if they were of this search.

    It is saved with the results, so that a resumed search does not depend on the earlier one's folder.
    """

    enqueued_params: tuple[dict[str, Any], ...] = ()
    scored_trials: tuple[TrialRecord, ...] = ()

    @property
    def known_trials(self) -> tuple[TrialRecord, ...]:
        """The scored trials that are not tried again, which the sampler learns from at once."""
        return tuple(record for record in self.scored_trials if record.params not in self.enqueued_params)

    def write(self, out: Path) -> None:
        """Save it in a search's folder, unless it is empty."""
        if self.enqueued_params:
            atomic_write_text(out / WARM_START_FILE, self.model_dump_json(exclude_none=True) + "\n")

    @classmethod
    def read(cls, out: Path) -> Self:
        """Return the warm start of a search, an empty one if it had none; raise UserError for an invalid file."""
        try:
            return cls.model_validate_json((out / WARM_START_FILE).read_text())
        except FileNotFoundError:
            return cls()
        except (OSError, ValueError):
            raise UserError(
                f"{out / WARM_START_FILE} was changed since the search wrote it, or another version of baklava wrote "
                "it; restore it, or start a new search without --resume"
            ) from None


def load_warm_start(settings: SearchSettings, inputs: SearchInputs, task: SearchTask) -> WarmStart:
    """Return what the search of `settings.warm_start` offers this one; an empty warm start if there is none.

    Scores are taken over if they were measured on the same windows for plans of the same size. Otherwise only the best
    parameters are, and scored again.

    Raises:
        UserError: no search there, one of another model, or one with no trial that lies in this search space.
    """
    if settings.warm_start is None:
        return WarmStart()
    out = Path(settings.warm_start)
    record = SearchRecord.read(out, "--warm-start")
    if record.model.config_hash != inputs.identity.config_hash:
        raise UserError(
            f"--warm-start {out} searched plans for {record.settings.model}, which do not fit {settings.model}; "
            "give a search of the same model, or leave it out"
        )
    trials = _trials_in_space(Journal.read(out / TRIALS_FILE, TrialRecord.model_validate_json), task)
    if not finished_trials(trials):
        raise UserError(
            f"--warm-start {out} has no finished trial in this search space; leave it out, or search the same --bits"
        )
    reason = incompatibility(record, settings, inputs)
    reused = (
        f"the best parameters, not their scores ({reason})," if reason else f"{len(trials)} trials and their scores"
    )
    log(f"warm start: {reused} of {out}")
    best = top_trials(finished_trials(trials), record.settings.goal, NUM_ENQUEUED)
    # The best are tried again so that they can win. It costs nothing if their scores are known.
    return WarmStart(
        enqueued_params=tuple(trial.params for trial in best), scored_trials=() if reason else tuple(trials)
    )


def incompatibility(record: SearchRecord, settings: SearchSettings, inputs: SearchInputs) -> str | None:
    """Return why the scores of an earlier search do not compare with this one's; None if they do."""
    earlier = record.settings
    for option in ("context", "continuation", "seed"):
        if getattr(earlier, option) != getattr(settings, option):
            return f"its --{option} was {getattr(earlier, option)}"
    if record.corpora != inputs.corpora:
        return "its texts were different"
    if record.profile != inputs.profile.digest:
        return "its weights or calibration were different"
    if settings.latency and not earlier.latency:
        return "it did not time decoding"
    old, new = earlier.goal, settings.goal
    if old.samples_budget != new.samples_budget or (not new.samples_budget and old.budget != new.budget):
        return "it was for another size"
    return None


def _trials_in_space(records: Sequence[TrialRecord], task: SearchTask) -> list[TrialRecord]:
    """The sampled trials that this search could sample too; they get a budget if it samples budgets, or lose theirs."""
    budgets = task.space.budget_range
    in_this_space = []
    for record in records:
        params = {name: value for name, value in record.params.items() if name != "budget"}
        if budgets:
            budget = record.params.get("budget", record.metrics.get("ratio", budgets[1]))
            params["budget"] = min(budgets[1], max(budgets[0], budget))
        if not record.parent_trial and in_space(task.space, params):
            in_this_space.append(record.model_copy(update={"params": params}))
    return in_this_space
