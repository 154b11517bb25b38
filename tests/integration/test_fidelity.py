import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from search_process import make_model, make_texts

from baklava.allocation.plan_spec import resolve_plan
from baklava.data.documents import load_documents
from baklava.data.windows import Window, make_splits
from baklava.errors import UserError
from baklava.evaluation.intervals import bootstrap_mean, bootstrap_ratio
from baklava.evaluation.window_scoring import score_plan
from baklava.plan.budget_plan import BudgetPlan, full_cache_plan
from baklava.profiling.profile import uniform_profile
from baklava.runtime.model_loader import load, load_config
from benchmarks.fidelity import inputs as study_inputs
from benchmarks.fidelity import run as study_run
from benchmarks.fidelity import scoring
from benchmarks.fidelity.inputs import (
    BASELINE,
    METHODS,
    MethodPlans,
    NamedMethod,
    SearchedPlans,
    ShuffledHeads,
    StudyMethod,
    StudyTexts,
    make_windows,
    plan_methods,
    select_methods,
    unused_documents,
)
from benchmarks.fidelity.report import SECTION, find_row, format_nats, format_tables, plot
from benchmarks.fidelity.results import ALL_CORPORA, summarize, to_json
from benchmarks.fidelity.run import StudyConfig, StudyResult, run_study, study_config
from benchmarks.fidelity.scoring import Row, score_plans
from benchmarks.markdown_page import section_markers, write_section
from tuning.search.inputs import WINDOWS_PER_SPLIT

SEARCHED = "searched"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, twenty documents to search on, four others, and a plan for half of the bytes."""
    folder = tmp_path_factory.mktemp("study")
    loaded = load(str(make_model(folder / "model")))
    make_texts(folder / "searched", count=20)
    make_texts(folder / "other", count=4, words=500)
    plan = resolve_plan(
        "uniform+heavy_hitter:0.5", loaded, 192, lambda: uniform_profile(loaded.identity, loaded.geometry)
    )
    (folder / "plans").mkdir()
    plan.plan.write(folder / "plans/demo-50.json")
    return folder


def config_in(home: Path, *methods: StudyMethod, budgets: tuple[float, ...] = (0.5, 0.3)) -> StudyConfig:
    texts = StudyTexts(
        search_corpus=str(home / "searched"),
        test_corpora=((str(home / "searched"), 2), (str(home / "other"), 3)),
        num_skipped_windows=5,
        controls=(str(home / "other"),),
        context=160,
        continuation=32,
    )
    own = (
        BASELINE,
        NamedMethod("baklava", "BaKlaVa", "published"),
        SearchedPlans(SEARCHED, "baklava, searched", "searched", folder=home / "plans"),
    )
    return StudyConfig(str(home / "model"), "test", texts, methods or own, budgets)


def lines(folder: Path) -> list[str]:
    return (folder / "rows.jsonl").read_text().splitlines()


def test_a_killed_study_continues_and_scores_nothing_twice(home: Path, tmp_path: Path) -> None:
    config = config_in(home)
    whole = run_study(config, tmp_path)
    # windows x (two methods at two budgets, the searched plan at one); the control without baklava
    assert len(whole.rows) == 2 * 5 + 3 * 3
    journal, first = tmp_path / "rows.jsonl", lines(tmp_path)
    journal.write_text("\n".join(first[:7]) + "\n" + first[7][:20])
    again = run_study(config, tmp_path)
    assert lines(tmp_path)[:7] == first[:7]
    assert len(lines(tmp_path)) == len(first)
    assert {key: row.nll for key, row in again.rows.items()} == {key: row.nll for key, row in whole.rows.items()}


def test_a_complete_study_is_only_summarized(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_study(config_in(home), tmp_path)
    monkeypatch.setattr(study_run, "score_plans", None)
    found = summarize(run_study(config_in(home, BASELINE), tmp_path))
    assert [row["method"] for row in found["rows"]] == ["uniform"] * 6
    assert found["rows"][0]["allocated_bytes"] <= found["rows"][0]["bytes"]


def test_worker_processes_score_the_same_as_one_process(home: Path, tmp_path: Path) -> None:
    config = config_in(home, BASELINE, budgets=(0.5,))
    alone, shared = (run_study(config, tmp_path / str(number), workers=number) for number in (1, 2))
    assert shared.rows.keys() == alone.rows.keys()
    assert all(shared.rows[key].nll == pytest.approx(row.nll, abs=1e-5) for key, row in alone.rows.items())


def test_an_error_in_a_worker_ends_the_study(home: Path) -> None:
    identity, geometry = load_config(str(make_model(home / "model2")))
    plan = full_cache_plan(identity, geometry, 600)
    window = Window("too long", "d", (5,) * 600, 560)
    with pytest.raises(UserError, match="longer than the 512"):
        list(scoring.score_in_processes(str(home / "model2"), [(window, (plan,))], 1, "code"))


def test_a_cache_that_exceeds_its_reservation_ends_the_study(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load(str(home / "model"))
    plan = BudgetPlan.read(home / "plans/demo-50.json")
    monkeypatch.setattr(scoring, "score_plan", lambda *args: replace(score_plan(*args), allocated_bytes=10**9))
    with pytest.raises(RuntimeError, match="allocated 1000000000 bytes on w, but reserves"):
        list(score_plans(loaded, Window("w", "d", (5,) * 192, 160), [plan], "code"))


def test_the_test_sees_no_document_that_the_search_saw(home: Path) -> None:
    loaded = load(str(home / "model"))
    config = config_in(home).texts
    searched = load_documents([config.search_corpus])
    seen = make_splits(
        searched,
        loaded.tokenizer,
        context=160,
        continuation=32,
        seed=0,
        search=WINDOWS_PER_SPLIT,
        validation=WINDOWS_PER_SPLIT,
    )
    parts = (seen.calibration, seen.search, seen.validation)
    scored = make_windows(config, "test", loaded.tokenizer)
    assert scored.calibration == seen.calibration
    for windows in scored.scored.values():
        assert {window.document for window in windows}.isdisjoint(w.document for part in parts for w in part)
    assert [len({window.document for window in windows}) for windows in scored.scored.values()] == [2, 3]
    validated = make_windows(config, "validation", loaded.tokenizer)
    assert validated.scored == {config.search_corpus: seen.validation[:2]}


def test_a_copy_of_a_searched_document_is_not_unseen(home: Path) -> None:
    loaded = load(str(home / "model"))
    searched = load_documents([str(home / "searched")])
    seen = make_splits(searched, loaded.tokenizer, context=160, continuation=32, seed=0, search=6, validation=6)
    copy = next(each for each in searched if each.name == seen.search[0].document)
    left = unused_documents([*searched, type(copy)("a copy", copy.text)], seen)
    assert len(left) == 20 - 15
    assert "a copy" not in {each.name for each in left}
    with pytest.raises(UserError, match="leaves none for the test"):
        unused_documents([copy], seen)


def test_a_method_without_a_plan_is_skipped_with_the_reason(home: Path) -> None:
    candidates = [
        BASELINE,
        NamedMethod("nonsense", "", "packed"),
        SearchedPlans(SEARCHED, "baklava, searched", "searched", folder=home / "plans"),
    ]
    loaded = load(str(home / "model"))
    flat = uniform_profile(loaded.identity, loaded.geometry)

    def make(spec: str) -> BudgetPlan:
        return resolve_plan(spec, loaded, 192, lambda: flat).plan

    planned, skipped = plan_methods(candidates, (0.5, 0.001), 192, make)
    assert [(one.method.name, one.budget) for one in planned] == [("uniform", 0.5), (SEARCHED, 0.5)]
    reasons = [one.reason for one in skipped]
    expected = ("raise it to at least", "unknown allocation", "unknown allocation", "cannot read plan")
    assert all(word in reason for word, reason in zip(expected, reasons, strict=True))
    assert "made for 192 tokens" in plan_methods(candidates[2:], (0.5,), 200, make)[1][0].reason
    too_large = SearchedPlans(
        SEARCHED, "baklava, searched", "searched", folder=home / "plans", files=((0.3, "demo-50.json"),)
    )
    assert "more than the budget of 30.00%" in plan_methods([too_large], (0.3,), 192, make)[1][0].reason


def test_a_budget_without_a_search_takes_its_fallback(home: Path) -> None:
    searched = SearchedPlans(
        SEARCHED, "baklava, searched", "searched", folder=home / "plans", fallbacks=((0.5, "a:0.5"), (0.2, "b:0.2"))
    )
    made: list[str] = []
    plan = BudgetPlan.read(home / "plans/demo-50.json")

    def make(spec: str) -> BudgetPlan:
        made.append(spec)
        return plan

    assert searched.plans(0.5, make) == (str(home / "plans/demo-50.json"), (plan,))
    assert searched.plans(0.2, make) == ("b:0.2", (plan,))
    assert made == [str(home / "plans/demo-50.json"), "b:0.2"]


def test_unknown_methods_and_budgets_are_reported_in_one_sentence() -> None:
    nothing = {"model": "demo", "windows": None, "context": 3072, "continuation": 512}
    with pytest.raises(UserError, match="--methods nobody: no such method; choose among uniform, "):
        study_config(**nothing, split="test", methods=["nobody"], budgets=None)
    with pytest.raises(UserError, match="--budgets 30 is not a share"):
        study_config(**nothing, split="test", methods=None, budgets=[30])
    assert [each.name for each in select_methods(None)] == list(METHODS)
    config = study_config(**{**nothing, "windows": 2}, split="validation", methods=["searched"], budgets=[0.3])
    assert config.texts.test_corpora == (("botocore", 2), ("ifcraft", 2), ("factbook", 2))


def by_hand(home: Path) -> StudyResult:
    """Two corpora of two windows each and a control; every loss is written here."""
    plan = BudgetPlan.read(home / "plans/demo-50.json")
    draws = tuple(plan.model_copy(update={"context_length": 192 + extra}) for extra in (1, 2, 3))
    plans_of = {"uniform": (draws[0],), SEARCHED: (draws[1],), "shuffled": (plan, draws[2])}
    losses = {
        "uniform": [0.4, 0.8, 0.6, 0.2, -0.1],
        SEARCHED: [0.1, 0.2, 0.2, 0.1, 0.3],
        "shuffled": [0.3, 0.3, 0.3, 0.3, 0.3],
    }
    windows = [Window(f"w{number}", f"d{number}", (1, 2), 1) for number in range(5)]
    found: dict[tuple[str, str], Row] = {}
    for name, series in losses.items():
        for number, each in enumerate(plans_of[name]):
            for window, loss in zip(windows, series, strict=True):
                # the draws lie .1 to both sides of the mean that is written above
                nll = 2 + loss + (0.1 * (-1) ** number if name == "shuffled" else 0)
                found[window.name, each.digest] = row(each, window, nll, kl=loss / 2)
    texts = StudyTexts(controls=("c",))
    taking = tuple(MethodPlans(METHODS[name], 0.125, "spec", plans) for name, plans in plans_of.items())
    scored = {"a": tuple(windows[:2]), "b": tuple(windows[2:4]), "c": tuple(windows[4:])}
    return StudyResult(StudyConfig(texts=texts, budgets=(0.125,)), scored, taking, (), found)


def row(plan: BudgetPlan, window: Window, nll: float, kl: float) -> Row:
    size, gain = plan.bytes_per_sequence - 8, 0.25
    base = {"run": "r", "code": "c", "seconds": 1.0, "nll_full": 2.0}
    return Row(plan=plan.digest, window=window.name, nll=nll, kl=kl, gain=gain, allocated_bytes=size, **base)


def test_means_differences_and_factors_are_those_calculated_by_hand(home: Path) -> None:
    found = summarize(by_hand(home))
    uniform = find_row(found, "uniform", 0.125)
    assert uniform is not None
    assert uniform["dnll"][0] == pytest.approx(0.5)  # the control does not count
    assert uniform["kl"][0] == pytest.approx(0.25)
    expected = bootstrap_mean([0.4 - 0.1, 0.8 - 0.2, 0.6 - 0.2, 0.2 - 0.1], list("abcd"))
    assert uniform["dnll_above_searched"] == pytest.approx([expected.mean, expected.low, expected.high], rel=1e-4)
    assert (uniform["n"], uniform["documents"], uniform["bytes"] - uniform["allocated_bytes"]) == (4, 4, 8)
    control = find_row(found, "uniform", 0.125, "c")
    assert control is not None
    assert control["dnll"] == [pytest.approx(-0.1), None, None]
    shuffled = find_row(found, "shuffled", 0.125)
    assert shuffled is not None
    assert shuffled["dnll"] == pytest.approx([0.3, 0.3, 0.3])
    searched = find_row(found, SEARCHED, 0.125)
    assert searched is not None
    assert "dnll_above_searched" not in searched
    factor = {each["corpus"]: each for each in found["factors"]}
    assert factor[ALL_CORPORA]["dnll"][0] == pytest.approx(2.0 / 0.6, rel=1e-4)
    assert factor["a"]["dnll"][:2] == pytest.approx([4, 4])
    assert [each["gain"][0] for each in found["corpora"]] == [0.25] * 4
    assert json.loads(to_json(found)) == found


def test_a_ratio_is_resampled_by_document_and_infinite_over_zero() -> None:
    found = bootstrap_ratio([2.0, 4.0, 9.0], [1.0, 2.0, 3.0], ["a", "a", "b"])
    assert found.mean == 15 / 6
    assert found.low < 2 < 3 < found.high  # only a, only b, and two documents know little
    assert (found.windows, found.documents) == (3, 2)
    assert np.isnan(bootstrap_ratio([2.0], [1.0], ["a"]).low)
    nothing = bootstrap_ratio([1.0, 1.0], [0.5, -0.5], ["a", "b"])
    assert nothing.mean == nothing.high == np.inf
    assert nothing.low == 2  # no scale where the mean is infinite


def test_the_bounds_of_a_ratio_are_those_of_its_inverse_and_never_negative() -> None:
    small, large, documents = [0.01, 0.02, 0.2, 0.03], [1.0, 2.0, 3.0, 9.0], ["a", "b", "c", "d"]
    found, inverse = bootstrap_ratio(large, small, documents), bootstrap_ratio(small, large, documents)
    assert 0 < found.low < found.mean < found.high
    assert [found.mean, found.low, found.high] == pytest.approx([1 / inverse.mean, 1 / inverse.high, 1 / inverse.low])
    gain = bootstrap_ratio([-1.0, 2.0], [1.0, 1.0], ["a", "b"])  # the numerator may be below 0 in a sample
    assert (gain.mean, gain.low) == (0.5, 0)
    assert bootstrap_ratio([-1.0, -2.0], [1.0, 1.0], ["a", "b"]).mean == 0


def test_the_table_marks_the_lowest_loss_and_ties(home: Path) -> None:
    text = format_tables(summarize(by_hand(home)))
    for metric, uniform, searched in (("KL to", ".25", ".075"), ("loss over", ".50", ".15")):
        table = next(part for part in text.split("\n\n") if part.startswith(f"| {metric} the full cache"))
        assert f"| uniform, sinks + recent | {uniform} |" in table
        assert f"| **baklava, searched** | **{searched}** |" in table
    # Percentiles of the searched plan's loss are .100 and .200, of the pairs' KL .0875 and .2625. Four documents need
    # 1.86 times the distance from the mean: Student's t of 3.16 over 1.96, times the root of 4 / 3.
    assert "| 12.5 % | .075 [.028, .12] | .15 [.057, .24] | uniform, sinks + recent | .17 [.012, .34] |" in text
    assert "3.33 × [" in text
    assert "| c (control) | 1 | .25 | -.050 | .15 | .15 |" in text


def test_numbers_have_two_digits_and_no_leading_zero() -> None:
    numbers = (0.000151, 0.0000021, 0.0374, 0.5, 1.26, -0.0312, 0.0)
    assert [*map(format_nats, numbers)] == [".00015", ".00000", ".037", ".50", "1.3", "-.031", ".0"]
    assert format_nats(None) == "–"


def test_tables_go_between_the_markers_of_a_page(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    begin, end = section_markers(SECTION)
    page.write_text(f"before\n{begin}\nold\n{end}\nafter\n")
    for text in ("first", "second"):
        write_section(page, SECTION, text)
    assert page.read_text() == f"before\n{begin}\n\nsecond\n\n{end}\nafter\n"
    for wrong in ("nothing", begin, f"{end} {begin}", f"{begin}{begin}{end}"):
        page.write_text(wrong)
        with pytest.raises(UserError, match="needs one line <!-- fidelity -->"):
            write_section(page, SECTION, "text")
        assert page.read_text() == wrong
    with pytest.raises(UserError, match="cannot be read"):
        write_section(tmp_path / "none.md", SECTION, "text")


def test_the_plot_labels_every_method_that_competes(home: Path) -> None:
    drawn = ElementTree.fromstring(plot(summarize(by_hand(home))))
    named = [element.text for element in drawn.iter("{http://www.w3.org/2000/svg}text")]
    assert {"uniform, sinks + recent", "baklava, searched", "12.5 %"} <= set(named)
    assert "baklava, heads shuffled" not in named


def test_each_shuffled_plan_has_its_own_seed(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dealt: list[int] = []

    def shuffled(plan: BudgetPlan, seed: int) -> BudgetPlan:
        dealt.append(seed)
        return plan

    monkeypatch.setattr(study_inputs, "shuffled", shuffled)
    searched = SearchedPlans(SEARCHED, "baklava, searched", "searched", folder=home / "plans")
    spec, plans = ShuffledHeads("shuffled", "", "control", source=searched).plans(
        0.5, lambda path: BudgetPlan.read(Path(path))
    )
    assert dealt == [0, 1, 2]
    assert len(plans) == 3
    assert spec.endswith("demo-50.json, dealt to random heads")


def methods_by_group(group: str) -> Sequence[str]:
    return [each.name for each in METHODS.values() if each.group == group]


def test_every_group_has_methods_and_names_are_plan_specs() -> None:
    assert all(map(methods_by_group, ("published", "packed", "searched", "control")))
    assert all("@4" in name for name in methods_by_group("packed"))
    assert not any("@" in name for name in methods_by_group("published"))
