"""The report of an evaluation: aligned tables for a terminal, and an HTML page with plots."""

import math
from collections.abc import Sequence
from html import escape
from pathlib import Path

from baklava.console import shell_command
from baklava.evaluation.intervals import (
    format_bounds,
    format_interval,
    format_mebibytes,
    format_perplexity_change,
    pluralize,
)
from baklava.evaluation.results import Evaluation, TaskScore, summarize
from tuning.evaluation.run_dir import EvaluationSettings
from tuning.reporting.html import (
    circle,
    commands_html,
    definitions_html,
    fill_template,
    hline,
    line,
    linear_scale,
    linear_ticks,
    log_scale,
    svg,
    text,
    vline,
    write_page,
)

PLAN_COLUMNS = ("bytes", "allocated", "prefill peak", "dNLL (nats/token)", "KL (nats/token)", "prefill", "decode")


def format_tables(evaluations: Sequence[Evaluation]) -> str:
    """Return aligned tables: the plans, and their scores on the tasks."""
    rows = []
    for evaluation in evaluations:
        speed = evaluation.speed
        rows.append(
            [
                evaluation.name,
                f"{evaluation.plan.ratio:.1%}",
                format_mebibytes(evaluation.allocated_bytes),
                format_mebibytes(speed.peak_bytes) if speed and speed.peak_bytes is not None else "-",
                *(format_interval(evaluation.mean(metric), ".4f") for metric in ("dnll", "kl")),
                *((f"{speed.prefill_ratio:.2f} x", f"{speed.decode_ratio:.2f} x") if speed else ("-", "-")),
            ]
        )
    tables = [_aligned(["plan", *PLAN_COLUMNS], rows)]
    tasks, names = evaluations[0].tasks, [evaluation.name for evaluation in evaluations]
    if tasks:
        scores_of = {task: [evaluation.tasks[task] for evaluation in evaluations] for task in tasks}
        rows = []
        nll_rows = []
        for task, scores in scores_of.items():
            first, questions = scores[0], str(scores[0].questions)
            values = (first.chance, first.closed_book_score, first.full_score, *(score.score for score in scores))
            rows.append([task, questions, *(f"{value:.2f}" for value in values)])
            values = (first.closed_book_nll, first.full_nll, *(score.nll for score in scores))
            nll_rows.append([task, questions, *(f"{value:.2f}" for value in values)])
        tables.append(_aligned(["score", "n", "chance", "no context", "full cache", *names], rows))
        tables.append(_aligned(["answer NLL", "n", "no context", "full cache", *names], nll_rows))
    return "\n\n".join(tables)


def _aligned(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = []
    for row in (head, *rows):
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append("  ".join([row[0].ljust(widths[0]), *cells[1:]]))
    return "\n".join(lines)


WIDTH, LEFT, RIGHT, TOP = 720, 64, 24, 16
QUALITY_HEIGHT, BOTTOM = 340, 44
MIN_KL = 1e-4
"""Nats per token at the lower end of the scale: what rounding to 16 bits costs a plan that evicts nothing."""

SAME_SIZE_TOLERANCE = 0.02
"""Relative difference of sizes that is only rounding of capacities."""

SAME_SIZE_OFFSET = 7
"""Pixels between the points of plans of the same size."""

NUM_COLORS = 6
NAMES_WIDTH, ROW_HEIGHT = 190, 24
MAX_NAME_CHARACTERS = 24


def color_class(number: int) -> str:
    """Return the CSS class that gives a plan its colour."""
    return f"plan-{number % NUM_COLORS}"


def plot_quality(evaluations: Sequence[Evaluation]) -> str:
    """Return KL over bytes: a point per plan, with its interval."""
    max_kl = 10 ** math.ceil(math.log10(2 * max(max(MIN_KL, evaluation.mean("kl").mean) for evaluation in evaluations)))
    max_mebibytes = max(evaluation.plan.bytes_per_sequence for evaluation in evaluations) / 2**20
    bottom = QUALITY_HEIGHT - BOTTOM
    x = linear_scale(0, max_mebibytes, LEFT, LEFT + 0.82 * (WIDTH - LEFT - RIGHT))
    scale = log_scale(MIN_KL, max_kl, bottom, TOP)

    def y(kl: float) -> float:
        return scale(min(max_kl, max(MIN_KL, kl)))

    powers = range(round(math.log10(MIN_KL)), round(math.log10(max_kl)) + 1)
    elements = [hline(y(10.0**power), LEFT, WIDTH - RIGHT, f"{10.0**power:g}") for power in powers]
    elements += [text(x(tick), bottom + 18, f"{tick:g}", "middle") for tick in linear_ticks(0, max_mebibytes)]
    elements.append(text((LEFT + WIDTH) / 2, QUALITY_HEIGHT - 6, "MiB per sequence", "middle"))
    sizes = [evaluation.plan.bytes_per_sequence for evaluation in evaluations]
    for number, evaluation in enumerate(evaluations):
        kl, size = evaluation.mean("kl"), sizes[number]
        num_same = sum(abs(other - size) < SAME_SIZE_TOLERANCE * size for other in sizes[:number])
        point_x = x(size / 2**20) + SAME_SIZE_OFFSET * num_same
        tooltip = f"{evaluation.name}: {evaluation.plan.ratio:.1%} of the bytes, KL {format_interval(kl, '.4f')}"
        bar = "" if math.isnan(kl.low) else line(point_x, y(kl.low), point_x, y(kl.high), "series")
        point = circle("series", point_x, y(kl.mean), 5, tooltip)
        elements.append(f'<g class="{color_class(number)}">{bar}{point}</g>')
    return svg(WIDTH, QUALITY_HEIGHT, "KL over bytes, plan by plan", elements)


def plot_windows(evaluations: Sequence[Evaluation]) -> str:
    """Return the loss of every plan on every window: a row per window."""
    first = evaluations[0]
    losses = [evaluation.values("dnll") for evaluation in evaluations]
    low, high = min(0.0, min(map(min, losses))), max(1e-3, max(map(max, losses)))
    bottom = TOP + ROW_HEIGHT * len(first.scores)
    x = linear_scale(low, high, NAMES_WIDTH, WIDTH - RIGHT)
    elements = [vline(x(tick), TOP, bottom, f"{tick:.3g}") for tick in linear_ticks(low, high)]
    for row, (score, gain) in enumerate(zip(first.scores, first.context_gain, strict=True)):
        y, name = TOP + ROW_HEIGHT * (row + 0.5), score.window
        short = name if len(name) <= MAX_NAME_CHARACTERS else f"{name[:10]}…{name[-13:]}"
        elements.append(line(NAMES_WIDTH, y, WIDTH - RIGHT, y, "soft") + text(0, y + 4, f"{short} ({gain:+.2f})"))
        for number, evaluation in enumerate(evaluations):
            loss = evaluation.scores[row].dnll
            point = circle("series", x(loss), y, 4.5, f"{evaluation.name} on {name}: {loss:+.4f}")
            elements.append(f'<g class="{color_class(number)}">{point}</g>')
    elements.append(text((NAMES_WIDTH + WIDTH) / 2, bottom + 34, "loss over the full cache, nats per token", "middle"))
    return svg(WIDTH, bottom + 42, "loss over the full cache, window by window", elements)


def legend_html(evaluations: Sequence[Evaluation]) -> str:
    """Return the legend of the plans' colours."""
    names = [
        f'<span class="{color_class(number)}"><i class="key"></i>{escape(evaluation.name)}</span>'
        for number, evaluation in enumerate(evaluations)
    ]
    return f'<p class="note legend">{" ".join(names)}</p>'


def write_report(evaluations: Sequence[Evaluation], settings: EvaluationSettings, path: Path) -> None:
    """Write the report of these plans."""
    summary = summarize(evaluations, settings.texts)
    files = [evaluation.name for evaluation in evaluations if evaluation.name.endswith(".json")]
    search = f"{shell_command('baklava-search')} --model {settings.model} --texts your-text/ --budget 0.3"
    steps = {"search for a better plan": search}
    if files:
        steps["serve one"] = f"{shell_command('baklava-serve')} --plan {files[0]} --model {settings.model}"
    steps["compare evaluations"] = "make ui"
    options = {
        name: " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
        for name, value in settings.model_dump().items()
    }
    fields = {
        "title": escape(f"{pluralize(len(evaluations), 'plan')} for {settings.model_name}"),
        "lead": escape(summary[0]),
        "summary": "".join(f"<li>{escape(sentence)}</li>" for sentence in summary[1:]),
        "quality": plot_quality(evaluations) + legend_html(evaluations),
        "plans": "".join(_plan_row(number, evaluation) for number, evaluation in enumerate(evaluations)),
        "tasks": _tasks(evaluations) if evaluations[0].tasks else "",
        "speed": _speed(evaluations) if evaluations[0].speed else "",
        "windows": plot_windows(evaluations) + legend_html(evaluations),
        "settings": definitions_html(options),
        "steps": commands_html(steps),
    }
    write_page(path, "evaluation.html", fields)


def _plan_row(number: int, evaluation: Evaluation) -> str:
    plan, speed = evaluation.plan, evaluation.speed
    dnll, kl = evaluation.mean("dnll"), evaluation.mean("kl")
    cells = [
        f"{plan.ratio:.1%}",
        format_mebibytes(plan.bytes_per_sequence),
        format_mebibytes(evaluation.allocated_bytes),
        format_mebibytes(speed.peak_bytes) if speed and speed.peak_bytes is not None else "–",
        _with_small_bounds(format_perplexity_change(dnll)),
        _with_small_bounds(format_interval(dnll, ".4f")),
        _with_small_bounds(format_interval(kl, ".4f")),
    ]
    return _row(_plan_head(number, evaluation), cells)


def _tasks(evaluations: Sequence[Evaluation]) -> str:
    names = "".join(f"<th>{escape(evaluation.name)}</th>" for evaluation in evaluations)
    head = f"<th>task</th><th>n</th><th>chance</th><th>no context</th><th>full cache</th>{names}"
    score_rows, nll_rows = [], []
    for task in evaluations[0].tasks:
        scores: list[TaskScore] = [evaluation.tasks[task] for evaluation in evaluations]
        first, name = scores[0], escape(task.replace("_", " "))
        nlls = [first.closed_book_nll, first.full_nll, *(score.nll for score in scores)]
        nll_rows.append(_row(f"<th>{name}</th>", [str(first.questions), *(f"{nll:.2f}" for nll in nlls)]))
        if first.metric != "exact":
            name += f" <small>{escape(first.metric.replace('_', ' '))}</small>"
        cells = "".join(
            [
                f"<td>{first.questions}</td><td>{first.chance:.2f}</td>",
                *(_heat_cell(value) for value in (first.closed_book_score, first.full_score)),
                *(_heat_cell(score.score, format_bounds(score.loss, ".2f")) for score in scores),
            ]
        )
        score_rows.append(f"<tr><th>{name}</th>{cells}</tr>")
    fields = {
        "score_head": head,
        "score_rows": "".join(score_rows),
        "nll_head": head.replace("<th>chance</th>", ""),
        "nll_rows": "".join(nll_rows),
    }
    return fill_template("evaluation_tasks.html", fields)


def _heat_cell(value: float, loss_bounds: str = "") -> str:
    tooltip = f' title="loss against the full cache, 95 % {escape(loss_bounds)}"' if loss_bounds else ""
    return f'<td class="heat" style="--share: {value:.3f}"{tooltip}>{value:.2f}</td>'


def _speed(evaluations: Sequence[Evaluation]) -> str:
    rows, context = [], 0
    for number, evaluation in enumerate(evaluations):
        if speed := evaluation.speed:
            context = speed.context
            cells = [
                f"{speed.prefill_seconds:.2f} s",
                f"{speed.prefill_ratio:.2f} ×",
                f"{speed.decode_milliseconds:.1f} ms",
                f"{speed.decode_ratio:.2f} ×",
            ]
            rows.append(_row(_plan_head(number, evaluation), cells))
    return fill_template("evaluation_speed.html", {"rows": "".join(rows), "context": f"{context:,}"})


def _row(head: str, cells: Sequence[str]) -> str:
    return f"<tr>{head}{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"


def _plan_head(number: int, evaluation: Evaluation) -> str:
    return f'<th class="{color_class(number)}"><i class="key"></i>{escape(evaluation.name)}</th>'


def _with_small_bounds(value: str) -> str:
    """A value with its bounds in small type below it."""
    mean, _, bounds = value.partition(" [")
    return escape(mean) + (f"<br><small>[{escape(bounds)}</small>" if bounds else "")
