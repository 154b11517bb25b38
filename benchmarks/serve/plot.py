"""Plot how many sequences of each length are served together from the same KV pool."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.serve.servers import FULL, PLAN

PLAN_COLOUR, FULL_COLOUR = "#1f5fa8", "#777777"


def plot(results: Mapping[str, Any], path: Path) -> None:
    """Draw the engine's computed capacity as lines, and the counts of running sequences as crosses."""
    rows, config = results["pool_capacity"], results["config"]
    figure = Figure(figsize=(7.2, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    tokens = [row["tokens"] for row in rows]
    for key, name, colour in (("plan", PLAN, PLAN_COLOUR), ("full", FULL, FULL_COLOUR)):
        counts = [row[key] for row in rows]
        axes.plot(tokens, counts, marker="o", markersize=4, color=colour, label=name.removeprefix("baklava, "))
        for length, count in zip(tokens, counts, strict=True):
            axes.annotate(
                str(count), (length, count), textcoords="offset points", xytext=(0, -15), ha="center", color=colour
            )
        if "concurrent_sequences" in results:
            running = results["concurrent_sequences"][name]["running"]
            axes.plot([config["prompt_tokens"]], [running], marker="x", markersize=9, color=colour, linestyle="none")
    axes.set(xlabel="tokens of a sequence", ylabel="concurrent sequences", xscale="log", yscale="symlog")
    axes.set_xticks(tokens, [f"{length:,}" for length in tokens])
    axes.minorticks_off()
    axes.set_ylim(0, 1.5 * max(max(row["plan"], row["full"]) for row in rows))
    axes.grid(alpha=0.3)
    pool = f"KV pool of {config['pool_bytes'] / 2**20:,.0f} MiB; × counted while they ran"
    axes.set_title(pool, fontsize="medium")
    axes.legend()
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
