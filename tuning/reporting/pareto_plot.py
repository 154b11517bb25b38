"""The chart of fidelity against bytes: what every plan holds and loses, both in logarithms."""

import math
from collections.abc import Sequence

from baklava.evaluation.formatting import share
from tuning.reporting.svg import Scale, diamond, dot, level, log_values, logarithmic, svg, text, upright
from tuning.selection.validation import ValidatedPlan, ValidationResult, byte_ratio, pareto_front
from tuning.study.objective import Goal
from tuning.study.trial import TrialRecord, finished_trials

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 720, 340, 62, 24, 24, 44
MARGIN = 1.06
"""Room around the points, as a ratio."""

SAME = 1.2
"""Ratio of the ends of the scale up to which all plans count as of one size, and stand above each other."""

NAME_HEIGHT = 13


def fidelity_chart(verdict: ValidationResult, trials: Sequence[TrialRecord], goal: Goal) -> str:
    """Loss over bytes: plans on validation windows with their front as a line, and behind them all finished trials."""
    behind = [(record.metrics["ratio"], goal.loss(record.metrics)) for record in finished_trials(trials)]
    sizes, losses = zip(*[_place(entry, goal) for entry in verdict.ranking], *behind, strict=True)
    least, most = min(sizes) / MARGIN, max(sizes) * MARGIN
    x = logarithmic(least, most, LEFT, WIDTH - RIGHT)
    y = logarithmic(min(losses) / MARGIN, max(losses) * MARGIN, HEIGHT - BOTTOM, TOP)
    grid = [level(y(mark), LEFT, WIDTH - RIGHT, f"{mark:.3g}") for mark in log_values(min(losses), max(losses))]
    grid += [upright(x(mark), TOP, HEIGHT - BOTTOM, f"{100 * mark:.3g}%") for mark in log_values(least, most)]
    axis = text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, "share of the full cache's bytes", "middle")
    dots = [
        dot(
            "tried",
            x(size),
            y(loss),
            3,
            f"trial {record.trial} on the windows of the search: {goal.format_metrics(record.metrics)}",
        )
        for record, (size, loss) in zip(finished_trials(trials), behind, strict=True)
    ]
    points = [_point(entry, x, y, goal) for entry in verdict.ranking if entry is not verdict.winner]
    told = _names(verdict, x, y, goal) if most < SAME * least else [_line(verdict, x, y, goal)]
    drawn = [*grid, axis, text(0, 12, goal.loss_name), *dots, *told, *points]
    return svg(WIDTH, HEIGHT, f"{goal.loss_name} over bytes", [*drawn, _winner(verdict.winner, x, y, goal)])


def _names(verdict: ValidationResult, x: Scale, y: Scale, goal: Goal) -> list[str]:
    """Names beside plans that stand above each other, as far as there is room: those that lose most first."""
    named, taken = [], -math.inf
    for entry in sorted(verdict.ranking, key=lambda entry: -goal.loss(entry.metrics)):
        size, loss = _place(entry, goal)
        if entry is not verdict.winner and y(loss) - taken >= NAME_HEIGHT:
            named.append(text(x(size) + 13, y(loss) + 4, entry.candidate.name))
            taken = y(loss)
    return named


def _place(entry: ValidatedPlan, goal: Goal) -> tuple[float, float]:
    return byte_ratio(entry), goal.loss(entry.metrics)


def _line(verdict: ValidationResult, x: Scale, y: Scale, goal: Goal) -> str:
    places = [_place(entry, goal) for entry in pareto_front(verdict.ranking, goal)]
    return f'<path class="best" d="M{"L".join(f"{x(size):.1f},{y(loss):.1f}" for size, loss in places)}"/>'


def _point(entry: ValidatedPlan, x: Scale, y: Scale, goal: Goal) -> str:
    size, loss = _place(entry, goal)
    told = f"{entry.candidate.name}: {goal.loss_name} {loss:.4g} at {share(size)} of the bytes"
    if entry.candidate.trial is None:
        return diamond("heuristic", x(size), y(loss), 5.5, told)
    return dot("finished", x(size), y(loss), 4.5, told)


def _winner(entry: ValidatedPlan, x: Scale, y: Scale, goal: Goal) -> str:
    size, loss = _place(entry, goal)
    told = f"{entry.candidate.name}, the winner: {goal.loss_name} {loss:.4g} at {share(size)} of the bytes"
    ahead = x(size) < 0.4 * WIDTH
    name = text(x(size) + (11 if ahead else -13), y(loss) - 7, "the winner", "start" if ahead else "end", "name")
    return dot("ring", x(size), y(loss), 9, told) + dot("finished", x(size), y(loss), 5.5, told) + name
