"""The study as Markdown, and into a page between markers."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import markdown_page as pages
from benchmarks.fidelity.methods import BASELINE, OURS
from benchmarks.fidelity.results import TOGETHER

NAME = "fidelity"
BEGIN, END = pages.section_markers(NAME)
NONE = "–"
SHUFFLED = "shuffled"

Figures = Mapping[str, Any]
Row = Mapping[str, Any]


def table(figures: Figures) -> str:
    """The losses of all methods at all budgets, what ours is better by, and the corpora one by one."""
    return "\n\n".join(part for part in (_losses(figures), _lead(figures), _corpora(figures)) if part)


def put(page: Path, text: str) -> None:
    """Write `text` between the markers of a page, in the place of what is there; raises as `check_page`."""
    pages.write_section(page, NAME, text)


def check_page(page: Path) -> str:
    """What is on a page; raises UserError where it has not got both markers once."""
    return pages.read_checked(page, NAME)


def row_of(figures: Figures, method: str, budget: float, corpus: str = TOGETHER) -> Row | None:
    """A method at a budget on a corpus, None where it has no plan."""
    wanted = (method, budget, corpus)
    return next((row for row in figures["rows"] if (row["method"], row["budget"], row["corpus"]) == wanted), None)


def percent(budget: float) -> str:
    """A share of the bytes as people write it."""
    return f"{100 * budget:.4g} %"


def number(value: float | None) -> str:
    """Nats per token to three places, without the zero in front."""
    if value is None:
        return NONE
    text = f"{round(value, 3) + 0.0:.3f}"
    return text.replace("0.", ".", 1) if text.lstrip("-").startswith("0.") else text


def spread(found: Sequence[float | None], form: Any = number) -> str:
    """A mean with its interval in brackets."""
    mean, low, high = found
    return form(mean) if low is None else f"{form(mean)} [{form(low)}, {'∞' if high is None else form(high)}]"


def _losses(figures: Figures) -> str:
    budgets = _budgets(figures)
    lines = [
        _line(["loss over the full cache, nats/token", *map(percent, budgets)]),
        _line(["---"] * (len(budgets) + 1)),
    ]
    for method in figures["methods"]:
        if method["group"] != "control":
            cells = [_loss(figures, method["name"], budget) for budget in budgets]
            name = f"**{method['label']}**" if method["name"] == OURS.name else method["label"]
            lines.append(_line([name, *cells]))
    together = _corpus(figures, TOGETHER)
    lines += [
        "",
        f"Means over {together['n']} windows of {together['documents']} {figures['split']} documents. "
        "Bold: the least at that budget; "
        f"italic: the 95 % interval of its paired difference to ours holds 0; {NONE}: the budget does not hold it.",
    ]
    return "\n".join(lines)


def _loss(figures: Figures, method: str, budget: float) -> str:
    row = row_of(figures, method, budget)
    if row is None:
        return NONE
    text, above = number(row["dnll"][0]), row.get("dnll_above_ours")
    if row is _best(figures, budget):
        return f"**{text}**"
    return f"*{text}*" if above and above[1] is not None and above[1] <= 0 <= above[2] else text


def _lead(figures: Figures) -> str:
    """Ours with its interval, the best of the others, and the baseline as a multiple, budget by budget."""
    head = [
        "bytes",
        "ours",
        "best of the others",
        "its loss above ours, paired",
        "uniform, 16 bits, sinks + recent, over ours",
    ]
    lines = [_line(head), _line(["---"] * len(head))]
    labels = {method["name"]: method["label"] for method in figures["methods"]}
    for budget in _budgets(figures):
        ours, rival = row_of(figures, OURS.name, budget), _best(figures, budget, without=(OURS.name,))
        if ours and rival:
            times = next(
                (one["dnll"] for one in figures["factors"] if (one["budget"], one["corpus"]) == (budget, TOGETHER)),
                None,
            )
            name, above = labels[rival["method"]], spread(rival["dnll_above_ours"])
            cells = [percent(budget), spread(ours["dnll"]), name, above, spread(times, _times) if times else NONE]
            lines.append(_line(cells))
    return "\n".join(lines) if len(lines) > 2 else ""


def _corpora(figures: Figures) -> str:
    """What context is worth in each corpus, and what plans lose there at 12.5 %, or the next budget to it."""
    budget = min(_budgets(figures), key=lambda each: abs(each - 0.125))
    shown = [
        method
        for method in figures["methods"]
        if method["name"] in (BASELINE.name, OURS.name, SHUFFLED) and row_of(figures, method["name"], budget)
    ]
    head = ["corpus", "windows", "worth of context", *(f"{each['label']}, {percent(budget)}" for each in shown)]
    lines = [_line(head), _line(["---"] * len(head))]
    for corpus in figures["corpora"]:
        name = corpus["name"]
        rows = (row_of(figures, method["name"], budget, name) for method in shown)
        controls = figures["provenance"]["controls"]
        title = f"{name} (control)" if name in controls else name
        cells = [spread(row["dnll"]) if row else NONE for row in rows]
        lines.append(_line([title, str(corpus["n"]), spread(corpus["gain"]) if "gain" in corpus else NONE, *cells]))
    return "\n".join(lines)


def _best(figures: Figures, budget: float, without: Sequence[str] = ()) -> Row | None:
    """The least loss at a budget among the methods that compete."""
    names = [each["name"] for each in figures["methods"] if each["group"] != "control" and each["name"] not in without]
    rows = [row for name in names if (row := row_of(figures, name, budget))]
    return min(rows, key=lambda row: row["dnll"][0], default=None)


def _budgets(figures: Figures) -> list[float]:
    """The budgets that hold any method, from the largest on."""
    return sorted({row["budget"] for row in figures["rows"]}, reverse=True)


def _corpus(figures: Figures, name: str) -> Mapping[str, Any]:
    return next(corpus for corpus in figures["corpora"] if corpus["name"] == name)


def _times(value: float | None) -> str:
    return NONE if value is None else f"{value:.3g} ×"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
