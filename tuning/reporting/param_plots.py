"""The charts of what a search learned: which parameters decided, and how the objective went with them."""

from collections.abc import Mapping, Sequence
from typing import Any

from tuning.reporting.svg import (
    Scale,
    dot,
    group,
    leaning,
    level,
    linear,
    log_values,
    logarithmic,
    round_values,
    svg,
    text,
)
from tuning.selection.param_importance import ABSENT, comparable_trials, is_numeric
from tuning.study.objective import Goal
from tuning.study.trial import TrialRecord

WIDTH, LEFT, RIGHT, ROW = 720, 170, 60, 24
PANELS = 3
"""Parameters that are drawn value by value."""

PANEL_LEFT, PANEL_TOP, PANEL_HEIGHT, PANEL_GAP, BELOW = 46, 26, 190, 14, 74


def importance_chart(shares: Mapping[str, float]) -> str:
    """A bar per parameter, the most important first."""
    scale = linear(0, max(shares.values()), 0, WIDTH - LEFT - RIGHT)
    rows = []
    for number, (name, value) in enumerate(shares.items()):
        y, length = number * ROW, max(1.0, scale(value))
        rows.append(text(LEFT - 12, y + 15, name.replace("_", " "), "end", "name"))
        rows.append(f'<rect class="bar" x="{LEFT}" y="{y + 3}" width="{length:.1f}" height="{ROW - 8}" rx="2"/>')
        rows.append(text(LEFT + length + 8, y + 15, f"{value:.0%}"))
    return svg(WIDTH, len(shares) * ROW + 4, "importance of parameters", rows)


def slices_chart(records: Sequence[TrialRecord], goal: Goal, shares: Mapping[str, float]) -> str:
    """The objective over each of the most important parameters, a dot a trial that scored every window."""
    trials, names = comparable_trials(records), list(shares)[:PANELS]
    values = [goal.objective_value(trial.metrics) for trial in trials]
    y = logarithmic(min(values) / 1.05, max(values) * 1.05, PANEL_TOP + PANEL_HEIGHT, PANEL_TOP)
    wide = WIDTH / PANELS
    panels = [group(number * wide, 0, _panel(name, trials, goal, y, wide)) for number, name in enumerate(names)]
    return svg(WIDTH, PANEL_TOP + PANEL_HEIGHT + BELOW, "objective by parameter", panels)


def _panel(name: str, trials: Sequence[TrialRecord], goal: Goal, y: Scale, wide: float) -> list[str]:
    right, values = wide - PANEL_GAP, [goal.objective_value(trial.metrics) for trial in trials]
    marks = [level(y(mark), PANEL_LEFT, right, f"{mark:.2g}") for mark in log_values(min(values), max(values))]
    having = [trial for trial in trials if name in trial.params] if is_numeric(name, trials) else list(trials)
    across, ticks = (_range if is_numeric(name, trials) else _columns)(name, having, right)
    dots = [
        dot(
            "finished soft",
            across(trial.params.get(name, ABSENT)),
            y(goal.objective_value(trial.metrics)),
            4,
            _told(name, trial, goal),
        )
        for trial in having
    ]
    return [text(PANEL_LEFT, 14, name.replace("_", " "), kind="name"), *marks, *ticks, *dots]


def _range(name: str, trials: Sequence[TrialRecord], right: float) -> tuple[Any, list[str]]:
    values = [trial.params[name] for trial in trials]
    x, bottom = linear(min(values), max(values), PANEL_LEFT + 8, right - 8), PANEL_TOP + PANEL_HEIGHT
    marks = round_values(min(values), max(values), 4)
    return x, [text(x(mark), bottom + 18, f"{mark:.3g}", "middle") for mark in marks]


def _columns(name: str, trials: Sequence[TrialRecord], right: float) -> tuple[Any, list[str]]:
    choices = sorted({trial.params.get(name, ABSENT) for trial in trials}, key=str)
    step, bottom = (right - PANEL_LEFT) / len(choices), PANEL_TOP + PANEL_HEIGHT
    places = {choice: PANEL_LEFT + (number + 0.5) * step for number, choice in enumerate(choices)}
    return places.__getitem__, [leaning(place + 4, bottom + 14, str(choice)) for choice, place in places.items()]


def _told(name: str, trial: TrialRecord, goal: Goal) -> str:
    return f"trial {trial.trial}, {name.replace('_', ' ')} {trial.params.get(name, ABSENT)}: {goal.format_metrics(trial.metrics)}"
