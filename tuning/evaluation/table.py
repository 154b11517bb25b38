"""The figures on a terminal."""

from collections.abc import Callable, Sequence

from baklava.comparison import Evaluation, TaskScore
from baklava.formats import mebibytes, with_bounds


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
