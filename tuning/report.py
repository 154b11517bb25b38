"""The report: one HTML file that needs nothing else, neither a network nor a script."""

from html import escape
from pathlib import Path

from baklava.formats import share
from tuning.charts import heat_map, trial_chart
from tuning.front_chart import front_chart
from tuning.outcome import Outcome
from tuning.page import figures, pairs, steps, write_page
from tuning.validate import Validated, above
from tuning.worth import told

TRIALS_NOTE = (
    "Filled: scored on every window. Hollow: stopped early, at the mean over the windows it got to. Cross: failed. The "
    "line is the best so far."
)
FRONT_NOTE = (
    "The line is the front on validation windows: no plan that was scored there beats one of its points in both bytes "
    "and loss. The large point became plan.json. Hollow: finished trials, on the windows of the search. Every point is "
    "a plan file in front/."
)


def write_report(outcome: Outcome, path: Path) -> None:
    """Write the report of a search."""
    settings, winner = outcome.settings, outcome.winner
    fields = {
        "title": escape(f"{settings.model_name} at {share(outcome.plan.ratio)} of its KV cache"),
        "lead": escape(_lead(outcome)),
        "figures": _figures(outcome),
        "ranking": "".join(_row(entry, winner) for entry in outcome.ranking),
        "knobs": pairs(_knobs(outcome)),
        "worth": escape("; ".join(outcome.worth)),
        "settings": pairs(_settings(outcome)),
        "steps": steps(outcome.next_steps),
    }
    charts = {"heat": heat_map(outcome.plan), "chart": _chart(outcome), "chart_note": escape(_chart_note(outcome))}
    write_page(path, "report.html", {**fields, **charts})


def _chart(outcome: Outcome) -> str:
    goal, verdict = outcome.settings.goal, outcome.verdict
    if goal.front:
        return front_chart(verdict.front, verdict.winner, outcome.trials, goal)
    return trial_chart(outcome.trials, goal)


def _chart_note(outcome: Outcome) -> str:
    return FRONT_NOTE if outcome.settings.front else TRIALS_NOTE


def _settings(outcome: Outcome) -> dict[str, object]:
    settings = outcome.settings
    shown = {name: value for name, value in settings.model_dump().items() if value is not None}
    return {**shown, "texts": " ".join(settings.texts), "bits": " ".join(settings.bits), "refine": settings.refinements}


def _lead(outcome: Outcome) -> str:
    settings, dnll = outcome.settings, outcome.winner.metrics["dnll"]
    return (
        f"{outcome.winner.candidate.name} keeps {settings.model_name} inside {share(outcome.plan.ratio)} of the bytes "
        f"of its full KV cache at {settings.context_length} tokens, for {dnll:+.4f} nats per token on windows that no "
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
    numbers = [*kls, f"{metrics['dnll']:+.4f}", f"{metrics['ppl']:.3f}", share(plan.ratio)]
    cells = "".join(f"<td>{number}</td>" for number in numbers)
    mark = ' class="winner"' if entry is winner else ""
    return f"<tr{mark}><th>{escape(entry.candidate.name)}</th>{cells}<td>{_against(entry, winner)}</td></tr>"


def _against(entry: Validated, winner: Validated) -> str:
    if entry is winner:
        return "winner"
    mean, _, bounds = told(above([entry], winner)).partition(" ")
    return f"{mean} <small>{bounds}</small>" if bounds else mean


def _knobs(outcome: Outcome) -> dict[str, object]:
    allocation, eviction = outcome.plan.allocation, outcome.plan.eviction
    shared = {"sinks": eviction.sinks, "recent": eviction.recent, "interval": eviction.interval}
    packed = {"merging": eviction.merging, "staged": eviction.staged}
    trial = outcome.winner.candidate.trial
    return {
        "allocation": allocation.method,
        **{name: value for name, value in allocation.knobs.items() if name != "shifts"},
        **({"bits": trial.params["bits"]} if trial else {}),
        "eviction": eviction.method,
        **shared,
        **packed,
        **eviction.knobs,
    }
