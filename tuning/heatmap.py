"""The heat map of a plan: entries per layer and KV head."""

from math import nan
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from baklava.plan import BudgetPlan


def draw(plan: BudgetPlan, path: Path) -> Path:
    """Draw layers × KV heads as a picture, and return where it is. Sliding layers stay blank."""
    heads = plan.geometry.kv_heads
    grid: list[list[float]] = [[*row] or [nan] * heads for row in plan.tokens]
    figure = Figure(figsize=(max(3.5, 1.5 + 0.4 * heads), max(3.0, 1.2 + 0.18 * len(grid))), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    image = axes.imshow(grid, aspect="auto", cmap="viridis", vmin=0)
    axes.set(xlabel="KV head", ylabel="layer", title=f"entries per head, {plan.ratio:.1%} of the bytes")
    axes.set_xticks(range(heads))
    figure.colorbar(image, ax=axes, label=f"entries of {plan.context_length}")
    figure.savefig(path, dpi=110)
    return path
