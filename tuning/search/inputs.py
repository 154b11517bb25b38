"""What a search starts from: token windows, split by document, the model's profile, and trials of an earlier search."""

import gc
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch

from baklava.console import log
from baklava.data.documents import documents_digest, load_documents
from baklava.data.windows import Splits, make_splits
from baklava.errors import UserError
from baklava.plan.geometry import CacheGeometry, ModelIdentity
from baklava.profiling.profile import Profile
from baklava.profiling.profiler import cached_profile
from baklava.runtime.model_loader import load
from baklava.serialization import FrozenModel, atomic_write_text
from tuning.optimizers.optuna_search import in_space
from tuning.selection.validation import top_trials
from tuning.study.journal import Journal
from tuning.study.search_space import SearchTask
from tuning.study.settings import SearchRecord, SearchSettings
from tuning.study.trial import TRIALS_FILE, TrialRecord, finished_trials

WINDOWS_PER_SPLIT = 4
"""Windows that trials are scored on, and as many for validation: documents differ more than plans do."""


@dataclass(frozen=True)
class SearchInputs:
    """Everything that trials are made from. `corpora` maps the name of each text to its digest."""

    identity: ModelIdentity
    geometry: CacheGeometry
    splits: Splits
    profile: Profile
    corpora: dict[str, str]
    weights_digest: str


def prepare_inputs(settings: SearchSettings) -> SearchInputs:
    """Load the texts and the model, cut windows, and profile the model.

    The model is freed again, since every worker loads its own copy.

    Raises:
        UserError: an unknown model or text, or texts too short for the windows.
    """
    log(f"texts: loading {', '.join(settings.texts)}")
    texts = {name: load_documents([name]) for name in settings.texts}
    log(f"model: loading {settings.model}")
    loaded = load(settings.model, device_map_auto=settings.gpus_per_replica > 1)
    splits = make_splits(
        [document for documents in texts.values() for document in documents],
        loaded.tokenizer,
        context=settings.context,
        continuation=settings.continuation,
        seed=settings.seed,
        search=WINDOWS_PER_SPLIT,
        validation=WINDOWS_PER_SPLIT,
    )
    for window in splits.calibration + splits.search + splits.validation:
        loaded.check_tokens(window.ids)
    inputs = SearchInputs(
        identity=loaded.identity,
        geometry=loaded.geometry,
        splits=splits,
        profile=cached_profile(loaded, splits.calibration),
        corpora={name: documents_digest(documents) for name, documents in texts.items()},
        weights_digest=loaded.weights_digest,
    )
    del loaded
    gc.collect()
    torch.cuda.empty_cache()
    return inputs


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
