"""Aggregated results and what the summary says about them."""

import json
import math
from collections.abc import Callable, Sequence

import pytest
from plan_factory import make_plan

from baklava.allocation.plan_spec import ResolvedPlan
from baklava.evaluation.evaluator import PromptResult, WindowResult
from baklava.evaluation.results import Evaluation, TaskScore, aggregate_results, best_plan, summarize
from baklava.evaluation.speed import Speed
from baklava.evaluation.task_scoring import Answer, PlanAnswers
from baklava.evaluation.window_scoring import WindowScore
from baklava.eviction import StreamingLLM
from baklava.plan.budget_plan import full_cache_plan
from baklava.runtime.model_loader import LoadedModel
from tuning.evaluation.report import format_tables, write_report
from tuning.evaluation.run_dir import EvaluationSettings

Maker = Callable[..., LoadedModel]
Losses = Sequence[tuple[float, float, float]]

SETTINGS = EvaluationSettings(model="demo", plans=("full", "small", "other"))


def window(number: int, losses: Sequence[float], document: str | None = None, gain: float = 0.3) -> WindowResult:
    """A window on which every plan has a KL of half its loss."""
    name = f"w{number}"
    scores = tuple(WindowScore(name, document or name, 2.0, 2.0 + loss, loss / 2, 1000, 1.0) for loss in losses)
    return WindowResult(
        name=name, document=document or name, tokens=100, context_gain=gain, short_context=512, scores=scores
    )


def prompt(number: int, full: Sequence[float], *plans: Sequence[float]) -> PromptResult:
    def of(values: Sequence[float]) -> tuple[Answer, ...]:
        return tuple(Answer(value, 2.0 - value) for value in values)

    return PromptResult(
        name=f"needle:{number}",
        task="needle",
        tokens=100,
        metrics=("exact",) * len(full),
        chance=(0.25,) * len(full),
        full=of(full),
        closed_book=of([0.0] * len(full)),
        plans=tuple(PlanAnswers(of(values), 500) for values in plans),
    )


@pytest.fixture
def plans(tiny: Maker) -> list[ResolvedPlan]:
    loaded = tiny()
    small = make_plan(loaded, [[10, 20], [12, 8]], StreamingLLM(), bits=16)
    everything = full_cache_plan(loaded.identity, loaded.geometry, 100)
    return [ResolvedPlan("full", everything), ResolvedPlan("small", small), ResolvedPlan("other", small)]


@pytest.fixture
def evaluations(plans: list[ResolvedPlan]) -> list[Evaluation]:
    windows = [window(n, [0.0, 0.01 + 0.001 * n, 0.05 + 0.001 * n]) for n in range(6)]
    prompts = [prompt(n, [1, 1], [1, 1], [1, 0], [0, 0]) for n in range(4)]
    speeds = {named.name: Speed(100, 5.0, 2.0, 1.0, 1.1, 1 << 20) for named in plans}
    return aggregate_results(plans, windows, prompts, speeds)


def test_tasks_are_scored_question_by_question_against_the_full_cache(evaluations: list[Evaluation]) -> None:
    full, small, other = (each.tasks["needle"] for each in evaluations)
    assert (full.score, small.score, other.score) == (1.0, 0.5, 0.0)
    assert (small.full_score, small.closed_book_score, small.chance, small.questions) == (1.0, 0.0, 0.25, 8)
    assert (small.loss.mean, small.loss.low, small.loss.high) == (0.5, 0.5, 0.5)
    assert small.nll == pytest.approx(1.5)


def test_the_interval_of_a_task_resamples_prompts_not_questions() -> None:
    in_few_prompts = [prompt(n, [1] * 10, [n % 2] * 10) for n in range(4)]
    in_many_prompts = [prompt(n, [1], [n % 2]) for n in range(40)]
    wide, narrow = (TaskScore.from_results(results, 0, 10).loss for results in (in_few_prompts, in_many_prompts))
    assert wide.high - wide.low > 2 * (narrow.high - narrow.low)


def test_plans_are_compared_pair_by_pair(evaluations: list[Evaluation]) -> None:
    _, small, other = evaluations
    more = other.paired_difference(small, "kl")
    assert (more.low, more.high) == pytest.approx((0.02, 0.02))
    assert small.mean("kl").high - small.mean("kl").low > 1e-4
    assert best_plan(evaluations) is small
    assert small.allocated_bytes == 1000


def test_the_summary_is_plain_sentences(evaluations: list[Evaluation]) -> None:
    text, full, small, _, against = summarize(evaluations)
    assert text.startswith("6 windows of 6 documents; with all of its context instead of 512 tokens")
    assert "perplexity +0.0 % [0.0, 0.0]; needle 8 → 8 of 8" in full
    assert "small keeps 12.5% of the bytes at 100 tokens" in small
    assert "needle 8 → 4 of 8; decode 2.0 × as fast at 100 tokens." in small
    assert against == "small is nearer to the full cache than other by 0.0200 nats per token of KL [0.0200, 0.0200]."


def test_text_without_context_gain_gets_a_warning(plans: list[ResolvedPlan]) -> None:
    windows = [window(n, [0.0, 0.1, 0.1], gain=0.01) for n in range(3)]
    assert "cannot show which plan is better" in summarize(aggregate_results(plans, windows, []))[0]


def test_a_difference_within_noise_is_described_as_chance(plans: list[ResolvedPlan]) -> None:
    windows = [window(n, [0.0, 0.1, 0.1 + (0.02 if n % 2 else -0.018)]) for n in range(6)]
    assert "cannot tell from chance" in summarize(aggregate_results(plans, windows, []))[-1]


def test_one_document_has_no_interval_and_its_json_no_nan(plans: list[ResolvedPlan]) -> None:
    evaluations = aggregate_results(plans, [window(0, [0.0, 0.1, 0.2], "d"), window(1, [0.0, 0.1, 0.2], "d")], [])
    content = json.loads(json.dumps([each.as_json() for each in evaluations], allow_nan=False))
    assert content[1]["interval"]["kl"]["low"] is None
    assert content[1]["mean"]["kl"] == pytest.approx(0.05)
    assert math.isnan(evaluations[1].mean("kl").low)
    assert "one document gives no interval" in summarize(evaluations)[-1]


def test_the_json_has_what_scripts_read(evaluations: list[Evaluation]) -> None:
    content = evaluations[1].as_json()
    assert content["plan"].keys() >= {"bytes_per_sequence", "full_bytes_per_sequence", "ratio"}
    assert content["windows"][0].keys() >= {"name", "nll_full", "nll", "dnll", "kl"}
    assert content["tasks"]["needle"].keys() >= {"score", "answer_nll", "chance", "n"}
    assert content["mean"].keys() >= {"dnll", "kl"}
    assert content["allocated_bytes"] == 1000


@pytest.mark.parametrize("shown", [slice(None), slice(0, 1), slice(1, 2)])
def test_a_table_and_a_report_are_made_of_any_of_them(
    evaluations: list[Evaluation], shown: slice, tmp_path_factory: pytest.TempPathFactory
) -> None:
    chosen = evaluations[shown]
    head, *rows = format_tables(chosen).split("\n\n")[0].splitlines()
    assert len({len(line) for line in (head, *rows)}) == 1, "columns are aligned"
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_report(chosen, SETTINGS, path)
    page = path.read_text()
    assert "nan" not in page.lower().replace("nano", "")
    assert all(each.name in page for each in chosen)


def test_names_in_a_report_are_text(plans: list[ResolvedPlan], tmp_path_factory: pytest.TempPathFactory) -> None:
    sly = [ResolvedPlan("<script>alert(1)</script>", plans[1].plan)]
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_report(aggregate_results(sly, [window(n, [0.1], f"<b>{n}") for n in range(2)], []), SETTINGS, path)
    assert "<script" not in path.read_text()
