"""The search from settings to a registered champion."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path

from baklava.allocation import Uniform
from baklava.console import log
from baklava.errors import UserError
from baklava.eviction import Streaming
from baklava.plan.budget_plan import BudgetPlan, Provenance
from baklava.profiling.profile import flat_profile
from baklava.runtime.model_loader import load_config
from tuning.optimizers.baselines import BaselineMethod
from tuning.optimizers.samplers import check_sampler
from tuning.reporting.report import pictures, write_report
from tuning.search.inputs import Material, prepare
from tuning.search.trial_loop import Phases, Recorder
from tuning.search.warm_start import Warm, warm_start
from tuning.selection.ablation import run_ablations
from tuning.selection.promotion import decide_promotion
from tuning.selection.result import SearchResult, write_front
from tuning.selection.validation import InfeasibleError, ValidatedPlan, select_winner
from tuning.study.journal import Journal, check_new_run_dir, unwritable_message
from tuning.study.search_space import BIT_PAIRS, SearchTask
from tuning.study.settings import SearchRecord, SearchSettings
from tuning.study.trial import TRIALS_FILE, TrialRecord
from tuning.tracking.run_context import inputs
from tuning.tracking.tracker import Tracker
from tuning.workers.cluster import OBJECT_STORE_BYTES, WorkerGroup, cluster_layout

SCORES = ("kl_geometric", "kl", "dnll", "nll", "nll_full")
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
PACKAGES = ("baklava", "torch", "transformers", "ray", "optuna", "numpy")


@dataclass(frozen=True)
class SearchRun:
    """A search under way: what it was asked, where it writes, and what its trials are made from."""

    settings: SearchSettings
    out: Path
    tracker: Tracker
    material: Material
    task: SearchTask
    journal: Journal[TrialRecord]


def search(settings: SearchSettings, out: Path) -> SearchResult:
    """Search for the best plan inside a budget of bytes; everything it finds goes into the folder `out`.

    Raises:
        UserError: anything a user can put right. Nothing has been written to `out` then.
    """
    check_new_run_dir(out, "search")
    check_sampler(settings.sampler, settings.front)
    tracker = Tracker.connect(settings.model_name)
    check_budget(settings)
    return _run(settings, out, tracker, None)


def resume(out: Path) -> SearchResult:
    """Go on with a search that was killed, from the trials that it recorded.

    Raises:
        UserError: no search there, one that ended, or one whose model or texts have changed since.
    """
    record = SearchRecord.read(out)
    if (out / "plan.json").exists():
        raise UserError(f"--resume {out} has ended, its plan is {out}/plan.json; start a new search without --resume")
    check_sampler(record.settings.sampler, record.settings.front)
    return _run(record.settings, out, Tracker.connect(record.settings.model_name), record)


def check_budget(settings: SearchSettings) -> None:
    """Raise UserError when the budget holds no plan in any of the bits to search, before any time is spent."""
    if settings.budget is None or settings.front:  # of a front the budget only picks a point
        return
    profile = flat_profile(*load_config(settings.model))
    narrowest = min(settings.bits, key=lambda name: sum(BIT_PAIRS[name]))
    smallest = BaselineMethod(Uniform(), Streaming(sinks=1), BIT_PAIRS[narrowest])
    smallest.plan(profile, settings.budget, settings.context_length)


def _run(settings: SearchSettings, out: Path, tracker: Tracker, earlier: SearchRecord | None) -> SearchResult:
    material = prepare(settings)
    if earlier:
        earlier.check_unchanged(material.identity, material.profile.digest, material.corpora)
    splits = material.splits
    searched, held_out = (tuple(window.name for window in part) for part in (splits.search, splits.validation))
    task = SearchTask(material.profile, settings.goal, settings.context_length, searched, settings.bits)
    warm = Warm.read(out) if earlier else warm_start(settings, material, task)
    with ray_session(object_store_bytes=OBJECT_STORE_BYTES):
        fleet = cluster_layout(settings.replicas, settings.gpus_per_replica)
        crew = WorkerGroup.of(settings.model, fleet, splits.search + splits.validation, task, settings.memory)
        crew.wait_until_ready()
        # The first file is written only now that nothing a user can get wrong is left.
        run = SearchRun(settings, out, tracker, material, task, _journal(settings, out, tracker, material, earlier, warm))
        with _closing(tracker, out):
            tracker.replay(run.journal.records, task.plan)
            recorder = Recorder(run.journal, tracker, crew, task, settings.trials)
            crew.preload_scores((*warm.scored, *run.journal.records))
            with crew.prefilling(searched, recorder.end):
                Phases(settings, task, run.journal, crew, recorder, warm).run()
            recorder.stop.check()
            crew.prefill(held_out)
            return _finish(run, crew, held_out)


def _journal(
    settings: SearchSettings,
    out: Path,
    tracker: Tracker,
    material: Material,
    earlier: SearchRecord | None,
    warm: Warm,
) -> Journal[TrialRecord]:
    """The trials so far, in a folder that can be resumed and under a parent run."""
    if earlier:
        tracker.resume(earlier, out, inputs(material.corpora, material.splits))
        return Journal.open(out / TRIALS_FILE, TrialRecord.model_validate_json)
    parent = tracker.begin(settings, out, inputs(material.corpora, material.splits))
    profile = material.profile.digest
    record = SearchRecord(
        settings=settings, model=material.identity, corpora=material.corpora, profile=profile, run=parent
    )
    try:
        out.mkdir(parents=True, exist_ok=True)
        warm.write(out)
        record.write(out)
    except OSError as error:
        tracker.end({}, [], "FAILED")
        raise UserError(unwritable_message(out, error)) from None
    return Journal.open(out / TRIALS_FILE, TrialRecord.model_validate_json)


@contextmanager
def _closing(tracker: Tracker, out: Path) -> Iterator[None]:
    try:
        yield
    except InfeasibleError:
        tracker.end({}, [], "FAILED")
        raise
    except BaseException as error:
        log(f"the search ended early; go on with it: python jobs/search.py --resume {out}")
        tracker.end({}, [], "KILLED")
        if isinstance(error, OSError) and error.errno in FULL:
            raise UserError(unwritable_message(out, error)) from None
        raise


def _finish(run: SearchRun, crew: WorkerGroup, windows: tuple[str, ...]) -> SearchResult:
    records = tuple(run.journal.records)
    verdict = select_winner(crew, records, windows, run.task)
    if verdict is None:
        reason = next((record.error for record in records if record.error), "see above")
        raise InfeasibleError(f"no plan could be scored ({reason}); try another budget or model")
    worth = run_ablations(crew, verdict, windows, run.task)
    winner, plan = verdict.winner, _signed(run, verdict.winner)
    claims = partial(decide_promotion, crew, winner=winner, windows=windows, task=run.task, corpora=run.material.corpora)
    registered = run.tracker.register(plan, _tags(run.settings, plan, winner), claims)
    outcome = SearchResult(run.out, run.settings, plan, verdict, worth, records, registered)
    _write(run, outcome)
    return outcome


def _write(run: SearchRun, outcome: SearchResult) -> None:
    out, front = run.out, outcome.validation.front
    files = [out / "report.html", out / "trials.jsonl"]
    write_report(outcome, out / "report.html")
    if front:
        plans = [outcome.plan if entry is outcome.winner else _signed(run, entry) for entry in front]
        write_front(out, front, plans, outcome.winner)
        files.append(out / "front.json")
    # Last of all: where there is a plan.json, the search is complete.
    outcome.plan.write(out / "plan.json")
    validation = {f"validation_{name}": value for name, value in outcome.winner.metrics.items()}
    learned = {f"importance/{name}": value for name, value in outcome.param_importances.items()}
    run.tracker.end({**validation, **learned, "ratio": outcome.plan.ratio}, files, texts=pictures(outcome))


def _signed(run: SearchRun, entry: ValidatedPlan) -> BudgetPlan:
    """A plan that says where it comes from."""
    return entry.candidate.plan.model_copy(update={"provenance": _provenance(run, entry)})


def _tags(settings: SearchSettings, plan: BudgetPlan, winner: ValidatedPlan) -> dict[str, str]:
    numbers = {"ratio": plan.ratio, "dnll": winner.metrics["dnll"], "kl": winner.metrics["kl"]}
    budget = plan.ratio if settings.budget is None else settings.budget
    names = {"model": settings.model, "budget": f"{budget:.4g}", "winner": winner.candidate.name}
    names |= {"goal": settings.goal.description, "texts": " ".join(settings.texts), "digest": plan.digest}
    return {**names, **{name: f"{value:.4f}" for name, value in numbers.items()}}


def _provenance(run: SearchRun, entry: ValidatedPlan) -> Provenance:
    searched = entry.candidate.trial
    scores = {"validation": entry.metrics, **({"search": searched.metrics} if searched else {})}
    return Provenance(
        profile=run.material.profile.digest,
        corpora=run.material.corpora,
        seed=run.settings.seed,
        scores={f"{where}_{name}": metrics[name] for where, metrics in scores.items() for name in SCORES},
        versions={package: version(package) for package in PACKAGES},
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )
