"""The results of the decode and prefill benchmarks as a table and as a plot."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from baklava.evaluation.speed import BASELINE
from benchmarks.kernels.decode import NO_CACHE

PLOTTED_COLUMNS = {
    "decode": ("speedup", "speedup over the baseline's step"),
    "prefill": ("over_baseline", "prefill time over the baseline's"),
}
TABLE_COLUMNS = {
    "decode": {
        "milliseconds": "ms",
        "spread": "spread",
        "speedup": "speedup",
        "attention_over_sdpa": "x SDPA",
        "allocated_over_reserved": "allocated",
    },
    "prefill": {
        "seconds": "s",
        "spread": "spread",
        "over_baseline": "x baseline",
        "over_streaming": "x streaming",
        "peak_over_floor": "x floor",
    },
}

LINE_STYLES: Mapping[str, Mapping[str, Any]] = {
    BASELINE: {"color": "black"},
    NO_CACHE: {"color": "black", "linestyle": "--", "linewidth": 1},
}


def table(results: Mapping[str, Any]) -> str:
    """Return an aligned text table with one line per row of the results."""
    columns = TABLE_COLUMNS[results["benchmark"]]
    rows = results["rows"]
    name_width = max(len(row["plan"]) for row in rows)
    header = f"{'tokens':>6} {'batch':>5}  {'plan':<{name_width}}"
    lines = [header + "".join(f"{title:>13}" for title in columns.values())]
    for row in rows:
        cells = "".join(f"{_cell(row[column]):>13}" for column in columns)
        lines.append(f"{row['context']:>6} {row['batch']:>5}  {row['plan']:<{name_width}}{cells}")
    return "\n".join(lines)


def _cell(value: float | None) -> str:
    if value is None or value != value:
        return "-"
    return f"{value:.2f}" if value < 1000 else f"{value:.0f}"


def plot(results: Mapping[str, Any], path: Path) -> None:
    """Plot one panel per batch size, with one line per plan over the context."""
    rows: Sequence[Mapping[str, Any]] = results["rows"]
    column, label = PLOTTED_COLUMNS[results["benchmark"]]
    batches = sorted({row["batch"] for row in rows})
    figure = Figure(figsize=(4.2 * len(batches) + 2.6, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(batches), squeeze=False, sharey=True)[0]
    for axes, batch in zip(panels, batches, strict=True):
        for name in dict.fromkeys(row["plan"] for row in rows):
            points = [(row["context"], row[column]) for row in rows if (row["plan"], row["batch"]) == (name, batch)]
            axes.plot(*zip(*points, strict=True), marker="o", markersize=4, label=name, **LINE_STYLES.get(name, {}))
        contexts = sorted({row["context"] for row in rows})
        axes.set(title=f"batch {batch}", xlabel="tokens of context", xscale="log")
        axes.set_xticks(contexts, [str(context) for context in contexts])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    panels[0].set_ylabel(label)
    panels[0].set_ylim(bottom=0)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", fontsize="small")
    figure.savefig(path, dpi=110)
