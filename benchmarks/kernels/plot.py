"""Figures as a table and as a picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.kernels.decode import FLOOR
from benchmarks.transformers_baseline import PEER

SHOWN = {
    "decode": ("speedup", "times as fast as the peer's step"),
    "prefill": ("over_peer", "times as long as the peer's prefill"),
}
COLUMNS = {
    "decode": "milliseconds=ms spread=spread speedup=x_peer attention=x_SDPA resident=held",
    "prefill": "seconds=s spread=spread over_peer=x_peer over_streaming=x_streaming peak=x_floor",
}

STYLES: Mapping[str, Mapping[str, Any]] = {
    PEER: {"color": "black"},
    FLOOR: {"color": "black", "linestyle": "--", "linewidth": 1},
}


def table(figures: Mapping[str, Any]) -> str:
    """One line a contestant, aligned."""
    columns = dict(column.split("=") for column in COLUMNS[figures["benchmark"]].split())
    rows = figures["rows"]
    widest = max(len(row["plan"]) for row in rows)
    head = f"{'tokens':>6} {'batch':>5}  {'plan':<{widest}}" + "".join(
        f"{title.replace('_', ' '):>13}" for title in columns.values()
    )
    lines = [head]
    for row in rows:
        cells = "".join(f"{_cell(row[column]):>13}" for column in columns)
        lines.append(f"{row['context']:>6} {row['batch']:>5}  {row['plan']:<{widest}}{cells}")
    return "\n".join(lines)


def _cell(value: float | None) -> str:
    if value is None or value != value:
        return "-"
    return f"{value:.2f}" if value < 1000 else f"{value:.0f}"


def draw(figures: Mapping[str, Any], path: Path) -> None:
    """A panel per batch size: a line per contestant over the context."""
    rows: Sequence[Mapping[str, Any]] = figures["rows"]
    metric, label = SHOWN[figures["benchmark"]]
    batches = sorted({row["batch"] for row in rows})
    figure = Figure(figsize=(4.2 * len(batches) + 2.6, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(batches), squeeze=False, sharey=True)[0]
    for axes, batch in zip(panels, batches, strict=True):
        for name in dict.fromkeys(row["plan"] for row in rows):
            line = [(row["context"], row[metric]) for row in rows if (row["plan"], row["batch"]) == (name, batch)]
            axes.plot(*zip(*line, strict=True), marker="o", markersize=4, label=name, **STYLES.get(name, {}))
        contexts = sorted({row["context"] for row in rows})
        axes.set(title=f"batch {batch}", xlabel="tokens of context", xscale="log")
        axes.set_xticks(contexts, [str(context) for context in contexts])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    panels[0].set_ylabel(label)
    panels[0].set_ylim(bottom=0)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", fontsize="small")
    figure.savefig(path, dpi=110)
