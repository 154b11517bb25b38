"""A search from its settings to a registered plan."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path

from baklava.allocation import Uniform
from baklava.console import log, shell_command
from baklava.errors import UserError
from baklava.eviction import StreamingLLM
from baklava.paths import UNWRITABLE_ERRORS
from baklava.plan.budget_plan import BudgetPlan, PrefillConfig, Provenance
from baklava.profiling.profile import uniform_profile
from baklava.runtime.model_loader import load_config
from baklava.runtime.precision import resolve_dtype
from baklava.runtime.ray_session import ray_session
from tuning.optimizers.baselines import BaselineMethod
from tuning.optimizers.optuna_search import check_sampler
from tuning.reporting.report import standalone_plots, write_report
from tuning.search.inputs import SearchInputs, prepare_inputs
from tuning.search.trial_loop import TrialLoop, TrialRecorder, WarmStart, load_warm_start
from tuning.selection.promotion import decide_promotion
from tuning.selection.result import SearchResult, write_front
from tuning.selection.validation import InfeasibleError, ValidatedPlan, run_ablations, select_winner
from tuning.study.journal import Journal, check_new_run_dir, unwritable_message
from tuning.study.search_space import BIT_PAIRS, SearchTask
from tuning.study.settings import SearchRecord, SearchSettings
from tuning.study.trial import TRIALS_FILE, TrialRecord
from tuning.tracking.tracker import Tracker, dataset_inputs
from tuning.workers.cluster import OBJECT_STORE_BYTES, WorkerGroup, cluster_layout

PROVENANCE_METRICS = ("kl_geometric", "kl", "dnll", "nll", "nll_full")
PROVENANCE_PACKAGES = ("baklava", "torch", "transformers", "ray", "optuna", "numpy")


@dataclass(frozen=True)
class SearchRun:
    """A running search: its settings, the folder that it writes to, and what its trials are made from."""

    settings: SearchSettings
    out: Path
    tracker: Tracker
    inputs: SearchInputs
    task: SearchTask
    journal: Journal[TrialRecord]


def search(settings: SearchSettings, out: Path) -> SearchResult:
    """Search for the best plan; write everything into the new folder `out`.

    Raises:
        UserError: anything that a user can correct; nothing has been written to `out` then.
    """
    check_new_run_dir(out, "search")
    check_sampler(settings.sampler, settings.front)
    check_budget(settings)
    settings = settings.model_copy(update={"dtype": resolve_dtype(settings.dtype)})
    return _run(settings, out, Tracker.connect(settings.model_name), None)


def resume(out: Path) -> SearchResult:
    """Continue a search that was killed, from the trials that it recorded.

    Raises:
        UserError: no search there, one that ended, or one whose model or texts have changed since.
    """
    record = SearchRecord.read(out)
    if (out / "plan.json").exists():
        raise UserError(f"--resume {out} has ended, its plan is {out}/plan.json; start a new search without --resume")
    check_sampler(record.settings.sampler, record.settings.front)
    return _run(record.settings, out, Tracker.connect(record.settings.model_name), record)


def check_budget(settings: SearchSettings) -> None:
    """Raise UserError if there is no such model, or if the budget is too small for any plan in any of the bits."""
    config = load_config(settings.model)
    if settings.budget is None or settings.front:  # on a front the budget only chooses a point
        return
    profile = uniform_profile(*config)
    narrowest = min(settings.bits, key=lambda name: sum(BIT_PAIRS[name]))
    smallest = BaselineMethod(Uniform(), StreamingLLM(sinks=1), BIT_PAIRS[narrowest])
    smallest.plan(profile, settings.budget, settings.context_length)


def _run(settings: SearchSettings, out: Path, tracker: Tracker, earlier: SearchRecord | None) -> SearchResult:
    inputs = prepare_inputs(settings)
    if earlier:
        earlier.check_unchanged(inputs.identity, inputs.profile.digest, inputs.corpora)
    splits = inputs.splits
    search_windows, validation_windows = (
        tuple(window.name for window in windows) for windows in (splits.search, splits.validation)
    )
    prefill = PrefillConfig.in_chunks(settings.prefill_chunk)
    task = SearchTask(inputs.profile, settings.goal, settings.context_length, search_windows, settings.bits, prefill)
    warm_start = WarmStart.read(out) if earlier else load_warm_start(settings, inputs, task)
    with ray_session(object_store_bytes=OBJECT_STORE_BYTES):
        layout = cluster_layout(settings.replicas, settings.gpus_per_replica)
        windows = splits.search + splits.validation
        with WorkerGroup.for_search(
            settings.model, layout, windows, task, settings.memory, settings.dtype, inputs.weights_digest
        ) as group:
            group.wait_until_ready()
            # The first file is written only here, after everything that a user can get wrong.
            journal = _open_journal(settings, out, tracker, inputs, earlier, warm_start)
            run = SearchRun(settings, out, tracker, inputs, task, journal)
            with _tracked(tracker, out):
                tracker.replay(journal.records, task.plan)
                recorder = TrialRecorder(journal, tracker, group, task, settings.trials)
                group.preload_scores((*warm_start.scored_trials, *journal.records))
                with group.prefilling(search_windows, recorder.abort):
                    TrialLoop(settings, task, journal, group, recorder, warm_start).run()
                recorder.stop.raise_if_requested()
                group.prefill(validation_windows)
                return _finish(run, group, validation_windows)


def _open_journal(
    settings: SearchSettings,
    out: Path,
    tracker: Tracker,
    inputs: SearchInputs,
    earlier: SearchRecord | None,
    warm_start: WarmStart,
) -> Journal[TrialRecord]:
    """Start or resume the run in MLflow, make the folder one that can be resumed, and open its journal."""
    datasets = dataset_inputs(inputs.corpora, inputs.splits)
    if earlier:
        tracker.resume(earlier, out, datasets)
    else:
        record = SearchRecord(
            settings=settings,
            model=inputs.identity,
            corpora=inputs.corpora,
            profile=inputs.profile.digest,
            run=tracker.start(settings, out, datasets),
        )
        try:
            out.mkdir(parents=True, exist_ok=True)
            warm_start.write(out)
            record.write(out)
        except OSError as error:
            tracker.end({}, [], "FAILED")
            raise UserError(unwritable_message(out, error)) from None
    return Journal.open(out / TRIALS_FILE, TrialRecord.model_validate_json)


@contextmanager
def _tracked(tracker: Tracker, out: Path) -> Iterator[None]:
    """End the run in MLflow if the search fails or is interrupted inside the block."""
    try:
        yield
    except InfeasibleError:
        tracker.end({}, [], "FAILED")
        raise
    except BaseException as error:
        command = f"{shell_command('baklava-search')} --resume {out}"
        log(f"the search ended early; resume it with: {command}")
        tracker.end({}, [], "KILLED")
        if isinstance(error, OSError) and error.errno in UNWRITABLE_ERRORS:
            raise UserError(unwritable_message(out, error)) from None
        raise


def _finish(run: SearchRun, group: WorkerGroup, windows: tuple[str, ...]) -> SearchResult:
    """Choose the winner on the validation windows, register it, and write the report and the plan."""
    trials = tuple(run.journal.records)
    validation = select_winner(group, trials, windows, run.task)
    if validation is None:
        reason = next((record.error for record in trials if record.error), "see above")
        raise InfeasibleError(f"no plan could be scored ({reason}); try another budget or model")
    winner = validation.winner
    ablations = run_ablations(group, validation, windows, run.task)
    plan = _with_provenance(run, winner)
    decide = partial(decide_promotion, group, winner=winner, windows=windows, task=run.task, corpora=run.inputs.corpora)
    registered = run.tracker.register(plan, _version_tags(run.settings, plan, winner), decide)
    result = SearchResult(run.out, run.settings, plan, validation, ablations, trials, registered)
    _write(run, result)
    return result


def _write(run: SearchRun, result: SearchResult) -> None:
    out, front = run.out, result.validation.front
    files = [out / "report.html", out / TRIALS_FILE]
    write_report(result, out / "report.html")
    if front:
        plans = [result.plan if entry is result.winner else _with_provenance(run, entry) for entry in front]
        write_front(out, front, plans, result.winner)
        files.append(out / "front.json")
    # Written last: a folder with a plan.json is a complete search.
    result.plan.write(out / "plan.json")
    metrics = {f"validation_{name}": value for name, value in result.winner.metrics.items()}
    metrics |= {f"importance/{name}": value for name, value in result.param_importances.items()}
    run.tracker.end({**metrics, "ratio": result.plan.ratio}, files, texts=standalone_plots(result))


def _version_tags(settings: SearchSettings, plan: BudgetPlan, winner: ValidatedPlan) -> dict[str, str]:
    """Tags of the plan's version in the model registry."""
    budget = plan.ratio if settings.budget is None else settings.budget
    return {
        "model": settings.model,
        "budget": f"{budget:.4g}",
        "winner": winner.candidate.name,
        "goal": settings.goal.description,
        "texts": " ".join(settings.texts),
        "digest": plan.digest,
        "ratio": f"{plan.ratio:.4f}",
        "dnll": f"{winner.metrics['dnll']:.4f}",
        "kl": f"{winner.metrics['kl']:.4f}",
    }


def _with_provenance(run: SearchRun, entry: ValidatedPlan) -> BudgetPlan:
    """The plan of a candidate, with the record of how it was made."""
    trial = entry.candidate.trial
    metrics_of = {"validation": entry.metrics, **({"search": trial.metrics} if trial else {})}
    provenance = Provenance(
        profile=run.inputs.profile.digest,
        corpora=run.inputs.corpora,
        seed=run.settings.seed,
        scores={
            f"{split}_{name}": metrics[name] for split, metrics in metrics_of.items() for name in PROVENANCE_METRICS
        },
        versions={package: version(package) for package in PROVENANCE_PACKAGES},
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        dtype=run.inputs.dtype,
    )
    return entry.candidate.plan.model_copy(update={"provenance": provenance})
