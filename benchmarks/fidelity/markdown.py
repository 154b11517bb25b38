"""The study as Markdown tables."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks.fidelity.methods import BASELINE, SEARCHED
from benchmarks.fidelity.results import ALL_CORPORA
from benchmarks.markdown_page import markdown_table

SECTION = "fidelity"
"""Name of the page's markers."""

MISSING = "–"
SHUFFLED = "shuffled"
CORPORA_BUDGET = 0.125
"""The table of corpora shows the budget nearest to this one."""

Results = Mapping[str, Any]
Row = Mapping[str, Any]


def format_tables(results: Results) -> str:
    """Return three tables: the losses at all budgets, the lead of the searched plan, and each corpus by itself."""
    tables = (_format_losses(results), _format_lead(results), _format_corpora(results))
    return "\n\n".join(table for table in tables if table)


def find_row(results: Results, method: str, budget: float, corpus: str = ALL_CORPORA) -> Row | None:
    """Return the row of a method at a budget on a corpus, or None if the method has no plan there."""
    key = (method, budget, corpus)
    return next((row for row in results["rows"] if (row["method"], row["budget"], row["corpus"]) == key), None)


def format_percent(budget: float) -> str:
    """Return a share of the bytes, such as "12.5 %"."""
    return f"{100 * budget:.4g} %"


def format_nats(value: float | None) -> str:
    """Return nats per token to three decimals, without a leading zero."""
    if value is None:
        return MISSING
    text = f"{round(value, 3) + 0.0:.3f}"
    return text.replace("0.", ".", 1) if text.lstrip("-").startswith("0.") else text


def format_interval(interval: Sequence[float | None], format_value: Callable[[float | None], str] = format_nats) -> str:
    """Return a mean with its interval in brackets."""
    mean, low, high = interval
    if low is None:
        return format_value(mean)
    return f"{format_value(mean)} [{format_value(low)}, {'∞' if high is None else format_value(high)}]"


def _format_losses(results: Results) -> str:
    budgets = _budgets(results)
    rows = []
    for method in results["methods"]:
        if method["group"] != "control":
            name = f"**{method['label']}**" if method["name"] == SEARCHED.name else method["label"]
            rows.append([name, *(_format_loss(results, method["name"], budget) for budget in budgets)])
    table = markdown_table(["loss over the full cache, nats/token", *map(format_percent, budgets)], rows)
    scored = next(corpus for corpus in results["corpora"] if corpus["name"] == ALL_CORPORA)
    return (
        f"{table}\n\nMeans over {scored['n']} windows of {scored['documents']} {results['split']} documents. "
        "Bold: the lowest loss at that budget; italic: the 95 % interval of the paired difference to the searched plan "
        f"contains 0; {MISSING}: no plan at that budget."
    )


def _format_loss(results: Results, method: str, budget: float) -> str:
    row = find_row(results, method, budget)
    if row is None:
        return MISSING
    loss = format_nats(row["dnll"][0])
    if row is _best_row(results, budget):
        return f"**{loss}**"
    difference = row.get("dnll_above_searched")
    is_tie = difference and difference[1] is not None and difference[1] <= 0 <= difference[2]
    return f"*{loss}*" if is_tie else loss


def _format_lead(results: Results) -> str:
    """Compare the searched plan with the best other method and with the baseline, one row per budget."""
    labels = {method["name"]: method["label"] for method in results["methods"]}
    factors = {(factor["budget"], factor["corpus"]): factor["dnll"] for factor in results["factors"]}
    rows = []
    for budget in _budgets(results):
        searched = find_row(results, SEARCHED.name, budget)
        rival = _best_row(results, budget, exclude=(SEARCHED.name,))
        if searched and rival:
            factor = factors.get((budget, ALL_CORPORA))
            rows.append(
                [
                    format_percent(budget),
                    format_interval(searched["dnll"]),
                    labels[rival["method"]],
                    format_interval(rival["dnll_above_searched"]),
                    format_interval(factor, _format_factor) if factor else MISSING,
                ]
            )
    header = [
        "bytes",
        SEARCHED.label,
        "best other method",
        "its loss minus the searched plan's (paired)",
        f"{BASELINE.label}, 16 bits: its loss over the searched plan's",
    ]
    return markdown_table(header, rows) if rows else ""


def _format_corpora(results: Results) -> str:
    """Show what the context is worth in each corpus, and what plans lose there."""
    budget = min(_budgets(results), key=lambda budget: abs(budget - CORPORA_BUDGET))
    methods = [
        method
        for method in results["methods"]
        if method["name"] in (BASELINE.name, SEARCHED.name, SHUFFLED) and find_row(results, method["name"], budget)
    ]
    rows = []
    for corpus in results["corpora"]:
        name = corpus["name"]
        is_control = name in results["provenance"]["controls"]
        method_rows = [find_row(results, method["name"], budget, name) for method in methods]
        rows.append(
            [
                f"{name} (control)" if is_control else name,
                str(corpus["n"]),
                format_interval(corpus["gain"]) if "gain" in corpus else MISSING,
                *(format_interval(row["dnll"]) if row else MISSING for row in method_rows),
            ]
        )
    labels = [f"{method['label']}, {format_percent(budget)}" for method in methods]
    return markdown_table(["corpus", "windows", "gain from context", *labels], rows)


def _best_row(results: Results, budget: float, exclude: Sequence[str] = ()) -> Row | None:
    """Return the row with the lowest loss at a budget; controls do not compete."""
    competing = [method["name"] for method in results["methods"] if method["group"] != "control"]
    rows = [row for name in competing if name not in exclude and (row := find_row(results, name, budget))]
    return min(rows, key=lambda row: row["dnll"][0], default=None)


def _budgets(results: Results) -> list[float]:
    """Return the budgets at which any method has a plan, in descending order."""
    return sorted({row["budget"] for row in results["rows"]}, reverse=True)


def _format_factor(value: float | None) -> str:
    return MISSING if value is None else f"{value:.3g} ×"
