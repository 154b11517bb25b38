"""The study: every plan on every window, row by row in a journal, so that a killed one goes on."""

import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

from baklava.allocation.plan_spec import resolve_plan
from baklava.console import log, progress_bar
from baklava.data.windows import Window
from baklava.errors import UserError
from baklava.evaluation.formatting import pluralize
from baklava.plan.budget_plan import BudgetPlan
from baklava.profiling.profile import Profile
from baklava.profiling.profiler import cached_profile
from baklava.runtime.model_loader import LoadedModel, load
from benchmarks.fidelity.inputs import Cut, Entry, LeftOut, Split, Texts, cut, entries
from benchmarks.fidelity.methods import BUDGETS, CONTESTANTS, CONTROLLED, Contestant, chosen
from benchmarks.fidelity.scoring import Row, Task, in_processes, rows, run_of
from tuning.study.journal import Journal


@dataclass(frozen=True)
class Asked:
    """What is to be studied."""

    model: str = "demo"
    split: Split = "test"
    texts: Texts = field(default_factory=Texts)
    contestants: tuple[Contestant, ...] = tuple(CONTESTANTS.values())
    budgets: tuple[float, ...] = BUDGETS


def asked(
    *,
    model: str,
    split: Split,
    windows: int | None,
    methods: Sequence[str] | None,
    budgets: Sequence[float] | None,
    context: int,
    continuation: int,
) -> Asked:
    """What a command line asks for; None stands for the defaults.

    Raises:
        UserError: an unknown contestant, or a budget that is no share.
    """
    for budget in budgets or ():
        if not 0 < budget <= 1:
            raise UserError(f"--budgets {budget:g}: a budget is a share of the bytes, above 0 and at most 1; try 0.125")
    usual = Texts()
    test = tuple((name, windows or count) for name, count in usual.test)
    texts = replace(usual, test=test, context=context, continuation=continuation)
    return Asked(model, split, texts, tuple(chosen(methods)), tuple(dict.fromkeys(budgets or BUDGETS)))


@dataclass(frozen=True)
class Study:
    """Everything that was scored: `rows[window, plan digest]`."""

    asked: Asked
    scored: Mapping[str, tuple[Window, ...]]
    entries: tuple[Entry, ...]
    left_out: tuple[LeftOut, ...]
    rows: Mapping[tuple[str, str], Row]


@dataclass(frozen=True)
class Prepared:
    """What is scored, without a model in memory: `runs` maps what stands for weights and window to the window."""

    material: Cut
    runs: Mapping[str, Window]
    controls: tuple[str, ...]
    entries: tuple[Entry, ...]
    left_out: tuple[LeftOut, ...]

    def on(self, window: Window) -> tuple[Entry, ...]:
        """The entries that are scored on a window: on those of a control few."""
        control = any(window in self.material.scored.get(name, ()) for name in self.controls)
        return tuple(entry for entry in self.entries if not control or entry.contestant.name in CONTROLLED)


def study(asked: Asked, folder: Path, workers: int = 1) -> Study:
    """Score what the journal in `folder` does not hold yet.

    Raises:
        UserError: an unknown model or text, texts too short, or a journal that was changed by hand.
    """
    prepared = _prepare(asked)
    for one in prepared.left_out:
        log(f"left out: {one.method} at {one.budget:.3g}: {one.reason}")
    folder.mkdir(parents=True, exist_ok=True)
    journal = Journal.open(folder / "rows.jsonl", Row.model_validate_json)
    tasks = _missing(prepared, {row.key for row in journal.records})
    windows = pluralize(len(prepared.runs), "window")
    log(
        f"{pluralize(len(prepared.entries), 'contestant')} on {windows}; {journal.path} holds {len(journal.records)} rows"
    )
    _run(asked.model, tasks, journal, workers)
    rows = {(prepared.runs[row.run].name, row.plan): row for row in journal.records if row.run in prepared.runs}
    return Study(asked, prepared.material.scored, prepared.entries, prepared.left_out, rows)


def _prepare(asked: Asked) -> Prepared:
    loaded = load(asked.model)
    material = cut(asked.texts, asked.split, loaded.tokenizer)
    found, left_out = _entries(asked, material, loaded)
    if not found:
        raise UserError(f"no contestant has a plan, the first because {left_out[0].reason}")
    windows = (window for each in material.scored.values() for window in each)
    runs = {run_of(loaded.weights_digest, window): window for window in windows}
    return Prepared(material, runs, asked.texts.controls, tuple(found), tuple(left_out))


def _entries(asked: Asked, material: Cut, loaded: LoadedModel) -> tuple[list[Entry], list[LeftOut]]:
    tokens = asked.texts.context + asked.texts.continuation

    @cache
    def profile() -> Profile:
        return cached_profile(loaded, material.calibration)

    def make(spec: str) -> BudgetPlan:
        return resolve_plan(spec, loaded, tokens, profile).plan

    return entries(asked.contestants, asked.budgets, tokens, make)


def _missing(prepared: Prepared, held: set[tuple[str, str]]) -> list[Task]:
    """The windows with the plans that have no row there yet; plans that do the same are scored once."""
    tasks = []
    for run, window in prepared.runs.items():
        plans = {plan.digest: plan for entry in prepared.on(window) for plan in entry.plans}
        missing = tuple(plan for digest, plan in plans.items() if (run, digest) not in held)
        tasks += [(window, missing)] if missing else []
    return tasks


def _run(model: str, tasks: Sequence[Task], journal: Journal[Row], workers: int) -> None:
    if not tasks:
        return
    with progress_bar(sum(len(plans) for _, plans in tasks), "scoring", "plans x windows") as progress:
        for row in _scored(model, tasks, min(workers, len(tasks))):
            journal.append(row)
            progress.set_postfix_str(row.window)
            progress.update(1)


def _scored(model: str, tasks: Sequence[Task], workers: int) -> Iterator[Row]:
    code = commit()
    if workers > 1:
        yield from in_processes(model, tasks, workers, code)
        return
    loaded = load(model)
    for window, plans in tasks:
        yield from rows(loaded, window, plans, code)


def commit() -> str:
    """The commit of the code that runs, with -dirty behind it where it was changed since; "unknown" outside of git."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()
