"""Summarize a study: means and paired differences, with bootstrap intervals over documents."""

import json
import math
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from statistics import fmean
from typing import Any, Literal

from baklava.data.windows import Window
from baklava.evaluation.intervals import Interval, bootstrap_mean, bootstrap_ratio
from baklava.evaluation.speed import machine_info
from benchmarks.fidelity.inputs import BASELINE, CONTROL_METHODS, SEARCHED, MethodPlans
from benchmarks.fidelity.run import StudyResult

Metric = Literal["dnll", "kl"]
METRICS: tuple[Metric, Metric] = ("dnll", "kl")

ALL_CORPORA = "all"
"""Name of the union of all corpora except the controls."""


def summarize(result: StudyResult) -> dict[str, Any]:
    """Return the study as JSON; intervals are [mean, low, high], with null for a bound that one document cannot give.

    "factors" are the baseline's loss as a multiple of the searched plan's, for each budget and corpus.
    """
    controls = result.config.texts.controls
    scored = tuple(window for name, windows in result.windows.items() if name not in controls for window in windows)
    corpora = {**result.windows, ALL_CORPORA: scored}
    methods = {entry.method.name: entry.method for entry in result.plans}
    return {
        "benchmark": "fidelity",
        "split": result.config.split,
        "provenance": _provenance(result),
        "corpora": [_corpus(result, name, windows) for name, windows in corpora.items()],
        "methods": [{"name": m.name, "label": m.label, "group": m.group} for m in methods.values()],
        "skipped": [asdict(skipped) for skipped in result.skipped],
        "factors": [factor for name, windows in corpora.items() for factor in _factors(result, name, windows)],
        "rows": [
            _row(result, entry, name, windows)
            for name, windows in corpora.items()
            for entry in result.plans
            if name not in controls or entry.method.name in CONTROL_METHODS
        ],
    }


def to_json(content: Mapping[str, Any]) -> str:
    """Return JSON with one line per list element, so that two versions can be compared line by line."""
    parts = []
    for name, value in content.items():
        if isinstance(value, list):
            lines = ",\n".join(f"  {json.dumps(item, ensure_ascii=False, allow_nan=False)}" for item in value)
            text = f"[\n{lines}\n ]" if value else "[]"
        else:
            text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        parts.append(f" {json.dumps(name)}: {text}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def metric_by_window(result: StudyResult, entry: MethodPlans, windows: Sequence[Window], metric: Metric) -> list[float]:
    """Return `dnll` or `kl` of each window in nats per token, as a mean over the entry's plans."""
    return [fmean(_metric(result, plan.digest, window, metric) for plan in entry.plans) for window in windows]


def _metric(result: StudyResult, digest: str, window: Window, metric: Metric) -> float:
    row = result.rows[window.name, digest]
    return row.kl if metric == "kl" else row.nll - row.nll_full


def _row(result: StudyResult, entry: MethodPlans, corpus: str, windows: Sequence[Window]) -> dict[str, Any]:
    documents = [window.document for window in windows]
    searched = _find_plans(result, SEARCHED.name, entry.budget)
    allocated_bytes = [
        result.rows[window.name, plan.digest].allocated_bytes for window in windows for plan in entry.plans
    ]
    row: dict[str, Any] = {
        "method": entry.method.name,
        "budget": entry.budget,
        "corpus": corpus,
        "plan": entry.spec,
        "bytes": max(plan.bytes_per_sequence for plan in entry.plans),
        "ratio": round(max(plan.ratio for plan in entry.plans), 5),
        "allocated_bytes": max(allocated_bytes),
        "n": len(windows),
        "documents": len(set(documents)),
    }
    for metric in METRICS:
        values = metric_by_window(result, entry, windows, metric)
        row[metric] = rounded_interval(bootstrap_mean(values, documents))
        if searched and searched is not entry:
            pairs = zip(values, metric_by_window(result, searched, windows, metric), strict=True)
            differences = [value - searched_value for value, searched_value in pairs]
            row[f"{metric}_above_searched"] = rounded_interval(bootstrap_mean(differences, documents))
    return row


def _find_plans(result: StudyResult, method: str, budget: float) -> MethodPlans | None:
    return next((entry for entry in result.plans if (entry.method.name, entry.budget) == (method, budget)), None)


def _factors(result: StudyResult, corpus: str, windows: Sequence[Window]) -> Iterator[dict[str, Any]]:
    documents = [window.document for window in windows]
    for budget in result.config.budgets:
        searched = _find_plans(result, SEARCHED.name, budget)
        baseline = _find_plans(result, BASELINE.name, budget)
        if searched and baseline:
            factor: dict[str, Any] = {"budget": budget, "corpus": corpus}
            for metric in METRICS:
                numerator = metric_by_window(result, baseline, windows, metric)
                denominator = metric_by_window(result, searched, windows, metric)
                factor[metric] = rounded_interval(bootstrap_ratio(numerator, denominator, documents))
            yield factor


def _corpus(result: StudyResult, name: str, windows: Sequence[Window]) -> dict[str, Any]:
    documents = [window.document for window in windows]
    content: dict[str, Any] = {"name": name, "n": len(windows), "documents": len(set(documents))}
    if result.rows:
        gains = {window: row.gain for (window, _), row in result.rows.items()}
        content["gain"] = rounded_interval(bootstrap_mean([gains[window.name] for window in windows], documents))
    return content if name == ALL_CORPORA else content | {"windows": [window.name for window in windows]}


def _provenance(result: StudyResult) -> dict[str, Any]:
    config = result.config
    return {
        "command": shlex.join(["python", *sys.argv]),
        "model": config.model,
        "code": sorted({row.code for row in result.rows.values()}),
        "seed": config.texts.seed,
        "context": config.texts.context,
        "continuation": config.texts.continuation,
        "search_corpus": config.texts.search_corpus,
        "controls": list(config.texts.controls),
        "budgets": list(config.budgets),
        "machine": machine_info(),
    }


def rounded_interval(interval: Interval) -> list[float | None]:
    """Return [mean, low, high] to five digits, with null for values that are not finite."""
    values = (interval.mean, interval.low, interval.high)
    return [float(f"{value:.5g}") if math.isfinite(value) else None for value in values]
