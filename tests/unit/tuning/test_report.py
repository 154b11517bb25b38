"""Facts about the report of a search: what its charts show, and what it says was learned."""

import random
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path

import pytest
from search_factory import SPACE, record, scored, task

from baklava.evaluation.heat_map import plot_heat_map
from baklava.plan.budget_plan import BudgetPlan
from baklava.plan.geometry import CacheGeometry
from tuning.optimizers.baselines import baseline_methods, initial_params
from tuning.reporting.html import linear_ticks, log_ticks, standalone_svg
from tuning.reporting.plots import plot_optimization_history, plot_pareto_front
from tuning.reporting.report import findings, standalone_plots, write_report
from tuning.selection.promotion import PromotionDecision, RegisteredPlan
from tuning.selection.result import MIN_TRIALS, SearchResult, param_importances
from tuning.selection.validation import Ablation, ValidatedPlan, ValidationResult, log_kl_ratio
from tuning.study.objective import Goal
from tuning.study.settings import SearchSettings
from tuning.study.trial import TrialRecord

SVG = "{http://www.w3.org/2000/svg}"
KL = Goal(budget=0.3)


def trials(count: int = 12) -> tuple[TrialRecord, ...]:
    """Drawn trials of which the bits decide and the floor does not, and one that only those in 4 bits have a say in."""
    source, found = random.Random(0), []
    for number in range(1, count + 1):
        bits, floor = source.choice(["4", "16"]), source.random()
        loss = (0.1 if bits == "4" else 0.4) + 0.001 * source.random()
        residual = {"residual": source.choice([16, 0])} if bits == "4" else {}
        found.append(record(number, [loss] * 4, bits=bits, floor=floor, **residual))
    return tuple(found)


def outcome(tmp_path: Path, tried: tuple[TrialRecord, ...], **changes: object) -> SearchResult:
    settings = SearchSettings.from_options(model="m", texts=["t"], context=10, continuation=2, trials=20, budget=0.3)
    ranking = tuple(whole(scored(name, 0.3, loss)) for name, loss in (("trial 1", 0.1), ("<b>other</b>", 0.2)))
    rival = Ablation("at random", log_kl_ratio(ranking[1:], ranking[0]))
    found = SearchResult(
        out=tmp_path,
        settings=settings,
        plan=ranking[0].candidate.plan,
        validation=ValidationResult(ranking[0], ranking),
        ablations=(rival,),
        trials=tried,
        registered=RegisteredPlan(
            "baklava-m", "4", PromotionDecision(False, "champion stays with version 3, which is better")
        ),
    )
    return replace(found, **changes)


def whole(entry: ValidatedPlan) -> ValidatedPlan:
    return replace(entry, metrics={**entry.metrics, "ppl_full": 1.0})


def page(found: SearchResult) -> str:
    write_report(found, found.out / "report.html")
    return (found.out / "report.html").read_text()


def charts(text: str) -> list[ElementTree.Element]:
    return [ElementTree.fromstring(f"<svg{part.partition('</svg>')[0]}</svg>") for part in text.split("<svg")[1:]]


def test_the_report_shows_the_front_the_baselines_the_budgets_and_the_findings(tmp_path: Path) -> None:
    text = page(outcome(tmp_path, trials()))
    assert [chart.attrib["aria-label"] for chart in charts(text)] == [
        "KL over bytes",
        "KL over the winner's, plan by plan",
        "entries and bits per layer and KV head",
        "KL by trial",
        "importance of parameters",
        "objective by parameter",
    ]
    assert "baklava-serve --plan models:/baklava-m/4 --model m" in text
    assert "Version 4 of baklava-m: champion stays with version 3" in text
    assert "<b>other</b>" not in text
    assert "Most of the difference between trials came from bits" in text


def test_a_search_of_few_trials_has_a_report_that_says_so(tmp_path: Path) -> None:
    tried = (record(1, [0.1] * 4), record(2, [0.3] * 2, "pruned"), record(3, [], "failed"))
    text = page(outcome(tmp_path, tried, registered=None))
    assert len(charts(text)) == 4
    assert "Too few trials scored every window" in text
    assert "1 trial failed" in text
    assert "MLflow was down when the search ended" in text


def test_a_search_whose_trials_all_failed_has_charts_of_its_baselines(tmp_path: Path) -> None:
    text = page(outcome(tmp_path, (record(1, [], "failed").model_copy(update={"metrics": {}}),)))
    assert "No trial could be scored." in text


def test_refinements_and_sampled_trials_are_distinguished(tmp_path: Path) -> None:
    tried = (*trials(), record(13, [0.05] * 4, base=1, shifts=[[0.0, 0.0]] * 5))
    said = findings(outcome(tmp_path, tried))
    assert said[0].startswith("The best sampled trial reached KL 0.1")
    assert said[1] == "The best refinement reached KL 0.05 (trial 13)."


def test_the_base_of_a_refined_winner_is_readable(tmp_path: Path) -> None:
    plan = task().plan({**initial_params(SPACE)[0], "shifts": [[0.0, 0.0]] * 5})
    text = page(outcome(tmp_path, trials(), plan=plan))
    base = text.partition("<dt>base</dt><dd>")[2].partition("</dd>")[0]
    assert base.startswith(f"{plan.allocation.params['base']['method']}(")
    assert "{" not in base


def test_of_many_sizes_none_is_called_the_best(tmp_path: Path) -> None:
    ranking = tuple(whole(scored(f"trial {number}", number / 10, 1 / number)) for number in (1, 2, 3))
    found = outcome(tmp_path, trials(), validation=ValidationResult(ranking[1], ranking, ranking))
    text = page(replace(found, settings=found.settings.model_copy(update={"front": True})))
    assert "The front has 3 plans between" in text
    assert "The best sampled trial" not in text
    assert "front/" in text
    best = [part for chart in charts(text) for part in chart.iter() if part.attrib.get("class") == "best"]
    assert len(best) == 1  # the front's line, and no best so far


def test_what_decided_is_found_and_adds_up() -> None:
    shares = param_importances(trials(), KL)
    assert next(iter(shares)) == "bits"
    assert shares["bits"] > 0.8
    assert sum(shares.values()) == pytest.approx(1)
    assert list(shares.values()) == sorted(shares.values(), reverse=True)
    assert "sinks" not in shares  # the same in all of them


def test_nothing_is_said_of_few_trials_of_equal_ones_or_of_refinements() -> None:
    assert param_importances(trials(MIN_TRIALS - 1), KL) == {}
    assert param_importances([record(number, [0.1] * 4, floor=number / 10) for number in range(1, 9)], KL) == {}
    refined = [record(n, [0.1 * n] * 4, base=1, floor=n / 10) for n in range(2, 12)]
    assert param_importances([record(1, [0.1] * 4), *refined], KL) == {}


def test_the_heat_map_has_a_cell_per_head_for_entries_and_bits_of_keys_and_of_values() -> None:
    plan = baseline_methods(task().space)[0].plan(task().profile, 0.3, 2048)
    tooltips = [cell.text for cell in ElementTree.fromstring(plot_heat_map(plan)).iter("title")]
    assert len(tooltips) == 3 * plan.geometry.layers * plan.geometry.kv_heads
    assert f"layer 2, head 1: {plan.tokens[2][1]}" in tooltips


def test_the_heat_map_leaves_sliding_layers_blank() -> None:
    plan = baseline_methods(task().space)[0].plan(task().profile, 0.3, 2048)
    geometry = CacheGeometry(**{**plan.geometry.model_dump(), "windows": (None, 64, None, 64, None)})
    layers = tuple(None if window else layer for layer, window in zip(plan.layers, geometry.windows, strict=True))
    sliding = BudgetPlan.model_validate({**plan.model_dump(), "geometry": geometry, "layers": layers})
    tooltips = [cell.text for cell in ElementTree.fromstring(plot_heat_map(sliding)).iter("title")]
    assert len(tooltips) == 3 * 3 * 2
    assert not any(str(title).startswith("layer 1,") for title in tooltips)


def test_the_winner_is_marked_and_baselines_are_distinguished_from_trials(tmp_path: Path) -> None:
    found = outcome(tmp_path, trials())
    chart = ElementTree.fromstring(plot_pareto_front(found.validation, found.trials, KL))
    kinds = [part.attrib.get("class") for part in chart.iter()]
    assert kinds.count("ring") == 1
    assert kinds.count("tried") == 12
    assert kinds.count("baseline") == sum(entry.candidate.trial is None for entry in found.ranking[1:])


def test_the_axis_of_bytes_at_one_budget_does_not_magnify_rounding(tmp_path: Path) -> None:
    result = outcome(tmp_path, trials())
    chart = ElementTree.fromstring(plot_pareto_front(result.validation, result.trials, KL))
    percents = [float(part.text[:-1]) for part in chart.iter("text") if str(part.text).endswith("%")]
    assert max(percents) >= 1.3 * min(percents)
    points = [float(part.attrib["cx"]) for part in chart.iter("circle")]
    assert max(points) - min(points) < 20


def test_a_trial_that_failed_has_a_cross_with_its_reason() -> None:
    failed = TrialRecord(trial=2, params={}, metrics={}, status="failed", error="no \x1b[36m<room>")
    chart = ElementTree.fromstring(plot_optimization_history([record(1, [0.1] * 4), failed], KL))
    assert "trial 2 failed: no [36m<room>" in [title.text for title in chart.iter("title")]


def test_standalone_plots_have_their_colours(tmp_path: Path) -> None:
    plots = standalone_plots(outcome(tmp_path, trials()))
    names = {"fidelity", "against_baselines", "trials", "importance", "slices"}
    assert plots.keys() == {f"{name}.svg" for name in names}
    for plot in plots.values():
        assert ElementTree.fromstring(plot).tag == f"{SVG}svg"
        assert "--accent" in plot


def test_a_standalone_plot_shows_what_it_showed_on_the_page() -> None:
    inside = '<svg viewBox="0 0 1 1"><text>a</text></svg>'
    assert [part.text for part in ElementTree.fromstring(standalone_svg(inside)).iter(f"{SVG}text")] == ["a"]


@pytest.mark.parametrize(("low", "high"), [(0.0123, 0.987), (1e-6, 3.0), (0.299, 0.3), (5.0, 5.0), (0.1, 0.3)])
def test_ticks_are_round_few_and_inside(low: float, high: float) -> None:
    for marks in (linear_ticks(low, high), log_ticks(low, high)):
        assert len(marks) <= 11
        assert all(low * (1 - 1e-6) <= mark <= high * (1 + 1e-6) for mark in marks)
    if high > low:
        assert len(log_ticks(low, high)) >= 2
