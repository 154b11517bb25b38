"""The plots of a search: Pareto front, baselines, history, importances and slices of the parameters.

They are drawn as SVG here, not by `optuna.visualization`, since the report is one file that loads nothing and follows
the theme of its reader.
"""

import math
from collections.abc import Mapping, Sequence
from html import escape
from itertools import accumulate
from typing import Any

from baklava.evaluation.intervals import Interval, format_share
from tuning.reporting.html import (
    Scale,
    circle,
    diamond,
    group,
    hline,
    line,
    linear_scale,
    linear_ticks,
    log_scale,
    log_ticks,
    rotated_text,
    svg,
    text,
    vline,
)
from tuning.selection.result import ABSENT, SearchResult, comparable_trials, is_numeric
from tuning.selection.validation import (
    ValidatedPlan,
    ValidationResult,
    byte_ratio,
    format_ratio,
    log_kl_ratio,
    pareto_front,
)
from tuning.study.objective import Goal
from tuning.study.trial import TrialRecord, finished_trials

WIDTH = 720
PARETO_HEIGHT, HISTORY_HEIGHT = 340, 300
LEFT, RIGHT, TOP, BOTTOM = 62, 24, 24, 44  # margins around the axes
MARGIN_RATIO = 1.06
"""Between the outermost points and the ends of a logarithmic scale."""

ONE_SIZE_RATIO = 1.2
"""Largest over smallest plan up to which the sizes count as one: capacities are rounded."""

MIN_SIZE_SPAN = 2.0
"""Ratio of the ends of the axis of bytes, so that rounding does not look like a difference in size."""

MIN_LABEL_DISTANCE = 13
MAX_ERROR_CHARACTERS = 300


def plot_pareto_front(validation: ValidationResult, trials: Sequence[TrialRecord], goal: Goal) -> str:
    """Return loss over bytes: plans on the validation windows, and all finished trials on the windows of the search.

    The line is the front of the validated plans. If all plans have one size, they are named instead.
    """
    tried = [(record, record.metrics["ratio"], goal.loss(record.metrics)) for record in finished_trials(trials)]
    sizes = [byte_ratio(entry) for entry in validation.ranking] + [size for _, size, _ in tried]
    losses = [goal.loss(entry.metrics) for entry in validation.ranking] + [loss for _, _, loss in tried]
    has_one_size = max(sizes) < ONE_SIZE_RATIO * min(sizes)
    smallest, largest = min(sizes) / MARGIN_RATIO, max(sizes) * MARGIN_RATIO
    if largest < MIN_SIZE_SPAN * smallest:
        centre = math.sqrt(smallest * largest)
        smallest, largest = centre / math.sqrt(MIN_SIZE_SPAN), centre * math.sqrt(MIN_SIZE_SPAN)
    bottom = PARETO_HEIGHT - BOTTOM
    x = log_scale(smallest, largest, LEFT, WIDTH - RIGHT)
    y = log_scale(min(losses) / MARGIN_RATIO, max(losses) * MARGIN_RATIO, bottom, TOP)

    elements = [hline(y(tick), LEFT, WIDTH - RIGHT, f"{tick:.3g}") for tick in log_ticks(min(losses), max(losses))]
    elements += [vline(x(tick), TOP, bottom, f"{100 * tick:.3g}%") for tick in log_ticks(smallest, largest)]
    elements.append(text((LEFT + WIDTH - RIGHT) / 2, PARETO_HEIGHT - 6, "share of the full cache's bytes", "middle"))
    elements.append(text(0, 12, goal.loss_name))
    for record, size, loss in tried:
        tooltip = f"trial {record.trial} on the windows of the search: {goal.format_metrics(record.metrics)}"
        elements.append(circle("tried", x(size), y(loss), 3, tooltip))
    if has_one_size:
        elements += _plan_labels(validation, x, y, goal)
    else:
        points = [
            (x(byte_ratio(entry)), y(goal.loss(entry.metrics))) for entry in pareto_front(validation.ranking, goal)
        ]
        elements.append(f'<path class="best" d="M{"L".join(f"{px:.1f},{py:.1f}" for px, py in points)}"/>')
    for entry in validation.ranking:
        if entry is not validation.winner:
            draw, css_class, radius = (diamond, "baseline", 5.5) if _is_baseline(entry) else (circle, "finished", 4.5)
            elements.append(_plan_point(draw, css_class, radius, entry, x, y, goal, entry.candidate.name))
    winner, tooltip = validation.winner, f"{validation.winner.candidate.name}, the winner"
    elements.append(_plan_point(circle, "ring", 9, winner, x, y, goal, tooltip))
    elements.append(_plan_point(circle, "finished", 5.5, winner, x, y, goal, tooltip))
    winner_x, winner_y = x(byte_ratio(winner)), y(goal.loss(winner.metrics))
    is_left = winner_x < 0.4 * WIDTH
    label = text(winner_x + (11 if is_left else -13), winner_y - 7, "the winner", "start" if is_left else "end", "name")
    return svg(WIDTH, PARETO_HEIGHT, f"{goal.loss_name} over bytes", [*elements, label])


def _plan_labels(validation: ValidationResult, x: Scale, y: Scale, goal: Goal) -> list[str]:
    """Names next to the plans, from the largest loss downwards, as far as they do not overlap."""
    labels: list[str] = []
    last_y = -math.inf
    for entry in sorted(validation.ranking, key=lambda entry: -goal.loss(entry.metrics)):
        label_y = y(goal.loss(entry.metrics))
        if entry is not validation.winner and label_y - last_y >= MIN_LABEL_DISTANCE:
            labels.append(text(x(byte_ratio(entry)) + 13, label_y + 4, entry.candidate.name))
            last_y = label_y
    return labels


def _plan_point(
    draw: Any, css_class: str, radius: float, entry: ValidatedPlan, x: Scale, y: Scale, goal: Goal, label: str
) -> str:
    size, loss = byte_ratio(entry), goal.loss(entry.metrics)
    tooltip = f"{label}: {goal.loss_name} {loss:.4g} at {format_share(size)} of the bytes"
    return str(draw(css_class, x(size), y(loss), radius, tooltip))


def _is_baseline(entry: ValidatedPlan) -> bool:
    return entry.candidate.trial is None


BASELINES_LEFT, BASELINES_TOP, ROW_HEIGHT = 292, 10, 26
MIN_KL_RATIO, MAX_KL_RATIO = 0.25, 64.0
"""Where the axis of ratios ends, however wide an interval of few documents is."""

MAX_NAME_CHARACTERS = 46


def plot_baselines(result: SearchResult) -> str:
    """Return a row per plan that did not win: its KL over the winner's on the same windows, the smallest first."""
    rows = _baseline_rows(result)
    if not rows:
        return "<p>Nothing else could be scored.</p>"
    ratios = [math.exp(end) for _, ratio, _ in rows for end in (ratio.mean, ratio.low, ratio.high) if end == end]
    low, high = max(MIN_KL_RATIO, min(0.8, *ratios)), min(MAX_KL_RATIO, max(1.5, *ratios))
    top, bottom = BASELINES_TOP, BASELINES_TOP + ROW_HEIGHT * len(rows)
    scale = log_scale(low, high, BASELINES_LEFT, WIDTH - RIGHT)

    def x(log_ratio: float) -> float:
        return scale(min(high, max(low, math.exp(log_ratio))))

    elements = [vline(scale(tick), top, bottom, f"{tick:g} ×") for tick in log_ticks(low, high) if tick != 1]
    elements.append(vline(scale(1), top, bottom, "1", "one"))
    for number, (name, ratio, is_trial) in enumerate(rows):
        row_y = top + ROW_HEIGHT * (number + 0.5)
        short = name if len(name) <= MAX_NAME_CHARACTERS else f"{name[: MAX_NAME_CHARACTERS - 1]}…"
        elements.append(text(BASELINES_LEFT - 12, row_y + 4, short, "end", "name"))
        if not math.isnan(ratio.low):
            elements.append(line(x(ratio.low), row_y, x(ratio.high), row_y, "spread"))
        draw, css_class = (circle, "finished") if is_trial else (diamond, "baseline")
        elements.append(draw(css_class, x(ratio.mean), row_y, 5, f"{name}: {format_ratio(ratio)}"))
    axis = "KL over the winner's: right of 1 the winner is better"
    elements.append(text((BASELINES_LEFT + WIDTH - RIGHT) / 2, bottom + 36, axis, "middle"))
    return svg(WIDTH, bottom + BOTTOM, "KL over the winner's, plan by plan", elements)


def _baseline_rows(result: SearchResult) -> list[tuple[str, Interval, bool]]:
    """Name, log of the KL ratio, and whether it is a trial.

    If trials sampled their sizes, only the baselines have the winner's size, and only they are shown.
    """
    winner, is_comparable = result.winner, not result.settings.goal.samples_budget
    rows = [
        (entry.candidate.name, log_kl_ratio([entry], winner), not _is_baseline(entry))
        for entry in result.ranking
        if entry is not winner and (is_comparable or _is_baseline(entry))
    ]
    names = {name for name, _, _ in rows}
    rows += [
        (ablation.name, ablation.log_kl_ratio, False) for ablation in result.ablations if ablation.name not in names
    ]
    return sorted(rows, key=lambda row: row[1].mean)


MAX_TRIAL_LABELS = 12


def plot_optimization_history(records: Sequence[TrialRecord], goal: Goal) -> str:
    """Return the objective of every trial in the order in which they ended, and the best so far as a line."""
    scored = [record for record in records if record.metrics]
    values = [goal.objective_value(record.metrics) for record in scored]
    if not values:
        return "<p>No trial could be scored.</p>"
    last, bottom = max(2, len(records)), HISTORY_HEIGHT - BOTTOM
    x = linear_scale(1, last, LEFT + 14, WIDTH - RIGHT - 14)
    y = log_scale(min(values) / MARGIN_RATIO, max(values) * MARGIN_RATIO, bottom, TOP)

    elements = [hline(y(tick), LEFT, WIDTH - RIGHT, f"{tick:.3g}") for tick in log_ticks(min(values), max(values))]
    elements.append(text((LEFT + WIDTH - RIGHT) / 2, HISTORY_HEIGHT - 6, "trial", "middle"))
    elements.append(text(0, 12, goal.value_name))
    for trial in range(1, last + 1, math.ceil(last / MAX_TRIAL_LABELS)):
        elements.append(text(x(trial), bottom + 18, str(trial), "middle"))
    complete = [] if goal.front else finished_trials(scored)  # on a front, the best is just the largest plan
    if complete:
        best = list(accumulate((goal.objective_value(record.metrics) for record in complete), min))
        path = f"M{x(complete[0].trial):.1f},{y(best[0]):.1f}"
        for record, value in zip(complete[1:], best[1:], strict=True):
            path += f"H{x(record.trial):.1f}V{y(value):.1f}"
        elements.append(f'<path class="best" d="{path}H{WIDTH - RIGHT}"/>')
    for record, value in zip(scored, values, strict=True):
        tooltip = f"trial {record.trial}, {record.status}: {goal.format_metrics(record.metrics)}"
        if record.parent_trial:
            tooltip += f", refined from trial {record.parent_trial}"
        elements.append(circle(record.status, x(record.trial), y(value), 4.5, tooltip))
    for record in records:
        if record.status == "failed":
            # An error of Ray may be pages long, with control characters that XML forbids.
            error = "".join(filter(str.isprintable, record.error or ""))[:MAX_ERROR_CHARACTERS]
            title = f"<title>{escape(f'trial {record.trial} failed: {error}')}</title>"
            elements.append(f'<text class="cross" x="{x(record.trial):.1f}" y="{TOP}">&#215;{title}</text>')
    return svg(WIDTH, HISTORY_HEIGHT, f"{goal.value_name} by trial", elements)


IMPORTANCE_LEFT, IMPORTANCE_RIGHT, BAR_HEIGHT = 170, 60, 24


def plot_param_importances(importances: Mapping[str, float]) -> str:
    """Return a bar per parameter, the most important first."""
    scale = linear_scale(0, max(importances.values()), 0, WIDTH - IMPORTANCE_LEFT - IMPORTANCE_RIGHT)
    elements = []
    for number, (name, importance) in enumerate(importances.items()):
        y, width = number * BAR_HEIGHT, max(1.0, scale(importance))
        elements.append(text(IMPORTANCE_LEFT - 12, y + 15, name.replace("_", " "), "end", "name"))
        box = f'x="{IMPORTANCE_LEFT}" y="{y + 3}" width="{width:.1f}" height="{BAR_HEIGHT - 8}" rx="2"'
        elements.append(f'<rect class="bar" {box}/>')
        elements.append(text(IMPORTANCE_LEFT + width + 8, y + 15, f"{importance:.0%}"))
    return svg(WIDTH, len(importances) * BAR_HEIGHT + 4, "importance of parameters", elements)


NUM_SLICES = 3
"""Parameters whose values are plotted, the most important ones."""

SLICE_LEFT, SLICE_TOP, SLICE_HEIGHT, SLICE_GAP, SLICE_BOTTOM = 46, 26, 190, 14, 74


def plot_slices(records: Sequence[TrialRecord], goal: Goal, importances: Mapping[str, float]) -> str:
    """Return the objective over each of the most important parameters, a point per trial that scored all windows."""
    trials = comparable_trials(records)
    values = [goal.objective_value(trial.metrics) for trial in trials]
    y = log_scale(min(values) / MARGIN_RATIO, max(values) * MARGIN_RATIO, SLICE_TOP + SLICE_HEIGHT, SLICE_TOP)
    grid = [
        hline(y(tick), SLICE_LEFT, WIDTH / NUM_SLICES - SLICE_GAP, f"{tick:.2g}")
        for tick in log_ticks(min(values), max(values))
    ]
    panels = [
        group(number * WIDTH / NUM_SLICES, 0, [*grid, *_slice(name, trials, goal, y)])
        for number, name in enumerate(list(importances)[:NUM_SLICES])
    ]
    return svg(WIDTH, SLICE_TOP + SLICE_HEIGHT + SLICE_BOTTOM, "objective by parameter", panels)


def _slice(name: str, trials: Sequence[TrialRecord], goal: Goal, y: Scale) -> list[str]:
    label = name.replace("_", " ")
    left, right, bottom = SLICE_LEFT, WIDTH / NUM_SLICES - SLICE_GAP, SLICE_TOP + SLICE_HEIGHT
    elements = [text(left, 14, label, css_class="name")]
    x: Any
    if is_numeric(name, trials):
        trials = [trial for trial in trials if name in trial.params]
        low, high = (end(trial.params[name] for trial in trials) for end in (min, max))
        x = linear_scale(low, high, left + 8, right - 8)
        elements += [text(x(tick), bottom + 18, f"{tick:.3g}", "middle") for tick in linear_ticks(low, high, 4)]
    else:
        choices = sorted({trial.params.get(name, ABSENT) for trial in trials}, key=str)
        step = (right - left) / len(choices)
        x = {choice: left + (number + 0.5) * step for number, choice in enumerate(choices)}.__getitem__
        elements += [rotated_text(x(choice) + 4, bottom + 14, str(choice)) for choice in choices]
    for trial in trials:
        value = trial.params.get(name, ABSENT)
        tooltip = f"trial {trial.trial}, {label} {value}: {goal.format_metrics(trial.metrics)}"
        elements.append(circle("finished soft", x(value), y(goal.objective_value(trial.metrics)), 4, tooltip))
    return elements
