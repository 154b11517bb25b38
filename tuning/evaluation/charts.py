"""The charts of an evaluation's report."""

import math
from collections.abc import Callable, Sequence
from html import escape

from baklava.comparison import Evaluation
from tuning.svg import level, round_values, svg, text

WIDTH, LEFT, RIGHT, TOP = 720, 64, 24, 16
HEIGHT, BOTTOM = 340, 44
LEAST_KL = 1e-4
"""Nats per token at the foot of the scale: what rounding to 16 bits costs a plan that keeps everything."""

ROW, NAMES = 24, 190
Scale = Callable[[float], float]
COLOURS = 6
BESIDE = 7  # pixels
SAME = 0.02  # of the bytes: a rounding of capacities


def colour(number: int) -> str:
    """The class that gives a plan its colour."""
    return f"plan-{number % COLOURS}"


def quality_chart(evaluations: Sequence[Evaluation]) -> str:
    """KL over bytes, a point a plan with its interval."""
    means = [max(LEAST_KL, each.mean("kl").mean) for each in evaluations]
    top = 10 ** math.ceil(math.log10(2 * max(means)))
    widest = max(each.named.plan.bytes_per_sequence for each in evaluations) / 2**20

    def x(size: float) -> float:
        return LEFT + size / widest * 0.82 * (WIDTH - LEFT - RIGHT)

    def y(kl: float) -> float:
        share = math.log(max(kl, LEAST_KL) / LEAST_KL) / math.log(top / LEAST_KL)
        return HEIGHT - BOTTOM - min(1.0, share) * (HEIGHT - BOTTOM - TOP)

    powers = [10.0**power for power in range(round(math.log10(LEAST_KL)), round(math.log10(top)) + 1)]
    grid = [level(y(kl), LEFT, WIDTH - RIGHT, f"{kl:g}") for kl in powers]
    ticks = [text(x(size), HEIGHT - BOTTOM + 18, f"{size:g}", "middle") for size in round_values(0, widest)]
    axis = text((LEFT + WIDTH) / 2, HEIGHT - 6, "MiB per sequence", "middle")
    sizes = [each.named.plan.bytes_per_sequence for each in evaluations]
    points = [_point(number, each, x, y, sizes[:number]) for number, each in enumerate(evaluations)]
    return svg(WIDTH, HEIGHT, "KL over bytes, plan by plan", [*grid, *ticks, axis, *points])


def window_chart(evaluations: Sequence[Evaluation]) -> str:
    """The loss of every plan on every window, a row a window."""
    first = evaluations[0]
    losses = [each.values("dnll") for each in evaluations]
    low, high = min(0.0, min(map(min, losses))), max(1e-3, max(map(max, losses)))

    def x(loss: float) -> float:
        return NAMES + (loss - low) / (high - low) * (WIDTH - NAMES - RIGHT)

    bottom = TOP + ROW * len(first.scores)
    parts = [_column(loss, x, bottom) for loss in round_values(low, high)]
    for row, (score, gain) in enumerate(zip(first.scores, first.gain, strict=True)):
        y = TOP + ROW * (row + 0.5)
        parts.append(_named_row(score.window, gain, y))
        parts += [_dot(number, each, row, x, y) for number, each in enumerate(evaluations)]
    axis = text((NAMES + WIDTH) / 2, bottom + 34, "loss over the full cache, nats per token", "middle")
    return svg(WIDTH, bottom + 42, "loss over the full cache, window by window", [*parts, axis])


def legend(evaluations: Sequence[Evaluation]) -> str:
    """Which colour is which plan."""
    names = [
        f'<span class="{colour(number)}"><i class="key"></i>{escape(each.named.name)}</span>'
        for number, each in enumerate(evaluations)
    ]
    return f'<p class="note legend">{" ".join(names)}</p>'


def _point(number: int, evaluation: Evaluation, x: Scale, y: Scale, before: Sequence[int]) -> str:
    kl, size, ratio = evaluation.mean("kl"), evaluation.named.plan.bytes_per_sequence, evaluation.named.plan.ratio
    like = sum(abs(other - size) < SAME * size for other in before)
    across = x(size / 2**20) + BESIDE * like  # plans of one size stand beside each other
    told = f"{evaluation.named.name}: {ratio:.1%} of the bytes, KL {kl.mean:.4f}"
    bar = ""
    if not math.isnan(kl.low):
        told += f" [{kl.low:.4f}, {kl.high:.4f}]"
        at = f'x1="{across:.1f}" x2="{across:.1f}"'
        bar = f'<line class="series" {at} y1="{y(kl.low):.1f}" y2="{y(kl.high):.1f}"/>'
    at = f'cx="{across:.1f}" cy="{y(kl.mean):.1f}"'
    dot = f'<circle class="series" {at} r="5"><title>{escape(told)}</title></circle>'
    return f'<g class="{colour(number)}">{bar}{dot}</g>'


def _column(loss: float, x: Scale, bottom: float) -> str:
    line = f'<line class="grid" x1="{x(loss):.1f}" x2="{x(loss):.1f}" y1="{TOP}" y2="{bottom}"/>'
    return line + text(x(loss), bottom + 16, f"{loss:.3g}", "middle")


def _named_row(name: str, gain: float, y: float) -> str:
    short = name if len(name) <= 24 else f"{name[:10]}…{name[-13:]}"
    line = f'<line class="soft" x1="{NAMES}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
    return line + text(0, y + 4, f"{short} ({gain:+.2f})")


def _dot(number: int, evaluation: Evaluation, row: int, x: Scale, y: float) -> str:
    loss = evaluation.scores[row].dnll
    told = f"{evaluation.named.name} on {evaluation.scores[row].window}: {loss:+.4f}"
    circle = f'<circle class="series" cx="{x(loss):.1f}" cy="{y:.1f}" r="4.5"><title>{escape(told)}</title></circle>'
    return f'<g class="{colour(number)}">{circle}</g>'
