"""The picture: how many sequences are served at a time, against how long they are, out of the same bytes."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.serve.servers import FULL, PLAN

INK, FAINT = "#1f5fa8", "#777777"


def draw(figures: Mapping[str, Any], path: Path) -> None:
    """Lines are what the engine admits; dots are what was seen to run together."""
    rows, asked = figures["fits"], figures["asked"]
    figure = Figure(figsize=(7.2, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    tokens = [row["tokens"] for row in rows]
    for key, name, colour in (("plan", PLAN, INK), ("full", FULL, FAINT)):
        counts = [row[key] for row in rows]
        axes.plot(tokens, counts, marker="o", markersize=4, color=colour, label=name.removeprefix("ours, "))
        for place, count in zip(tokens, counts, strict=True):
            axes.annotate(
                str(count), (place, count), textcoords="offset points", xytext=(0, 7), ha="center", color=colour
            )
        if "together" in figures:
            seen = figures["together"][name]["together"]
            axes.plot([asked["prompt"]], [seen], marker="x", markersize=9, color=colour, linestyle="none")
    axes.set(xlabel="tokens of a sequence", ylabel="sequences at a time", xscale="log", yscale="symlog")
    axes.set_xticks(tokens, [f"{place:,}" for place in tokens])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    pool = f"{asked['pool'] / 2**20:,.0f} MiB of KV caches; × were counted while they ran"
    axes.set_title(pool, fontsize="medium")
    axes.legend()
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
