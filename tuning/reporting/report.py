"""The report of a search."""

import json
from html import escape
from pathlib import Path
from typing import Any

from baklava.evaluation.heat_map import plot_heat_map
from baklava.evaluation.intervals import format_share, pluralize
from tuning.reporting.html import (
    commands_html,
    definitions_html,
    figures_html,
    fill_template,
    standalone_svg,
    write_page,
)
from tuning.reporting.plots import (
    plot_baselines,
    plot_optimization_history,
    plot_param_importances,
    plot_pareto_front,
    plot_slices,
)
from tuning.selection.result import MAX_TRIALS, SearchResult, comparable_trials
from tuning.selection.validation import ValidatedPlan, byte_ratio, format_ratio, log_kl_ratio
from tuning.study.trial import best_trials

PARETO_NOTE = "Down and to the left is better; both scales are logarithmic."
FRONT_NOTE = (
    "The line is the front of the validated plans: no plan beats one of its points in both bytes and loss. Every point "
    "on it is a plan file in front/, and the marked one became plan.json."
)


def write_report(result: SearchResult, path: Path) -> None:
    """Write the report of a search."""
    settings, winner = result.settings, result.winner
    options = {name: value for name, value in settings.model_dump().items() if value is not None}
    options |= {"texts": " ".join(settings.texts), "bits": " ".join(settings.bits), "refine": settings.num_refinements}
    body = {"model": result.plan.model.id, "prompt": "Once upon a time", "max_tokens": 32}
    request = f"curl http://127.0.0.1:8000/v1/completions -H 'Content-Type: application/json' -d '{json.dumps(body)}'"
    steps = {"serve it": result.next_steps["serve it"], "send a request": request, **result.next_steps}
    registered = "MLflow was down when the search ended, so the plan is not registered; serve its file instead."
    if result.registered:
        message = result.registered.message
        registered = f"{message[:1].upper()}{message[1:]}."
    fields = {
        "title": escape(f"{settings.model_name} at {format_share(result.plan.ratio)} of its KV cache"),
        "lead": escape(
            f"The winner, {winner.candidate.name}, stores the KV cache of {settings.model_name} in "
            f"{format_share(result.plan.ratio)} of its full bytes at {settings.context_length} tokens, and changes the "
            f"loss by {winner.metrics['dnll']:+.4f} nats per token on windows that no trial was scored on."
        ),
        "figures": _figures(result),
        "steps": commands_html(steps),
        "registered": escape(registered),
        "pareto": plot_pareto_front(result.validation, result.trials, settings.goal),
        "pareto_note": escape(f"{PARETO_NOTE} {FRONT_NOTE if settings.front else ''}"),
        "baselines": plot_baselines(result),
        "ranking": "".join(_ranking_row(entry, winner) for entry in result.ranking),
        "ablations": escape("; ".join(result.ablation_summary)),
        "heat_map": plot_heat_map(result.plan),
        "findings": "".join(f"<li>{escape(sentence)}</li>" for sentence in findings(result)),
        "history": plot_optimization_history(result.trials, settings.goal),
        "parameters": _parameters(result),
        "winner_params": definitions_html(_winner_params(result)),
        "settings": definitions_html(options),
    }
    write_page(path, "report.html", fields)


def standalone_plots(result: SearchResult) -> dict[str, str]:
    """Return plots of the report as contents of files, by file name."""
    goal, importances = result.settings.goal, result.param_importances
    plots = {
        "fidelity.svg": plot_pareto_front(result.validation, result.trials, goal),
        "against_baselines.svg": plot_baselines(result),
        "trials.svg": plot_optimization_history(result.trials, goal),
    }
    if importances:
        plots["importance.svg"] = plot_param_importances(importances)
        plots["slices.svg"] = plot_slices(result.trials, goal, importances)
    return {name: standalone_svg(plot) for name, plot in plots.items() if plot.startswith("<svg")}


def findings(result: SearchResult) -> list[str]:
    """Return what the trials showed, in sentences."""
    goal, front = result.settings.goal, result.validation.front
    sentences = []
    if front:  # losses at different sizes do not compare, so there is no best
        smallest, largest = format_share(byte_ratio(front[0])), format_share(byte_ratio(front[-1]))
        sentences.append(
            f"The front has {pluralize(len(front), 'plan')} between {smallest} and {largest} of the bytes."
        )
    else:
        for is_refined, kind in ((False, "sampled trial"), (True, "refinement")):
            for best in best_trials([trial for trial in result.trials if bool(trial.parent_trial) is is_refined], goal):
                outcome = goal.format_metrics(best.metrics)
                sentences.append(f"The best {kind} reached {outcome} (trial {best.trial}).")
    importances = list(result.param_importances.items())[:3]
    if importances:
        names = ", ".join(f"{name.replace('_', ' ')} ({importance:.0%})" for name, importance in importances)
        sentences.append(f"Most of the difference between trials came from {names}.")
    else:
        sentences.append("Too few trials scored every window to say which parameters matter.")
    if pruned := result.count("pruned"):
        sentences.append(f"{pluralize(pruned, 'trial')} stopped early, since others lost less on the same windows.")
    if failed := result.count("failed"):
        sentences.append(f"{pluralize(failed, 'trial')} failed.")
    return sentences


def _parameters(result: SearchResult) -> str:
    goal, importances = result.settings.goal, result.param_importances
    if not importances:
        return ""
    fields = {
        "importances": plot_param_importances(importances),
        "slices": plot_slices(result.trials, goal, importances),
        "trials": str(min(MAX_TRIALS, len(comparable_trials(result.trials)))),
        "objective": escape(goal.value_name),
    }
    return fill_template("report_parameters.html", fields)


def _figures(result: SearchResult) -> str:
    metrics, plan = result.winner.metrics, result.plan
    mebibytes, full_mebibytes = plan.bytes_per_sequence / 2**20, plan.full_bytes_per_sequence / 2**20
    counts = ((result.count(status), status) for status in ("finished", "pruned", "failed"))
    return figures_html(
        {
            "KL to the full cache": f"{metrics['kl']:.4f}",
            "perplexity": f"{metrics['ppl']:.2f} (full {metrics['ppl_full']:.2f})",
            "bytes per sequence": f"{mebibytes:.3g} of {full_mebibytes:.3g} MiB",
            "trials": ", ".join(f"{count} {status}" for count, status in counts if count),
        }
    )


def _ranking_row(entry: ValidatedPlan, winner: ValidatedPlan) -> str:
    metrics = entry.metrics
    cells = [f"{metrics['kl_geometric']:.4f}", f"{metrics['kl']:.4f}", f"{metrics['dnll']:+.4f}"]
    cells += [f"{metrics['ppl']:.3f}", format_share(entry.candidate.plan.ratio)]
    if entry is winner:
        cells.append("winner")
    else:
        ratio, _, interval = format_ratio(log_kl_ratio([entry], winner)).partition(" ")
        cells.append(f"{ratio} <small>{interval}</small>" if interval else ratio)
    css_class = ' class="winner"' if entry is winner else ""
    row = "".join(f"<td>{cell}</td>" for cell in cells)
    return f"<tr{css_class}><th>{escape(entry.candidate.name)}</th>{row}</tr>"


def _winner_params(result: SearchResult) -> dict[str, object]:
    allocation, eviction = result.plan.allocation, result.plan.eviction
    trial = result.winner.candidate.trial
    return {
        "allocation": allocation.method,
        **{name: _readable(value) for name, value in allocation.params.items() if name != "log2_factors"},
        **({"bits": trial.params["bits"]} if trial else {}),
        "eviction": eviction.method,
        "sinks": eviction.sinks,
        "recent": eviction.recent_ratio,
        "interval": eviction.eviction_interval,
        "centroids": eviction.centroids,
        "residual length": eviction.residual_length,
        "fit references": eviction.fit_references,
        **({"fit ridge": f"{eviction.fit_ridge:.3g}"} if eviction.fit_references else {}),
        **eviction.params,
    }


def _readable(value: Any) -> Any:
    """A method inside another one as METHOD(PARAM=VALUE, ...), as in a plan's name; other values as they are."""
    if not isinstance(value, dict):
        return value
    params = (
        f"{name}={number:.3g}" if isinstance(number, float) else f"{name}={number}"
        for name, number in value["params"].items()
    )
    return f"{value['method']}({', '.join(params)})"
