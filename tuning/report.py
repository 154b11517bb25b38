"""The report: one HTML file that needs nothing else, neither a network nor a script."""

import math
from html import escape
from pathlib import Path

from tuning.charts import heat_map, trial_chart
from tuning.outcome import Outcome
from tuning.page import figures, pairs, steps, write_page
from tuning.validate import Validated, above


def write_report(outcome: Outcome, path: Path) -> None:
    """Write the report of a search."""
    settings, winner = outcome.settings, outcome.winner
    fields = {
        "title": escape(f"{settings.model_name} at {settings.budget:.0%} of its KV cache"),
        "lead": escape(_lead(outcome)),
        "figures": _figures(outcome),
        "ranking": "".join(_row(entry, winner) for entry in outcome.ranking),
        "knobs": pairs(_knobs(outcome)),
        "settings": pairs({**settings.model_dump(), "texts": " ".join(settings.texts)}),
        "steps": steps(outcome.next_steps),
    }
    charts = {"heat": heat_map(outcome.plan), "chart": trial_chart(outcome.trials, settings.objective)}
    write_page(path, "report.html", {**fields, **charts})


def _lead(outcome: Outcome) -> str:
    settings, dnll = outcome.settings, outcome.winner.metrics["dnll"]
    return (
        f"{outcome.winner.candidate.name} keeps {settings.model_name} inside {outcome.plan.ratio:.1%} of the bytes of "
        f"its full KV cache at {settings.context_length} tokens, for {dnll:+.4f} nats per token on windows that no "
        "trial was scored on."
    )


def _figures(outcome: Outcome) -> str:
    metrics = outcome.winner.metrics
    held, full = (n / 2**20 for n in (outcome.plan.bytes_per_sequence, outcome.plan.full_bytes_per_sequence))
    shown = {
        "KL to the full cache": f"{metrics['kl']:.4f}",
        "perplexity": f"{metrics['ppl']:.2f} (full {metrics['ppl_full']:.2f})",
        "bytes per sequence": f"{held:.3g} of {full:.3g} MiB",
        "trials": ", ".join(f"{n} {s}" for s in ("finished", "pruned", "failed") if (n := outcome.count(s))),
    }
    return figures(shown)


def _row(entry: Validated, winner: Validated) -> str:
    metrics, plan = entry.metrics, entry.candidate.plan
    kls = [f"{metrics[name]:.4f}" for name in ("kl_geometric", "kl")]
    numbers = [*kls, f"{metrics['dnll']:+.4f}", f"{metrics['ppl']:.3f}", f"{plan.ratio:.1%}"]
    cells = "".join(f"<td>{number}</td>" for number in numbers)
    mark = ' class="winner"' if entry is winner else ""
    return f"<tr{mark}><th>{escape(entry.candidate.name)}</th>{cells}<td>{_against(entry, winner)}</td></tr>"


def _against(entry: Validated, winner: Validated) -> str:
    if entry is winner:
        return "winner"
    more = above(entry, winner)
    mean, low, high = (math.exp(value) for value in (more.mean, more.low, more.high))
    return f"{mean:.2f} <small>[{low:.2f}, {high:.2f}]</small>"


def _knobs(outcome: Outcome) -> dict[str, object]:
    allocation, eviction = outcome.plan.allocation, outcome.plan.eviction
    shared = {"sinks": eviction.sinks, "recent": eviction.recent, "interval": eviction.interval}
    return {
        "allocation": allocation.method,
        **allocation.knobs,
        "eviction": eviction.method,
        **shared,
        **eviction.knobs,
    }
