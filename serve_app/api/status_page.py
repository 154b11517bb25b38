"""The status page: what is served, how full the pool is, and where the plan spends its bytes.

It has no script and asks nobody else for anything; a browser draws it anew every few seconds.
"""

import math
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from baklava.plan.budget_plan import BudgetPlan
from serve_app.replication.coordinator import Report

EVERY = 3
"""Seconds after which a browser asks again."""

PAGE_HEADERS = {
    "Refresh": str(EVERY),
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}

_TEMPLATE = Template((Path(__file__).parent / "status_page.html").read_text())

_MOST_CELLS = 64

CELL, GAP, WIDEST = 20, 2, 32  # units of the heat map, and pixels that a cell grows to


def page(card: dict[str, Any], plan: BudgetPlan, reports: Sequence[Report]) -> str:
    """The page as HTML."""
    return _TEMPLATE.substitute(
        model=escape(str(card["id"])),
        length=f"{card['max_model_len']:,}",
        facts=_facts(plan),
        replicas="".join(_replica(report, plan) for report in reports),
        map=heat_map(plan),
        legend=_legend(plan),
    )


def _facts(plan: BudgetPlan) -> str:
    eviction = plan.eviction
    facts = {
        "Plan": f"<code>{plan.digest}</code>",
        "Bytes per sequence": f"{size(plan.bytes_per_sequence)} at most",
        "Full cache": f"{size(plan.full_bytes_per_sequence)} at {plan.context_length:,} tokens",
        "Ratio": f"{plan.ratio:.1%}",
        "Eviction": escape(f"{eviction.method}, {eviction.sinks} sinks, every {eviction.interval} tokens"),
        "Prefill": escape(plan.prefill.mode + (f", {plan.prefill.chunk} tokens" if plan.prefill.chunk else "")),
        "Allocation": escape(plan.allocation.method),
    }
    return "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in facts.items())


def _replica(report: Report, plan: BudgetPlan) -> str:
    state = report.state
    counts = state["counts"]
    mood = "dead" if not state["alive"] else "draining" if state["draining"] else "ready"
    other = "" if state["plan"] == plan.digest else f" <span>still in plan <code>{escape(state['plan'])}</code></span>"
    failed = f"<p class=failed>{escape(report.failed)}</p>" if report.failed else ""
    ends = " · ".join(f"{counts[name]:,} {name}" for name in ("finished", "cancelled", "failed", "refused"))
    return f"""<section class=replica>
<h3>{escape(report.replica)} <b class={mood}>{mood}</b>{other}</h3>{failed}
<p class=numbers><span><b>{state["running"]}</b> running</span> <span><b>{state["waiting"]}</b> waiting</span>
<span><b>{counts["generation_tokens"]:,}</b> tokens generated</span> <span>{ends}</span></p>
{_pool(state)}
<p class=slots>{_slots(state, plan)}</p>
<p class=quiet>{_kept(state)}</p>
</section>"""


def _pool(state: dict[str, Any]) -> str:
    pool = max(1, state["pool_bytes"])
    snapshots = state["snapshot_bytes"]
    promised = max(0, state["promised_bytes"] - snapshots)
    held = max(0, min(state["held_bytes"], state["promised_bytes"]) - snapshots)
    parts = [("declared", snapshots), ("held", held), ("promised", promised - held)]
    place, bars = 0.0, []
    for name, amount in parts:
        width = 100 * amount / pool
        bars.append(f'<rect class={name} x="{place:.3f}%" width="{width:.3f}%" height="18"/>')
        place += width
    words = f"{size(held)} held of {size(promised)} promised in a pool of {size(pool)}"
    legend = {
        "declared": f"{size(snapshots)} of declared prompts",
        "held": f"{size(held)} held",
        "promised": f"of {size(promised)} promised",
        "free": f"in a pool of {size(pool)}; {size(state['most_bytes'])} were ever held",
    }
    keys = "".join(f"<span><i class={name}></i>{text}</span> " for name, text in legend.items())
    return (
        f'<svg class=pool width="100%" height="18" role=img aria-label="{words}"><rect class=free width="100%" '
        f'height="18"/>{"".join(bars)}</svg><p class="quiet keys">{keys}</p>'
    )


def _slots(state: dict[str, Any], plan: BudgetPlan) -> str:
    """Whole sequences of this plan that the pool has room for, those that are promised filled."""
    slots = state["pool_bytes"] // plan.bytes_per_sequence
    busy = -(-state["promised_bytes"] // plan.bytes_per_sequence)
    shown = min(slots, _MOST_CELLS)
    taken = min(shown, busy if slots <= shown else -(-busy * shown // slots))
    cells = "".join(f"<i class={'busy' if place < taken else 'idle'}></i>" for place in range(shown))
    return f"{cells} <span class=quiet>{min(busy, slots):,} of {slots:,} slots of a whole budget are taken</span>"


def _kept(state: dict[str, Any]) -> str:
    if not state["seen"]:
        return "No sequence is running."
    share = state["kept"] / state["seen"]
    return f"{state['kept']:,} of {state['seen']:,} entries are kept ({share:.1%}), as counted in the caches."


def heat_map(plan: BudgetPlan) -> str:
    """Budgets per (layer, KV head) as SVG, a column per layer; the stronger, the more is kept; dashed layers slide."""
    layers, high = plan.geometry.layers, plan.geometry.kv_heads * CELL
    cells = "".join(_cells(plan))
    ticks = "".join(
        f'<text x="{layer * CELL + CELL / 2}" y="{high + 14}" text-anchor="middle">{layer}</text>'
        for layer in range(0, layers, 5)
    )
    return (
        f'<svg class=map viewBox="0 0 {layers * CELL} {high + 18}" style="max-width:{layers * WIDEST}px" role=img '
        f'aria-label="budget of every layer and KV head">{cells}{ticks}</svg>'
    )


def _cells(plan: BudgetPlan) -> Iterator[str]:
    most = max((tokens for row in plan.tokens for tokens in row), default=1)
    for layer, row in enumerate(plan.tokens):
        for head in range(plan.geometry.kv_heads):
            shade, words = ("slides", "slides") if not row else (f"{row[head] / most:.3f}", f"{row[head]:,} tokens")
            fill = "class=slides" if not row else f'class=cell fill-opacity="{shade}"'
            yield (
                f'<rect {fill} x="{layer * CELL}" y="{head * CELL}" width="{CELL - GAP}" height="{CELL - GAP}" rx="3">'
                f"<title>layer {layer}, KV head {head}: {words}{_bits(plan, layer, head)}</title></rect>"
            )


def _bits(plan: BudgetPlan, layer: int, head: int) -> str:
    budget = plan.layers[layer]
    return "" if budget is None else f", keys in {budget.key_bits[head]} and values in {budget.value_bits[head]} bits"


def _legend(plan: BudgetPlan) -> str:
    tokens = [tokens for row in plan.tokens for tokens in row]
    if not tokens:
        return "Every layer slides."
    mean = sum(tokens) / len(tokens)
    return (
        f"Layers from left to right, KV heads from top to bottom; {min(tokens):,} to {max(tokens):,} tokens per head, "
        f"{mean:,.0f} in the mean, of {plan.context_length:,}. The stronger the colour, the more is kept; point at a "
        "cell for its numbers."
    )


def size(amount: float) -> str:
    """Bytes for people."""
    if amount < 1024:
        return f"{amount:,.0f} B"
    power = min(3, int(math.log(amount, 1024)))
    return f"{amount / 1024**power:,.1f} {('B', 'KiB', 'MiB', 'GiB')[power]}"
