"""What a study found, in figures: means and paired differences, with intervals over documents."""

import json
import math
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from statistics import fmean
from typing import Any, Literal

from baklava.data.windows import Window
from baklava.evaluation.bootstrap import Interval, bootstrap_mean, bootstrap_ratio
from baklava.evaluation.speed.timing import machine_info
from benchmarks.fidelity.inputs import Entry
from benchmarks.fidelity.methods import BASELINE, CONTROLLED, OURS
from benchmarks.fidelity.run import Study

Metric = Literal["dnll", "kl"]
METRICS: tuple[Metric, Metric] = ("dnll", "kl")

TOGETHER = "together"
"""All corpora but the controls."""


def figures(found: Study) -> dict[str, Any]:
    """The study as JSON. An interval is [mean, low, high], a bound that one document cannot give is null."""
    together = tuple(w for name, each in found.scored.items() if name not in found.asked.texts.controls for w in each)
    corpora = {**found.scored, TOGETHER: together}
    methods = {entry.contestant.name: entry.contestant for entry in found.entries}
    return {
        "benchmark": "fidelity",
        "split": found.asked.split,
        "provenance": _provenance(found),
        "corpora": [_corpus(found, name, windows) for name, windows in corpora.items()],
        "methods": [{"name": each.name, "label": each.label, "group": each.group} for each in methods.values()],
        "left_out": [asdict(one) for one in found.left_out],
        "factors": [factor for name, windows in corpora.items() for factor in _factors(found, name, windows)],
        "rows": [
            _row(found, entry, name, windows)
            for name, windows in corpora.items()
            for entry in found.entries
            if name not in found.asked.texts.controls or entry.contestant.name in CONTROLLED
        ],
    }


def dumped(content: Mapping[str, Any]) -> str:
    """JSON with a line for each element of a list, so that two versions can be told apart line by line."""
    parts = []
    for name, value in content.items():
        if isinstance(value, list):
            lines = ",\n".join(f"  {json.dumps(each, ensure_ascii=False, allow_nan=False)}" for each in value)
            text = f"[\n{lines}\n ]" if value else "[]"
        else:
            text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        parts.append(f" {json.dumps(name)}: {text}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def values(found: Study, entry: Entry, windows: Sequence[Window], metric: Metric) -> list[float]:
    """`dnll` or `kl` window by window, in nats per token; the mean over the plans where a contestant has several."""
    return [fmean(_value(found, plan.digest, window, metric) for plan in entry.plans) for window in windows]


def _value(found: Study, digest: str, window: Window, metric: Metric) -> float:
    row = found.rows[window.name, digest]
    return row.kl if metric == "kl" else row.nll - row.nll_full


def _row(found: Study, entry: Entry, corpus: str, windows: Sequence[Window]) -> dict[str, Any]:
    documents = [window.document for window in windows]
    ours = _entry(found, OURS.name, entry.budget)
    row: dict[str, Any] = {
        "method": entry.contestant.name,
        "budget": entry.budget,
        "corpus": corpus,
        "plan": entry.spec,
        "bytes": max(plan.bytes_per_sequence for plan in entry.plans),
        "ratio": round(max(plan.ratio for plan in entry.plans), 5),
        "allocated": max(found.rows[w.name, plan.digest].allocated_bytes for w in windows for plan in entry.plans),
        "n": len(windows),
        "documents": len(set(documents)),
    }
    for metric in METRICS:
        mine = values(found, entry, windows, metric)
        row[metric] = plain(bootstrap_mean(mine, documents))
        if ours and ours is not entry:
            theirs = values(found, ours, windows, metric)
            pairs = zip(mine, theirs, strict=True)
            row[f"{metric}_above_ours"] = plain(bootstrap_mean([mine - theirs for mine, theirs in pairs], documents))
    return row


def _entry(found: Study, method: str, budget: float) -> Entry | None:
    return next((one for one in found.entries if (one.contestant.name, one.budget) == (method, budget)), None)


def _factors(found: Study, corpus: str, windows: Sequence[Window]) -> Iterator[dict[str, Any]]:
    """How many times ours the baseline loses, budget by budget."""
    documents = [window.document for window in windows]
    for budget in found.asked.budgets:
        ours, baseline = (_entry(found, name, budget) for name in (OURS.name, BASELINE.name))
        if ours and baseline:
            factor: dict[str, Any] = {"budget": budget, "corpus": corpus}
            for metric in METRICS:
                above, below = (values(found, one, windows, metric) for one in (baseline, ours))
                factor[metric] = plain(bootstrap_ratio(above, below, documents))
            yield factor


def _corpus(found: Study, name: str, windows: Sequence[Window]) -> dict[str, Any]:
    documents = [window.document for window in windows]
    content: dict[str, Any] = {"name": name, "n": len(windows), "documents": len(set(documents))}
    if found.rows:
        gains = {window: row.gain for (window, _), row in found.rows.items()}
        content["gain"] = plain(bootstrap_mean([gains[window.name] for window in windows], documents))
    return content if name == TOGETHER else content | {"windows": [window.name for window in windows]}


def _provenance(found: Study) -> dict[str, Any]:
    asked = found.asked
    return {
        "command": shlex.join(["python", *sys.argv]),
        "model": asked.model,
        "code": sorted({row.code for row in found.rows.values()}),
        "seed": asked.texts.seed,
        "context": asked.texts.context,
        "continuation": asked.texts.continuation,
        "searched": asked.texts.searched,
        "controls": list(asked.texts.controls),
        "budgets": list(asked.budgets),
        "machine": machine_info(),
    }


def plain(found: Interval) -> list[float | None]:
    """[mean, low, high] to five digits; null for what is not finite."""
    return [float(f"{value:.5g}") if math.isfinite(value) else None for value in (found.mean, found.low, found.high)]
