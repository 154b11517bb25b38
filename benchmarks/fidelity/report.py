"""The results of the fidelity study as Markdown tables and as an SVG plot."""

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

from benchmarks.fidelity.inputs import BASELINE, SEARCHED
from benchmarks.fidelity.results import ALL_CORPORA, Metric
from benchmarks.markdown_page import markdown_table
from tuning.reporting.html import hline, text

SECTION = "fidelity"
"""Name of the page's markers."""

MISSING = "–"
SHUFFLED = "shuffled"
CORPORA_BUDGET = 0.125
"""The table of corpora shows the budget nearest to this one."""

Results = Mapping[str, Any]
Row = Mapping[str, Any]


def format_tables(results: Results) -> str:
    """Return four tables: KL and loss at all budgets, the lead of the searched plan, and each corpus by itself."""
    losses = [_format_metric(results, metric) for metric in ("kl", "dnll")]
    tables = (*losses, _format_note(results), _format_lead(results), _format_corpora(results))
    return "\n\n".join(table for table in tables if table)


def find_row(results: Results, method: str, budget: float, corpus: str = ALL_CORPORA) -> Row | None:
    """Return the row of a method at a budget on a corpus, or None if the method has no plan there."""
    key = (method, budget, corpus)
    return next((row for row in results["rows"] if (row["method"], row["budget"], row["corpus"]) == key), None)


def format_percent(budget: float) -> str:
    """Return a share of the bytes, such as "12.5 %"."""
    return f"{100 * budget:.4g} %"


def format_nats(value: float | None) -> str:
    """Return nats per token to two digits, and at most five decimals, without a leading zero."""
    if value is None:
        return MISSING
    decimals = min(5, max(1, 1 - math.floor(math.log10(abs(value))))) if value else 1
    text = f"{round(value, decimals) + 0.0:.{decimals}f}"
    return text.replace("0.", ".", 1) if text.lstrip("-").startswith("0.") else text


def format_interval(interval: Sequence[float | None], format_value: Callable[[float | None], str] = format_nats) -> str:
    """Return a mean with its interval in brackets."""
    mean, low, high = interval
    if low is None:
        return format_value(mean)
    return f"{format_value(mean)} [{format_value(low)}, {'∞' if high is None else format_value(high)}]"


METRIC_LABELS: Mapping[Metric, str] = {
    "kl": "KL to the full cache, nats/token",
    "dnll": "loss over the full cache, nats/token",
}


def _format_metric(results: Results, metric: Metric) -> str:
    budgets = _budgets(results)
    rows = []
    for method in results["methods"]:
        if method["group"] != "control":
            name = f"**{method['label']}**" if method["name"] == SEARCHED.name else method["label"]
            rows.append([name, *(_format_mean(results, method["name"], budget, metric) for budget in budgets)])
    return markdown_table([METRIC_LABELS[metric], *map(format_percent, budgets)], rows)


def _format_note(results: Results) -> str:
    scored = next(corpus for corpus in results["corpora"] if corpus["name"] == ALL_CORPORA)
    return (
        f"Means over {scored['n']} windows of {scored['documents']} {results['split']} documents. "
        "Bold: the lowest at that budget; italic: the 95 % interval of the paired difference to the searched plan "
        f"contains 0; {MISSING}: no plan at that budget."
    )


def _format_mean(results: Results, method: str, budget: float, metric: Metric) -> str:
    row = find_row(results, method, budget)
    if row is None:
        return MISSING
    loss = format_nats(row[metric][0])
    if row is _best_row(results, budget, metric):
        return f"**{loss}**"
    difference = row.get(f"{metric}_above_searched")
    is_tie = difference and difference[1] is not None and difference[1] <= 0 <= difference[2]
    return f"*{loss}*" if is_tie else loss


def _format_lead(results: Results) -> str:
    """Compare the KL of the searched plan with the best other method and with the baseline, one row per budget."""
    labels = {method["name"]: method["label"] for method in results["methods"]}
    factors = {(factor["budget"], factor["corpus"]): factor["kl"] for factor in results["factors"]}
    rows = []
    for budget in _budgets(results):
        searched = find_row(results, SEARCHED.name, budget)
        rival = _best_row(results, budget, "kl", exclude=(SEARCHED.name,))
        if searched and rival:
            factor = factors.get((budget, ALL_CORPORA))
            rows.append(
                [
                    format_percent(budget),
                    format_interval(searched["kl"]),
                    format_interval(searched["dnll"]),
                    labels[rival["method"]],
                    format_interval(rival["kl_above_searched"]),
                    format_interval(factor, _format_factor) if factor else MISSING,
                ]
            )
    header = [
        "bytes",
        f"{SEARCHED.label}: KL",
        "its loss",
        "best other method",
        "its KL minus the searched plan's (paired)",
        f"{BASELINE.label}, 16 bits: its KL over the searched plan's",
    ]
    return markdown_table(header, rows) if rows else ""


def _format_corpora(results: Results) -> str:
    """Show what the context is worth in each corpus, and the KL of plans there."""
    budget = min(_budgets(results), key=lambda budget: abs(budget - CORPORA_BUDGET))
    methods = [
        method
        for method in results["methods"]
        if method["name"] in (BASELINE.name, SEARCHED.name, SHUFFLED) and find_row(results, method["name"], budget)
    ]
    rows = []
    for corpus in results["corpora"]:
        name = corpus["name"]
        is_control = name in results["provenance"]["controls"]
        method_rows = [find_row(results, method["name"], budget, name) for method in methods]
        rows.append(
            [
                f"{name} (control)" if is_control else name,
                str(corpus["n"]),
                format_interval(corpus["gain"]) if "gain" in corpus else MISSING,
                *(format_interval(row["kl"]) if row else MISSING for row in method_rows),
            ]
        )
    labels = [f"KL of {method['label']}, {format_percent(budget)}" for method in methods]
    return markdown_table(["corpus", "windows", "gain from context", *labels], rows)


def _best_row(results: Results, budget: float, metric: Metric, exclude: Sequence[str] = ()) -> Row | None:
    """Return the row with the lowest mean at a budget; controls do not compete."""
    competing = [method["name"] for method in results["methods"] if method["group"] != "control"]
    rows = [row for name in competing if name not in exclude and (row := find_row(results, name, budget))]
    return min(rows, key=lambda row: row[metric][0], default=None)


def _budgets(results: Results) -> list[float]:
    """Return the budgets at which any method has a plan, in descending order."""
    return sorted({row["budget"] for row in results["rows"]}, reverse=True)


def _format_factor(value: float | None) -> str:
    return MISSING if value is None else f"{value:.3g} ×" if value < 1000 else f"{value:,.0f} ×"


WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 930, 560, 72, 64, 52
LABELS_LEFT = 640
"""Where the labels of the lines begin, in pixels."""

PLOT_RIGHT = LABELS_LEFT - 40
LABEL_SPACING = 17
"""Minimum distance of two labels, in pixels."""

MIN_KL = 1e-4
"""Nats per token at the bottom of the axis; rounding and 16-bit storage cost less than that."""

GRID_KL = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
LEGEND = {
    "searched": "searched",
    "packed": "others in 4 bits",
    "published": "others in 16 bits (dashed: sinks + recent)",
}
LEGEND_LEFT, LEGEND_CHARACTER_WIDTH, LEGEND_GAP = 410.0, 6.4, 22

STYLE = """
svg { --page: #fdfcfa; --ink: #22201d; --soft: #6d675f; --line: #e4dfd7;
  --searched: #b4490a; --packed: #2f6f8f; --published: #a39a8d; }
@media (prefers-color-scheme: dark) {
svg { --page: #1a1917; --ink: #ece8e1; --soft: #a39c91; --line: #38352f;
  --searched: #f39a55; --packed: #6fb6d8; --published: #857d72; } }
rect { fill: var(--page); }
text { font: 12px system-ui, -apple-system, "Segoe UI", sans-serif; fill: var(--soft); }
.title text { font-size: 15px; font-weight: 600; fill: var(--ink); }
.grid { stroke: var(--line); }
polyline { fill: none; stroke: var(--colour); stroke-width: 1.5; stroke-linejoin: round; }
circle { fill: var(--colour); }
.leader { fill: none; stroke: var(--colour); stroke-width: .75; opacity: .55; }
.band { fill: var(--colour); opacity: .16; }
.searched { --colour: var(--searched); } .packed { --colour: var(--packed); }
.published { --colour: var(--published); }
.searched polyline { stroke-width: 4; } .searched text { font-weight: 700; fill: var(--searched); }
.packed polyline { stroke-width: 2; } .packed text { fill: var(--packed); }
.dashed polyline { stroke-dasharray: 5 3; }
"""

Scale = Callable[[float], float]
Line = tuple[Mapping[str, Any], list[Mapping[str, Any]]]
"""A method, and its rows in descending order of bytes."""


def plot(results: Mapping[str, Any]) -> str:
    """Return the SVG as a complete file."""
    lines = _lines(results)
    x, y = _scales([row for _, rows in lines for row in rows])
    label_heights = _spread_labels([y(rows[-1]["kl"][0]) for _, rows in lines])
    drawing_order = list(LEGEND)[::-1]  # the searched plans come last, on top of the others
    drawn = sorted(zip(lines, label_heights, strict=True), key=lambda pair: drawing_order.index(pair[0][0]["group"]))
    parts = [*_draw_frame(results, x, y), *(_draw_line(line, height, x, y) for line, height in drawn)]
    label = "KL to the full cache against bytes, method by method"
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">'
    content = "\n".join(parts)
    return f'{head}<style>{STYLE}</style><rect width="{WIDTH}" height="{HEIGHT}"/>\n{content}\n</svg>\n'


def _lines(results: Mapping[str, Any]) -> list[Line]:
    """Return the methods that compete and have a plan, the one with the highest KL at its last point first."""
    lines = []
    for method in results["methods"]:
        rows = [row for row in results["rows"] if (row["method"], row["corpus"]) == (method["name"], ALL_CORPORA)]
        if rows and method["group"] in LEGEND:
            lines.append((method, sorted(rows, key=lambda row: (-row["ratio"], -row["budget"]))))
    return sorted(lines, key=lambda line: -line[1][-1]["kl"][0])


def _scales(rows: Sequence[Mapping[str, Any]]) -> tuple[Scale, Scale]:
    """Return logarithmic scales that map a share of the bytes to x, and a KL to y."""
    ratios = [row["ratio"] for row in rows]
    max_kl = max(2 * MIN_KL, *(row["kl"][0] for row in rows)) * 1.15
    first, last = math.log(max(*ratios, min(ratios) * 2)), math.log(min(ratios))

    def x(ratio: float) -> float:
        return LEFT + (math.log(ratio) - first) / (last - first) * (PLOT_RIGHT - LEFT)

    def y(kl: float) -> float:
        share = math.log(max(kl, MIN_KL) / MIN_KL) / math.log(max_kl / MIN_KL)
        return HEIGHT - BOTTOM - min(1.0, share) * (HEIGHT - BOTTOM - TOP)

    return x, y


def _spread_labels(heights: Sequence[float]) -> list[float]:
    """Return heights, from the top down, moved so that labels neither overlap nor leave the plot."""
    moved: list[float] = []
    for height in heights:
        moved.append(max(height, moved[-1] + LABEL_SPACING) if moved else height)
    lowest = HEIGHT - BOTTOM + 8.0
    for index in reversed(range(len(moved))):
        moved[index] = lowest = min(moved[index], lowest)
        lowest -= LABEL_SPACING
    return moved


def _draw_frame(results: Mapping[str, Any], x: Scale, y: Scale) -> list[str]:
    scored = next(corpus for corpus in results["corpora"] if corpus["name"] == ALL_CORPORA)
    split = "unseen" if results["split"] == "test" else results["split"]
    windows = f"{scored['n']} windows of {scored['documents']} {split} documents"
    subtitle = f"KL to the full cache in nats per token, mean of {windows}"
    grid = [hline(y(kl), LEFT, PLOT_RIGHT, f"{'≤ ' * (kl == MIN_KL)}{kl:g}") for kl in GRID_KL if y(kl) > TOP]
    ticks = [
        f'<line class="grid" x1="{x(budget):.1f}" x2="{x(budget):.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'
        + text(x(budget), HEIGHT - BOTTOM + 18, format_percent(budget), "middle")
        for budget in sorted({row["budget"] for row in results["rows"]})
    ]
    axis_label = "share of the bytes of the full 16-bit cache: fewer to the right"
    legend, left = [], LEGEND_LEFT
    for group, description in LEGEND.items():
        legend.append(f'<g class="{group}">{text(left, 26, description)}</g>')
        left += LEGEND_CHARACTER_WIDTH * len(description) + LEGEND_GAP
    return [
        f'<g class="title">{text(16, 26, "KL against bytes, by method")}</g>',
        text(16, 46, subtitle),
        *grid,
        *ticks,
        text((LEFT + PLOT_RIGHT) / 2, HEIGHT - 10, axis_label, "middle"),
        *legend,
    ]


def _draw_line(line: Line, label_height: float, x: Scale, y: Scale) -> str:
    method, rows = line
    is_searched = method["group"] == "searched"
    points = [(x(row["ratio"]), y(row["kl"][0])) for row in rows]
    path = " ".join(f"{left:.1f},{top:.1f}" for left, top in points)
    dots = []
    for row, (left, top) in zip(rows, points, strict=True):
        tooltip = escape(f"{method['label']}, {row['ratio']:.1%} of the bytes: {format_nats(row['dnll'][0])}")
        radius = 5 if is_searched else 2.5
        dots.append(f'<circle cx="{left:.1f}" cy="{top:.1f}" r="{radius}"><title>{tooltip}</title></circle>')
    left, top = points[-1]
    leader_path = f"M{left + 6:.1f} {top:.1f} L{LABELS_LEFT - 26} {label_height:.1f} H{LABELS_LEFT - 6}"
    leader = f'<path class="leader" d="{leader_path}"/>'
    label = text(LABELS_LEFT, label_height + 4, method["label"])
    dashed = " dashed" if "+" not in method["name"] and not is_searched else ""
    band = _draw_intervals(rows, x, y) if is_searched else ""
    return f'<g class="{method["group"]}{dashed}">{band}<polyline points="{path}"/>{"".join(dots)}{leader}{label}</g>'


def _draw_intervals(rows: Sequence[Mapping[str, Any]], x: Scale, y: Scale) -> str:
    """Return a band between the bounds of all means."""
    bounded = [row for row in rows if row["kl"][1] is not None]
    lower = [(row["ratio"], row["kl"][1]) for row in bounded]
    upper = [(row["ratio"], row["kl"][2]) for row in reversed(bounded)]
    points = " ".join(f"{x(ratio):.1f},{y(loss):.1f}" for ratio, loss in lower + upper)
    return f'<polygon class="band" points="{points}"/>'
