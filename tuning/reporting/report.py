"""Pages: one HTML file that needs nothing else, neither a network nor a script, in the light and dark of its reader."""

import json
from collections.abc import Mapping
from html import escape
from pathlib import Path
from string import Template

from baklava.evaluation.formatting import counted, share
from baklava.serialization import atomic_write_text
from tuning.reporting.baseline_plot import rivals_chart
from tuning.reporting.heat_map import heat_map
from tuning.reporting.history_plot import trial_chart
from tuning.reporting.param_plots import importance_chart, slices_chart
from tuning.reporting.pareto_plot import fidelity_chart
from tuning.reporting.svg import standalone
from tuning.selection.ablation import format_ratio
from tuning.selection.param_importance import MAX_TRIALS, comparable_trials
from tuning.selection.result import SearchResult
from tuning.selection.validation import ValidatedPlan, byte_ratio, log_kl_ratio
from tuning.study.trial import best_trials

HERE = Path(__file__).parent / "templates"


def write_page(path: Path, template: str, fields: Mapping[str, str]) -> None:
    """Write a page whose content is a template beside this file; `fields`, "title" and "lead" too, are HTML already."""
    style, content = (HERE / "style.css").read_text(), filled(template, fields)
    atomic_write_text(
        path, filled("page.html", {**fields, "style": style, "kind": Path(template).stem, "content": content})
    )


def filled(template: str, fields: Mapping[str, str]) -> str:
    """A template beside this file with its fields filled in; a field that is missing is an error."""
    return Template((HERE / template).read_text()).substitute(fields)


def figures(values: Mapping[str, str]) -> str:
    """Large figures with small names."""
    return "".join(f"<div><b>{escape(value)}</b><span>{escape(name)}</span></div>" for name, value in values.items())


def pairs(values: Mapping[str, object]) -> str:
    """Names and values, for a <dl>."""
    shown = {name: f"{value:.3g}" if isinstance(value, float) else str(value) for name, value in values.items()}
    return "".join(
        f"<dt>{escape(name.replace('_', ' '))}</dt><dd>{escape(value)}</dd>" for name, value in shown.items()
    )


def steps(commands: Mapping[str, str]) -> str:
    """What to do next, and the command for it, for a <dl>."""
    return "".join(
        f"<dt>{escape(what)}</dt><dd><code>{escape(command)}</code></dd>" for what, command in commands.items()
    )


FIDELITY_NOTE = "Down and to the left is better; both scales are logarithmic."
FRONT_NOTE = (
    "The line is the front of what was validated: no plan beats one of its points in both bytes and loss. Every point "
    "of it is a plan file in front/, and the marked one became plan.json."
)


def write_report(outcome: SearchResult, path: Path) -> None:
    """Write the report of a search."""
    settings, winner = outcome.settings, outcome.winner
    fields = {
        "title": escape(f"{settings.model_name} at {share(outcome.plan.ratio)} of its KV cache"),
        "lead": escape(_lead(outcome)),
        "figures": _figures(outcome),
        "registered": escape(_registered(outcome)),
        "fidelity_note": escape(f"{FIDELITY_NOTE} {FRONT_NOTE if settings.front else ''}"),
        "ranking": "".join(_row(entry, winner) for entry in outcome.ranking),
        "knobs": pairs(_knobs(outcome)),
        "worth": escape("; ".join(outcome.ablation_summary)),
        "learned": "".join(f"<li>{escape(sentence)}</li>" for sentence in learned(outcome)),
        "parameters": _parameters(outcome),
        "settings": pairs(_settings(outcome)),
        "steps": steps(_steps(outcome)),
    }
    charts = {"heat": heat_map(outcome.plan), "rivals": rivals_chart(outcome)}
    charts["chart"] = trial_chart(outcome.trials, settings.goal)
    charts["fidelity"] = fidelity_chart(outcome.validation, outcome.trials, settings.goal)
    write_page(path, "report.html", {**fields, **charts})


def standalone_plots(outcome: SearchResult) -> dict[str, str]:
    """The charts of the report that are worth a file, by name."""
    goal = outcome.settings.goal
    drawn = {
        "fidelity.svg": fidelity_chart(outcome.validation, outcome.trials, goal),
        "against_heuristics.svg": rivals_chart(outcome),
        "trials.svg": trial_chart(outcome.trials, goal),
    }
    if outcome.param_importances:
        drawn["importance.svg"] = importance_chart(outcome.param_importances)
        drawn["slices.svg"] = slices_chart(outcome.trials, goal, outcome.param_importances)
    return {name: standalone(picture) for name, picture in drawn.items() if picture.startswith("<svg")}


def learned(outcome: SearchResult) -> list[str]:
    """What the trials taught, in sentences."""
    told = _sizes(outcome) if outcome.settings.front else _bests(outcome)
    names = [f"{name.replace('_', ' ')} ({part:.0%})" for name, part in list(outcome.param_importances.items())[:3]]
    if names:
        told.append(f"Most of the difference between trials came from {', '.join(names)}.")
    else:
        told.append("Too few trials scored every window to tell which parameters decided.")
    stopped, failed = outcome.count("pruned"), outcome.count("failed")
    told += [f"{counted(stopped, 'trial')} stopped early, as others lost less on the same windows."] if stopped else []
    return told + ([f"{counted(failed, 'trial')} failed."] if failed else [])


def _bests(outcome: SearchResult) -> list[str]:
    goal, found = outcome.settings.goal, []
    for refines, what in ((False, "trial that was drawn"), (True, "refinement")):
        for best in best_trials([trial for trial in outcome.trials if bool(trial.parent_trial) is refines], goal):
            found.append(f"The best {what} came to {goal.format_metrics(best.metrics)} (trial {best.trial}).")
    return found


def _sizes(outcome: SearchResult) -> list[str]:
    """Losses of different sizes do not compare: there is a front instead of a best."""
    smallest, largest = (share(byte_ratio(outcome.validation.front[end])) for end in (0, -1))
    plans = counted(len(outcome.validation.front), "plan")
    return [f"The front has {plans} between {smallest} and {largest} of the bytes."]


def _parameters(outcome: SearchResult) -> str:
    goal, shares = outcome.settings.goal, outcome.param_importances
    if not shares:
        return ""
    fields = {
        "importance": importance_chart(shares),
        "slices": slices_chart(outcome.trials, goal, shares),
        "trials": str(min(MAX_TRIALS, len(comparable_trials(outcome.trials)))),
        "objective": escape(goal.value_name),
    }
    return filled("report_parameters.html", fields)


def _registered(outcome: SearchResult) -> str:
    if outcome.registered:
        told = outcome.registered.message
        return f"{told[:1].upper()}{told[1:]}."
    return "MLflow was down when the search ended, so the plan is not registered; its file serves as well."


def _steps(outcome: SearchResult) -> dict[str, str]:
    """Serving first, and a question to the server behind it."""
    body = json.dumps({"model": outcome.plan.model.id, "prompt": "Once upon a time", "max_tokens": 32})
    asked = f"curl http://127.0.0.1:8000/v1/completions -H 'Content-Type: application/json' -d '{body}'"
    first = {"serve it": outcome.next_steps["serve it"], "ask it": asked}
    return {**first, **outcome.next_steps}


def _settings(outcome: SearchResult) -> dict[str, object]:
    settings = outcome.settings
    shown = {name: value for name, value in settings.model_dump().items() if value is not None}
    return {**shown, "texts": " ".join(settings.texts), "bits": " ".join(settings.bits), "refine": settings.num_refinements}


def _lead(outcome: SearchResult) -> str:
    settings, dnll = outcome.settings, outcome.winner.metrics["dnll"]
    return (
        f"{outcome.winner.candidate.name} keeps {settings.model_name} inside {share(outcome.plan.ratio)} of the bytes "
        f"of its full KV cache at {settings.context_length} tokens, for {dnll:+.4f} nats per token on windows that no "
        "trial was scored on."
    )


def _figures(outcome: SearchResult) -> str:
    metrics = outcome.winner.metrics
    held, full = (n / 2**20 for n in (outcome.plan.bytes_per_sequence, outcome.plan.full_bytes_per_sequence))
    shown = {
        "KL to the full cache": f"{metrics['kl']:.4f}",
        "perplexity": f"{metrics['ppl']:.2f} (full {metrics['ppl_full']:.2f})",
        "bytes per sequence": f"{held:.3g} of {full:.3g} MiB",
        "trials": ", ".join(f"{n} {s}" for s in ("finished", "pruned", "failed") if (n := outcome.count(s))),
    }
    return figures(shown)


def _row(entry: ValidatedPlan, winner: ValidatedPlan) -> str:
    metrics, plan = entry.metrics, entry.candidate.plan
    kls = [f"{metrics[name]:.4f}" for name in ("kl_geometric", "kl")]
    numbers = [*kls, f"{metrics['dnll']:+.4f}", f"{metrics['ppl']:.3f}", share(plan.ratio)]
    cells = "".join(f"<td>{number}</td>" for number in numbers)
    mark = ' class="winner"' if entry is winner else ""
    return f"<tr{mark}><th>{escape(entry.candidate.name)}</th>{cells}<td>{_against(entry, winner)}</td></tr>"


def _against(entry: ValidatedPlan, winner: ValidatedPlan) -> str:
    if entry is winner:
        return "winner"
    mean, _, bounds = format_ratio(log_kl_ratio([entry], winner)).partition(" ")
    return f"{mean} <small>{bounds}</small>" if bounds else mean


def _knobs(outcome: SearchResult) -> dict[str, object]:
    allocation, eviction = outcome.plan.allocation, outcome.plan.eviction
    shared = {"sinks": eviction.sinks, "recent": eviction.recent_ratio, "interval": eviction.eviction_interval}
    packed = {"centroids": eviction.centroids, "staged": eviction.full_precision_recent}
    trial = outcome.winner.candidate.trial
    return {
        "allocation": allocation.method,
        **{name: value for name, value in allocation.params.items() if name != "shifts"},
        **({"bits": trial.params["bits"]} if trial else {}),
        "eviction": eviction.method,
        **shared,
        **packed,
        **eviction.params,
    }
