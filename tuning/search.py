"""The search from settings to a registered champion."""

import logging
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ray import tune

from baklava.errors import UserError
from baklava.model import describe
from baklava.plan import BudgetPlan, Provenance
from baklava.profile import flat_profile
from baklava.progress import say
from tuning.cluster import TRIAL_CPUS, Crew, present_fleet, session
from tuning.folders import check_new
from tuning.journal import Journal
from tuning.objective import trial
from tuning.outcome import Outcome
from tuning.prepare import Material, prepare
from tuning.recorder import Recorder
from tuning.report import write_report
from tuning.searcher import Halving, PlanSearch
from tuning.settings import SearchRecord, SearchSettings
from tuning.task import Task
from tuning.tracking import Tracker
from tuning.trials import FILE, TrialRecord
from tuning.validate import Validated, candidates, heuristic_candidates, validate

NODE_FAILURES = 3
"""Times that a trial is started again because its process or node died; a plan that fails is never tried again."""

SCORES = ("kl_geometric", "kl", "dnll", "nll", "nll_full")
PACKAGES = ("baklava", "torch", "transformers", "ray", "optuna", "numpy")


@dataclass(frozen=True)
class Run:
    """A search under way: what it was asked, where it writes, and what its trials are made from."""

    settings: SearchSettings
    out: Path
    tracker: Tracker
    material: Material
    task: Task
    journal: Journal[TrialRecord]


def search(settings: SearchSettings, out: Path) -> Outcome:
    """Search for the best plan inside a budget of bytes; everything it finds goes into the folder `out`.

    Raises:
        UserError: anything a user can put right. Nothing has been written to `out` then.
    """
    check_new(out, "search")
    tracker = Tracker.connect(settings.model_name)
    check_budget(settings)
    return _run(settings, out, tracker, None)


def resume(out: Path) -> Outcome:
    """Go on with a search that was killed, from the trials that it recorded.

    Raises:
        UserError: no search there, one that ended, or one whose model or texts have changed since.
    """
    record = SearchRecord.read(out)
    if (out / "plan.json").exists():
        raise UserError(f"--resume {out} has ended, its plan is {out}/plan.json; start a new search without --resume")
    return _run(record.settings, out, Tracker.connect(record.settings.model_name), record)


def check_budget(settings: SearchSettings) -> None:
    """Raise UserError when the budget is too small for the heuristics, before any time is spent."""
    profile = flat_profile(*describe(settings.model))
    heuristic_candidates(Task(profile, settings.budget, settings.context_length, (), settings.objective))


def _run(settings: SearchSettings, out: Path, tracker: Tracker, earlier: SearchRecord | None) -> Outcome:
    material = prepare(settings)
    if earlier:
        earlier.check_same(material.identity, material.corpora)
    splits = material.splits
    searched, held_out = (tuple(window.name for window in part) for part in (splits.search, splits.validation))
    task = Task(material.profile, settings.budget, settings.context_length, searched, settings.objective)
    with session():
        crew = Crew(settings.model, present_fleet(settings.replicas), splits.search + splits.validation, task)
        crew.start()
        crew.hold(searched)
        # The first file is written only now that nothing a user can get wrong is left.
        run = Run(settings, out, tracker, material, task, _journal(settings, out, tracker, material, earlier))
        with _closing(tracker, out):
            run_trials(run, crew)
            crew.hold(held_out)
            return _finish(run, validate(crew, candidates(run.journal.records, task), held_out, task))


def _journal(
    settings: SearchSettings, out: Path, tracker: Tracker, material: Material, earlier: SearchRecord | None
) -> Journal[TrialRecord]:
    """The trials so far, in a folder that can be resumed and under a parent run."""
    if earlier:
        tracker.resume(earlier.run)
        return Journal.open(out / FILE, TrialRecord.model_validate_json)
    parent = tracker.begin(settings, out)
    out.mkdir(parents=True, exist_ok=True)
    SearchRecord(settings=settings, model=material.identity, corpora=material.corpora, run=parent).write(out)
    return Journal.open(out / FILE, TrialRecord.model_validate_json)


@contextmanager
def _closing(tracker: Tracker, out: Path) -> Iterator[None]:
    try:
        yield
    except BaseException:
        say(f"the search ended early; go on with it: python jobs/search.py --resume {out}")
        tracker.end({}, [], "KILLED")
        raise


def run_trials(run: Run, crew: Crew) -> None:
    """Run the trials that the journal still lacks.

    Earlier trials reach the searcher from the journal, not from a snapshot of Tune's: the journal is exact to the
    trial, a snapshot is always a little older.
    """
    task, known, trials = run.task, tuple(run.journal.records), run.settings.trials
    missing = trials - len(known)
    if missing <= 0:
        return
    say(f"search: {missing} trials at {task.budget:.0%} of the bytes, {len(task.windows)} windows each")
    logging.getLogger("ray.tune").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory(prefix="baklava-tune-") as folder:
        tune.Tuner(
            tune.with_resources(_trial(crew, task), {"cpu": TRIAL_CPUS}),
            tune_config=tune.TuneConfig(
                metric="objective",
                mode="min",
                search_alg=PlanSearch(tuple(task.profile.importance), task, run.settings.seed, known),
                scheduler=Halving(task, known),
                num_samples=missing,
                max_concurrent_trials=len(crew.actors) + 1,
                reuse_actors=True,
            ),
            run_config=tune.RunConfig(
                name="search",
                storage_path=folder,
                verbose=0,
                failure_config=tune.FailureConfig(max_failures=NODE_FAILURES),
                callbacks=[Recorder(run.journal, run.tracker, crew, task, trials)],
            ),
        ).fit()


def _trial(crew: Crew, task: Task) -> Callable[[dict[str, Any]], None]:
    return partial(trial, pool=crew.pool, windows=task.windows, objective=task.objective)


def _finish(run: Run, ranking: Sequence[Validated]) -> Outcome:
    records = tuple(run.journal.records)
    if not ranking:
        reason = next((record.error for record in records if record.error), "see above")
        raise UserError(f"no plan could be scored ({reason}); try another budget or model")
    winner = ranking[0]
    plan = winner.candidate.plan.model_copy(update={"provenance": _provenance(run, winner)})
    champion = run.tracker.champion(plan, _tags(run.settings, plan, winner))
    outcome = Outcome(run.out, run.settings, plan, tuple(ranking), records, champion)
    write_report(outcome, run.out / "report.html")
    # Last of all: where there is a plan.json, the search is complete.
    plan.write(run.out / "plan.json")
    validation = {f"validation_{name}": value for name, value in winner.metrics.items()}
    run.tracker.end({**validation, "ratio": plan.ratio}, [run.out / "report.html", run.out / "trials.jsonl"])
    return outcome


def _tags(settings: SearchSettings, plan: BudgetPlan, winner: Validated) -> dict[str, str]:
    numbers = {"ratio": plan.ratio, "dnll": winner.metrics["dnll"], "kl": winner.metrics["kl"]}
    names = {"model": settings.model, "budget": f"{settings.budget:g}", "winner": winner.candidate.name}
    return {**names, **{name: f"{value:.4f}" for name, value in numbers.items()}}


def _provenance(run: Run, winner: Validated) -> Provenance:
    searched = winner.candidate.trial
    scores = {"validation": winner.metrics, **({"search": searched.metrics} if searched else {})}
    return Provenance(
        profile=run.material.profile.digest,
        corpora=run.material.corpora,
        seed=run.settings.seed,
        scores={f"{where}_{name}": metrics[name] for where, metrics in scores.items() for name in SCORES},
        versions={package: version(package) for package in PACKAGES},
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )
