"""The serving benchmark's results as Markdown."""

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.markdown_page import table_row
from benchmarks.serve.servers import BATCHED, FULL, PEER, PLAN

NAME = "serve"
"""Name of the markers in the README."""

MEBIBYTE = 2**20

Figures = Mapping[str, Any]


def table(figures: Figures) -> str:
    """A table of what was aimed at, one of the closed loop and one of the open loop."""
    parts = [_aims(figures)]
    if "shared" in figures:
        head = f"{figures['asked']['concurrent']} clients after one pinned prefix"
        parts.append(_loads(figures["shared"], figures["asked"], head))
    if "closed" in figures:
        parts.append(
            _loads(figures["closed"], figures["asked"], f"closed loop, {figures['asked']['concurrent']} clients")
        )
    if "open" in figures:
        parts.append(_opened(figures["open"], figures["asked"]))
    return "\n\n".join(part for part in parts if part)


def _aims(figures: Figures) -> str:
    rows = [["serving", "measured", "aim"], ["---"] * 3]
    for part, tell in (
        ("together", _together),
        ("shared", _shared),
        ("closed", _closed),
        ("overhead", _overhead),
        ("beside", _beside),
    ):
        if part in figures:
            rows += tell(figures[part], figures["asked"])
    return "\n".join(map(table_row, rows)) if len(rows) > 2 else ""


def _together(found: Figures, asked: Figures) -> list[list[str]]:
    ours, full = found[PLAN], found[FULL]
    pool = f"{asked['pool'] / MEBIBYTE:.0f} MiB"
    what = f"sequences of {asked['prompt']:,} tokens that ran together in {pool}, the plan's over the full plan's"
    times = ours["together"] / max(1, full["together"])
    told = f"{ours['together']} / {full['together']} = {times:.1f} ×, {ours['failed'] + full['failed']} failed"
    return [[what, told, "≥ 6 ×, none failed"]]


def _shared(found: Figures, asked: Figures) -> list[list[str]]:
    what = f"median TPOT over our own full plan's, {asked['concurrent']} clients after one pinned prefix of "
    return [[f"{what}{asked['prompt']:,} tokens", _times(found[PLAN], found[FULL], "tpot"), "≤ 0.67 ×"]]


def _closed(found: Figures, asked: Figures) -> list[list[str]]:
    ours, full = found[PLAN], found[FULL]
    at = f"{asked['concurrent']} clients, prompts of {asked['prompt']:,} tokens"
    rows = []
    for peer, aim in ((PEER, ""), (BATCHED, "≤ 0.20 ×")):  # the first takes one request at a time
        theirs = found[peer]
        rows += [
            [f"median TPOT over that of `{peer}`, {at}", _times(ours, theirs, "tpot"), aim],
            [f"requests per second over those of `{peer}`", _rate(ours, theirs), "≥ 2 ×"],
            [f"median time to the last token over that of `{peer}`", _times(ours, theirs, "whole"), ""],
        ]
    return [*rows, ["median TPOT over that of our own full plan", _times(ours, full, "tpot"), ""]]


def _times(one: Figures, other: Figures, name: str) -> str:
    """Return the ratio of two medians, or "failed" if the other server answered no request."""
    if not other["answered"]:
        return "failed"
    if not (one[name] and other[name]):
        return "–"
    return f"{one[name]['p50'] / other[name]['p50']:.2f} ×"


def _rate(one: Figures, other: Figures) -> str:
    name = "requests_per_second"
    return f"{one[name] / other[name]:.1f} ×" if other["answered"] else "failed"


def _overhead(found: Figures, asked: Figures) -> list[list[str]]:
    ours = found[PLAN]
    told = f"{ours['overhead']:.1%} of {ours['model'] * 1000:.0f} ms"
    apart = f"{ours['step'] / found[FULL]['step']:.2f} ×"
    others = [
        [f"the same of {name} over it", f"{each['step'] / found[FULL]['step']:.2f} ×", ""]
        for name, each in found.items()
        if name not in (PLAN, FULL)
    ]
    return [
        [f"engine beside the forward, in a decode step of {ours['batch']} sequences", told, "≤ 10 %"],
        [f"the same step over that of our own full plan, {ours['batch']} × {asked['prompt']:,} tokens", apart, ""],
        *others,
    ]


def _beside(found: Figures, asked: Figures) -> list[list[str]]:
    ours = found[PLAN]
    busy, idle = ours["beside"], ours["idle"]
    what = f"p99 between the tokens of one sequence while a prompt of {ours['tokens']:,} enters, over the idle p99"
    return [
        [what, f"{busy['p99'] / idle['p99']:.1f} ×", "≤ 2.5 ×"],
        ["the same over the idle median", f"{busy['p99'] / idle['p50']:.1f} ×", ""],
    ]


_COLUMNS = (
    "TTFT p50 / p99",
    "TPOT p50 / p99",
    "requests/s",
    "tokens/s",
    "goodput/s",
    "rejected",
    "failed",
    "KV allocated",
)


def _loads(found: Figures, asked: Figures, what: str) -> str:
    head = [f"{what}, {asked['prompt']:,} + {asked['generated']} tokens", *_COLUMNS]
    return "\n".join(
        map(table_row, [head, ["---"] * len(head), *([name, *_row(each)] for name, each in found.items())])
    )


def _opened(rows: Sequence[Figures], asked: Figures) -> str:
    fewest, most = asked["prompts"]
    head = [f"open loop, {fewest:,} to {most:,} + {asked['generated']} tokens", "requests/s sent", *_COLUMNS]
    lines = [[row["server"], f"{row['rate']:.3f}", *_row(row)] for row in rows]
    return "\n".join(map(table_row, [head, ["---"] * len(head), *lines]))


def _row(found: Figures) -> list[str]:
    allocated = found["most"].get("kv_allocated_bytes")
    failed = not found["answered"]
    return [
        "failed" if failed else _pair(found["ttft"], "{:.1f} s"),
        "failed" if failed else _pair(found["tpot"], "{:.2f} s"),
        f"{found['requests_per_second']:.3f}",
        f"{found['tokens_per_second']:.1f}",
        f"{found['goodput']:.3f}",
        str(found["refused"]),
        str(found["failed"]),
        f"{allocated / MEBIBYTE:.0f} MiB" if allocated else "–",
    ]


def _pair(found: Mapping[str, float] | None, form: str) -> str:
    return "–" if found is None else f"{form.format(found['p50'])} / {form.format(found['p99'])}"
