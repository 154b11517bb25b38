"""The report of an evaluation: one HTML file that needs nothing else."""

from collections.abc import Sequence
from html import escape
from pathlib import Path

from baklava.bootstrap import Interval
from baklava.comparison import Evaluation, TaskScore
from baklava.formats import bounds, counted, mebibytes, percent
from baklava.verdict import verdict
from tuning.evaluation.charts import colour, legend, quality_chart, window_chart
from tuning.evaluation.settings import EvaluationSettings
from tuning.page import filled, pairs, steps, write_page


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
