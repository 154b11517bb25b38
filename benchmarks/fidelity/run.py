"""Run the study: score every plan on every window, row by row into a journal, so that a killed study can continue."""

import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

from baklava.allocation.plan_spec import resolve_plan
from baklava.console import log, progress_bar
from baklava.data.windows import Window
from baklava.errors import UserError
from baklava.evaluation.intervals import pluralize
from baklava.plan.budget_plan import BudgetPlan
from baklava.profiling.profile import Profile
from baklava.profiling.profiler import cached_profile
from baklava.runtime.model_loader import load
from benchmarks.fidelity.inputs import (
    BUDGETS,
    CONTROL_METHODS,
    METHODS,
    MethodPlans,
    SkippedMethod,
    Split,
    StudyMethod,
    StudyTexts,
    StudyWindows,
    make_windows,
    plan_methods,
    select_methods,
)
from benchmarks.fidelity.scoring import Row, Task, run_digest, score_in_processes, score_plans
from tuning.study.journal import Journal


@dataclass(frozen=True)
class StudyConfig:
    """What a study compares, and on which text."""

    model: str = "demo"
    split: Split = "test"
    texts: StudyTexts = field(default_factory=StudyTexts)
    methods: tuple[StudyMethod, ...] = tuple(METHODS.values())
    budgets: tuple[float, ...] = BUDGETS


def study_config(
    *,
    model: str,
    split: Split,
    windows: int | None,
    methods: Sequence[str] | None,
    budgets: Sequence[float] | None,
    context: int,
    continuation: int,
) -> StudyConfig:
    """Return the study that a command line describes; None stands for the defaults.

    Raises:
        UserError: a method is unknown, or a budget is not a share.
    """
    for budget in budgets or ():
        if not 0 < budget <= 1:
            raise UserError(f"--budgets {budget:g} is not a share above 0 and up to 1; try 0.125")
    default = StudyTexts()
    corpora = tuple((name, windows or count) for name, count in default.test_corpora)
    texts = replace(default, test_corpora=corpora, context=context, continuation=continuation)
    return StudyConfig(model, split, texts, tuple(select_methods(methods)), tuple(dict.fromkeys(budgets or BUDGETS)))


@dataclass(frozen=True)
class StudyResult:
    """The scores of a study: `rows[window, plan digest]`."""

    config: StudyConfig
    windows: Mapping[str, tuple[Window, ...]]
    plans: tuple[MethodPlans, ...]
    skipped: tuple[SkippedMethod, ...]
    rows: Mapping[tuple[str, str], Row]


@dataclass(frozen=True)
class StudyInputs:
    """What is to be scored, without a model in memory; `windows_by_run` has the digest of weights and window as key."""

    windows: StudyWindows
    windows_by_run: Mapping[str, Window]
    controls: tuple[str, ...]
    plans: tuple[MethodPlans, ...]
    skipped: tuple[SkippedMethod, ...]

    def plans_for(self, window: Window) -> tuple[MethodPlans, ...]:
        """Return the plans that are scored on a window; on a control corpus only a few methods are."""
        is_control = any(window in self.windows.scored.get(name, ()) for name in self.controls)
        return tuple(entry for entry in self.plans if not is_control or entry.method.name in CONTROL_METHODS)


def run_study(config: StudyConfig, folder: Path, workers: int = 1) -> StudyResult:
    """Score the plans and windows that the journal in `folder` does not have yet.

    Raises:
        UserError: the model or a text is unknown, texts are too short, or the journal was changed by hand.
    """
    inputs = _prepare_inputs(config)
    for skipped in inputs.skipped:
        log(f"skipped: {skipped.method} at {skipped.budget:.3g}: {skipped.reason}")
    folder.mkdir(parents=True, exist_ok=True)
    journal = Journal.open(folder / "rows.jsonl", Row.model_validate_json)
    tasks = _unscored(inputs, {row.key for row in journal.records})
    num_plans = pluralize(len(inputs.plans), "plan")
    num_windows = pluralize(len(inputs.windows_by_run), "window")
    log(f"{num_plans} on {num_windows}; {journal.path} has {pluralize(len(journal.records), 'row')}")
    if tasks:
        total = sum(len(plans) for _, plans in tasks)
        with progress_bar(total, "scoring", "plans x windows") as progress:
            for row in _score_tasks(config.model, tasks, min(workers, len(tasks))):
                journal.append(row)
                progress.set_postfix_str(row.window)
                progress.update(1)
    rows = {
        (inputs.windows_by_run[row.run].name, row.plan): row
        for row in journal.records
        if row.run in inputs.windows_by_run
    }
    return StudyResult(config, inputs.windows.scored, inputs.plans, inputs.skipped, rows)


def _prepare_inputs(config: StudyConfig) -> StudyInputs:
    loaded = load(config.model)
    windows = make_windows(config.texts, config.split, loaded.tokenizer)
    tokens = config.texts.context + config.texts.continuation

    @cache
    def profile() -> Profile:
        return cached_profile(loaded, windows.calibration)

    def make(spec: str) -> BudgetPlan:
        return resolve_plan(spec, loaded, tokens, profile).plan

    plans, skipped = plan_methods(config.methods, config.budgets, tokens, make)
    if not plans:
        raise UserError(f"no method has a plan, the first because {skipped[0].reason}")
    windows_by_run = {
        run_digest(loaded.weights_digest, window): window for corpus in windows.scored.values() for window in corpus
    }
    return StudyInputs(windows, windows_by_run, config.texts.controls, tuple(plans), tuple(skipped))


def _unscored(inputs: StudyInputs, scored: set[tuple[str, str]]) -> list[Task]:
    """Return the windows with their plans that have no row yet; equal plans are scored once."""
    tasks = []
    for run, window in inputs.windows_by_run.items():
        plans = {plan.digest: plan for entry in inputs.plans_for(window) for plan in entry.plans}
        missing = tuple(plan for digest, plan in plans.items() if (run, digest) not in scored)
        if missing:
            tasks.append((window, missing))
    return tasks


def _score_tasks(model: str, tasks: Sequence[Task], workers: int) -> Iterator[Row]:
    code = code_version()
    if workers > 1:
        yield from score_in_processes(model, tasks, workers, code)
        return
    loaded = load(model)
    for window, plans in tasks:
        yield from score_plans(loaded, window, plans, code)


def code_version() -> str:
    """Return the commit of the running code, with -dirty appended if it was changed; "unknown" outside of git."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return result.stdout.strip()
