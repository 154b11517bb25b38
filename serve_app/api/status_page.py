"""The status page: what is served, how full each pool is, and how the plan spends its bytes.

The page has no script and loads nothing else. The browser reloads it every few seconds.
"""

import math
from collections.abc import Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from baklava.evaluation.heat_map import plot_heat_map
from baklava.plan.budget_plan import BudgetPlan
from serve_app.replication.replica_sync import ReplicaReport

REFRESH_SECONDS = 3

PAGE_HEADERS = {
    "Refresh": str(REFRESH_SECONDS),
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}

_TEMPLATE = Template((Path(__file__).parent / "status_page.html").read_text())


def render_page(model_card: dict[str, Any], plan: BudgetPlan, reports: Sequence[ReplicaReport]) -> str:
    """Return the page as HTML."""
    eviction, prefill = plan.eviction, plan.prefill
    facts = {
        "Plan": f"<code>{plan.digest}</code>",
        "Maximum per sequence": format_bytes(plan.bytes_per_sequence),
        f"Full cache at {plan.context_length:,} tokens": format_bytes(plan.full_bytes_per_sequence),
        "Plan / full cache": f"{plan.ratio:.1%}",
        "Eviction": escape(f"{eviction.method}, {eviction.sinks} sinks, every {eviction.eviction_interval} tokens"),
        "Prefill": escape(prefill.mode + (f", {prefill.chunk_size} tokens" if prefill.chunk_size else "")),
        "Allocation": escape(plan.allocation.method),
    }
    return _TEMPLATE.substitute(
        model=escape(str(model_card["id"])),
        max_model_len=f"{model_card['max_model_len']:,}",
        facts=_definitions(facts),
        replicas="".join(_replica(report, plan) for report in reports),
        heat_map=plot_heat_map(plan),
        legend=_legend(plan),
    )


def _definitions(items: dict[str, str]) -> str:
    return "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in items.items())


def _replica(report: ReplicaReport, plan: BudgetPlan) -> str:
    state = report.state
    counts = state["counts"]
    status = "dead" if not state["alive"] else "draining" if state["draining"] else "ready"
    old_plan = "" if state["plan"] == plan.digest else f" still on plan <code>{escape(state['plan'])}</code>"
    failure = f"<p class=failed>{escape(report.failure)}</p>" if report.failure else ""
    free = max(0, state["pool_bytes"] - state["reserved_bytes"])
    numbers = {
        "running": f"{state['running']:,}",
        "waiting": f"{state['waiting']:,}",
        f"more sequences of {plan.context_length:,} tokens fit": f"{free // plan.bytes_per_sequence:,}",
        "of the KV entries are cached": _share(state["cached_entries"], state["full_entries"]),
        "of the prompt tokens came from the prefix cache": _share(counts["cached_tokens"], counts["prompt_tokens"]),
        "tokens generated": f"{counts['generation_tokens']:,}",
    }
    outcomes = " · ".join(f"{counts[name]:,} {name}" for name in ("finished", "cancelled", "failed", "rejected"))
    return f"""<section class=replica>
<h3>{escape(report.replica)} <b class={status}>{status}</b>{old_plan}</h3>{failure}
<dl class=numbers>{_definitions(numbers)}</dl>
{_pool(state)}
<p class=muted>Requests: {outcomes}</p>
</section>"""


def _share(part: int, total: int) -> str:
    return f'<span title="{part:,} of {total:,}">{part / total:.1%}</span>' if total else "–"


def _pool(state: dict[str, Any]) -> str:
    """Return a bar of the pool, with the numbers below.

    It shows pinned prefixes, bytes allocated, bytes only reserved, and earlier prompts.
    """
    pool_bytes = max(1, state["pool_bytes"])
    prefixes = state["prefix_cache_bytes"]
    reserved = max(0, state["reserved_bytes"] - prefixes)
    earlier = state["cached_prompt_bytes"]
    allocated = max(0, min(state["allocated_bytes"] - earlier, state["reserved_bytes"]) - prefixes)
    segments = {"prefixes": prefixes, "allocated": allocated, "reserved": reserved - allocated, "earlier": earlier}
    start, bars = 0.0, []
    for name, amount in segments.items():
        width = 100 * amount / pool_bytes
        bars.append(f'<rect class={name} x="{start:.3f}%" width="{width:.3f}%" height="18"/>')
        start += width
    label = (
        f"{format_bytes(allocated)} allocated of {format_bytes(reserved)} reserved in a pool of "
        f"{format_bytes(pool_bytes)}"
    )
    legend = {
        "allocated": f"{format_bytes(allocated)} allocated (peak {format_bytes(state['peak_bytes'])})",
        "reserved": f"{format_bytes(reserved)} reserved",
        "prefixes": f"{format_bytes(prefixes)} pinned prefixes",
        "earlier": f"{format_bytes(earlier)} earlier prompts, which make way",
        "free": f"pool of {format_bytes(pool_bytes)}, {state['reserved_bytes'] / pool_bytes:.1%} reserved",
    }
    keys = "".join(f"<span><i class={name}></i>{text}</span> " for name, text in legend.items())
    return (
        f'<svg class=pool width="100%" height="18" role=img aria-label="{label}"><rect class=free width="100%" '
        f'height="18"/>{"".join(bars)}</svg><p class="muted keys">{keys}</p>'
    )


def _legend(plan: BudgetPlan) -> str:
    # A budget may exceed the length, since it includes the entries of one eviction interval.
    tokens = [min(tokens, plan.context_length) for row in plan.tokens for tokens in row]
    if not tokens:
        return "All layers have a sliding window and no budget."
    return (
        f"{min(tokens):,} to {max(tokens):,} entries per head, {sum(tokens) / len(tokens):,.0f} on average, of "
        f"{plan.context_length:,}. A stronger colour means more. Point at a cell to see its number."
    )


def format_bytes(amount: float) -> str:
    """Return bytes in a unit that people read, such as 1.5 KiB."""
    if amount < 1024:
        return f"{amount:,.0f} B"
    power = min(3, int(math.log(amount, 1024)))
    return f"{amount / 1024**power:,.1f} {('B', 'KiB', 'MiB', 'GiB')[power]}"
