"""The figures on a terminal."""

import math
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path

from baklava.evaluation.bootstrap import Interval
from baklava.evaluation.formatting import bounds, counted, mebibytes, percent, with_bounds
from baklava.evaluation.results import Evaluation, TaskScore
from baklava.evaluation.summary import verdict
from tuning.evaluation.run_dir import EvaluationSettings
from tuning.reporting.report import filled, pairs, steps, write_page
from tuning.reporting.svg import level, round_values, svg, text


def tables(evaluations: Sequence[Evaluation]) -> str:
    """Aligned tables: the plans, and what they answered."""
    parts = [_aligned(["plan", *HEADS], [[each.named.name, *_cells(each)] for each in evaluations])]
    if tasks := evaluations[0].tasks:
        names = [each.named.name for each in evaluations]
        rows = [_row(task, [each.tasks[task] for each in evaluations]) for task in tasks]
        parts.append(_aligned(["score", "n", "chance", "no context", "full cache", *names], rows))
        rows = [_row(task, [each.tasks[task] for each in evaluations], nll=True) for task in tasks]
        parts.append(_aligned(["answer NLL", "n", "", "no context", "full cache", *names], rows))
    return "\n\n".join(parts)


HEADS = ("bytes", "held", "prefill peak", "dNLL (nats/token)", "KL (nats/token)", "prefill", "decode")


def _cells(evaluation: Evaluation) -> list[str]:
    plan, speed = evaluation.named.plan, evaluation.speed
    quality = [with_bounds(evaluation.mean(metric), ".4f") for metric in ("dnll", "kl")]
    peak = "-" if speed is None or speed.peak_bytes is None else mebibytes(speed.peak_bytes)
    times = [f"{ratio:.2f} x" for ratio in (speed.prefill_ratio, speed.decode_ratio)] if speed else ["-", "-"]
    return [f"{plan.ratio:.1%}", mebibytes(evaluation.allocated_bytes), peak, *quality, *times]


def _row(task: str, scores: Sequence[TaskScore], *, nll: bool = False) -> list[str]:
    read: Callable[[TaskScore], float] = (lambda score: score.nll) if nll else (lambda score: score.exact)
    first = scores[0]
    before = (first.closed_book_nll, first.full_nll) if nll else (first.closed_book_exact, first.full_exact)
    chance = "" if nll else f"{first.chance:.2f}"
    return [task, str(first.questions), chance, *(f"{value:.2f}" for value in (*before, *map(read, scores)))]


def _aligned(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    return "\n".join(_line(row, widths) for row in (head, *rows))


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    first, *rest = zip(cells, widths, strict=True)
    return "  ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in rest)])


WIDTH, LEFT, RIGHT, TOP = 720, 64, 24, 16
HEIGHT, BOTTOM = 340, 44
MIN_KL = 1e-4
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
    means = [max(MIN_KL, each.mean("kl").mean) for each in evaluations]
    top = 10 ** math.ceil(math.log10(2 * max(means)))
    widest = max(each.named.plan.bytes_per_sequence for each in evaluations) / 2**20

    def x(size: float) -> float:
        return LEFT + size / widest * 0.82 * (WIDTH - LEFT - RIGHT)

    def y(kl: float) -> float:
        share = math.log(max(kl, MIN_KL) / MIN_KL) / math.log(top / MIN_KL)
        return HEIGHT - BOTTOM - min(1.0, share) * (HEIGHT - BOTTOM - TOP)

    powers = [10.0**power for power in range(round(math.log10(MIN_KL)), round(math.log10(top)) + 1)]
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


def write_report(evaluations: Sequence[Evaluation], settings: EvaluationSettings, path: Path) -> None:
    """Write the report of these plans."""
    told = verdict(evaluations, settings.texts)
    fields = {
        "title": escape(f"{counted(len(evaluations), 'plan')} for {settings.model_name}"),
        "lead": escape(told[0]),
        "verdict": "".join(f"<li>{escape(sentence)}</li>" for sentence in told[1:]),
        "quality": quality_chart(evaluations) + legend(evaluations),
        "plans": "".join(_plan(number, each) for number, each in enumerate(evaluations)),
        "tasks": _tasks(evaluations) if evaluations[0].tasks else "",
        "speed": _speed(evaluations) if evaluations[0].speed else "",
        "windows": window_chart(evaluations) + legend(evaluations),
        "settings": pairs({name: _plain(value) for name, value in settings.model_dump().items()}),
        "steps": steps(_next(evaluations, settings)),
    }
    write_page(path, "evaluation.html", fields)


def _next(evaluations: Sequence[Evaluation], settings: EvaluationSettings) -> dict[str, str]:
    files = [each.named.name for each in evaluations if each.named.name.endswith(".json")]
    found = {"search a better plan": f"python jobs/search.py --model {settings.model} --texts your-text/ --budget 0.3"}
    if files:
        found["serve one"] = f"python jobs/serve.py --plan {files[0]} --model {settings.model}"
    return found | {"compare evaluations": "make ui"}


def _plan(number: int, evaluation: Evaluation) -> str:
    plan, speed = evaluation.named.plan, evaluation.speed
    peak = mebibytes(speed.peak_bytes) if speed and speed.peak_bytes is not None else "–"
    sizes = [f"{plan.ratio:.1%}", mebibytes(plan.bytes_per_sequence), mebibytes(evaluation.allocated_bytes), peak]
    dnll, kl = evaluation.mean("dnll"), evaluation.mean("kl")
    quality = [_with_small(percent(dnll)), _with_bounds(dnll), _with_bounds(kl)]
    return f"<tr>{_head(number, evaluation)}{''.join(f'<td>{cell}</td>' for cell in (*sizes, *quality))}</tr>"


def _tasks(evaluations: Sequence[Evaluation]) -> str:
    names = "".join(f"<th>{escape(each.named.name)}</th>" for each in evaluations)
    head = f"<th>task</th><th>n</th><th>chance</th><th>no context</th><th>full cache</th>{names}"
    rows = "".join(_task(task, [each.tasks[task] for each in evaluations]) for task in evaluations[0].tasks)
    nlls = "".join(_nll(task, [each.tasks[task] for each in evaluations]) for task in evaluations[0].tasks)
    plain = head.replace("<th>chance</th>", "")
    return filled("evaluation_tasks.html", {"head": head, "exact": rows, "plain": plain, "nll": nlls})


def _task(task: str, scores: Sequence[TaskScore]) -> str:
    first = scores[0]
    before = "".join(_heat(share) for share in (first.closed_book_exact, first.full_exact))
    after = "".join(_heat(score.exact, bounds(score.loss, ".2f")) for score in scores)
    name = escape(task.replace("_", " "))
    if first.metric != "exact":
        name += f" <small>{escape(first.metric.replace('_', ' '))}</small>"
    return f"<tr><th>{name}</th><td>{first.questions}</td><td>{first.chance:.2f}</td>{before}{after}</tr>"


def _nll(task: str, scores: Sequence[TaskScore]) -> str:
    first = scores[0]
    values = [first.closed_book_nll, first.full_nll, *(score.nll for score in scores)]
    cells = "".join(f"<td>{value:.2f}</td>" for value in values)
    return f"<tr><th>{escape(task.replace('_', ' '))}</th><td>{first.questions}</td>{cells}</tr>"


def _heat(share: float, bounds: str = "") -> str:
    told = f' title="loss against the full cache, 95 % {escape(bounds)}"' if bounds else ""
    return f'<td class="heat" style="--share: {share:.3f}"{told}>{share:.2f}</td>'


def _speed(evaluations: Sequence[Evaluation]) -> str:
    rows = []
    for number, each in enumerate(evaluations):
        if speed := each.speed:
            cells = [
                f"{speed.prefill_seconds:.2f} s",
                f"{speed.prefill_ratio:.2f} ×",
                f"{speed.decode_milliseconds:.1f} ms",
                f"{speed.decode_ratio:.2f} ×",
            ]
            rows.append(f"<tr>{_head(number, each)}{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    context = evaluations[0].speed.context if evaluations[0].speed else 0
    return filled("evaluation_speed.html", {"rows": "".join(rows), "context": f"{context:,}"})


def _head(number: int, evaluation: Evaluation) -> str:
    return f'<th class="{colour(number)}"><i class="key"></i>{escape(evaluation.named.name)}</th>'


def _with_bounds(found: Interval) -> str:
    inside = bounds(found, ".4f")
    return f"{found.mean + 0.0:.4f}" + (f"<br><small>{inside}</small>" if inside else "")


def _with_small(told: str) -> str:
    """A value with its bounds below it."""
    value, _, bounds = told.partition(" [")
    return escape(value) + (f"<br><small>[{escape(bounds)}</small>" if bounds else "")


def _plain(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
