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
from baklava.evaluation.bootstrap import bootstrap_mean, bootstrap_ratio
from baklava.evaluation.window_scoring import score_plan
from baklava.plan.budget_plan import BudgetPlan, full_cache_plan
from baklava.profiling.profile import uniform_profile
from baklava.runtime.model_loader import load, load_config
from benchmarks.fidelity import methods, scoring
from benchmarks.fidelity import run as studying
from benchmarks.fidelity import scoring as workers
from benchmarks.fidelity.inputs import Entry, Texts, cut, entries, untouched
from benchmarks.fidelity.markdown import BEGIN, END, put, row_of, table
from benchmarks.fidelity.methods import BASELINE, CONTESTANTS, Champion, Contestant, Method, Shuffled, chosen
from benchmarks.fidelity.plot import picture
from benchmarks.fidelity.results import TOGETHER, dumped, figures
from benchmarks.fidelity.run import Asked, Study, asked, study
from benchmarks.fidelity.scoring import Row, rows
from tuning.search.inputs import WINDOWS_PER_SPLIT

OURS = "ours"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, twenty documents to search on, four others, and a plan for half of the bytes."""
    folder = tmp_path_factory.mktemp("study")
    loaded = load(str(make_model(folder / "model")))
    make_texts(folder / "searched", count=20)
    make_texts(folder / "other", count=4, words=500)
    plan = resolve_plan("uniform+heavy_hitter:0.5", loaded, 192, lambda: uniform_profile(loaded.identity, loaded.geometry))
    (folder / "plans").mkdir()
    plan.plan.write(folder / "plans/demo-50.json")
    return folder


def asked_in(home: Path, *contestants: Contestant, budgets: tuple[float, ...] = (0.5, 0.3)) -> Asked:
    texts = Texts(
        searched=str(home / "searched"),
        test=((str(home / "searched"), 2), (str(home / "other"), 3)),
        controls=(str(home / "other"),),
        context=160,
        continuation=32,
    )
    own = (BASELINE, Method("baklava", "BaKlaVa", "published"), Champion(OURS, "ours", "ours", folder=home / "plans"))
    return Asked(str(home / "model"), "test", texts, contestants or own, budgets)


def lines(folder: Path) -> list[str]:
    return (folder / "rows.jsonl").read_text().splitlines()


def test_a_killed_study_goes_on_and_scores_nothing_twice(home: Path, tmp_path: Path) -> None:
    wanted = asked_in(home)
    whole = study(wanted, tmp_path)
    # windows x (two methods at two budgets, ours at one), on the control without baklava
    assert len(whole.rows) == 2 * 5 + 3 * 3
    journal, first = tmp_path / "rows.jsonl", lines(tmp_path)
    journal.write_text("\n".join(first[:7]) + "\n" + first[7][:20])
    again = study(wanted, tmp_path)
    assert lines(tmp_path)[:7] == first[:7]
    assert len(lines(tmp_path)) == len(first)
    assert {key: row.nll for key, row in again.rows.items()} == {key: row.nll for key, row in whole.rows.items()}


def test_a_complete_study_is_only_summed_up(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study(asked_in(home), tmp_path)
    monkeypatch.setattr(studying, "rows", None)
    found = figures(study(asked_in(home, BASELINE), tmp_path))
    assert [row["method"] for row in found["rows"]] == ["uniform"] * 6
    assert found["rows"][0]["allocated"] <= found["rows"][0]["bytes"]


def test_worker_processes_find_what_one_process_finds(home: Path, tmp_path: Path) -> None:
    wanted = asked_in(home, BASELINE, budgets=(0.5,))
    alone, shared = (study(wanted, tmp_path / str(number), workers=number) for number in (1, 2))
    assert shared.rows.keys() == alone.rows.keys()
    assert all(shared.rows[key].nll == pytest.approx(row.nll, abs=1e-5) for key, row in alone.rows.items())


def test_what_ends_a_worker_ends_the_study(home: Path) -> None:
    identity, geometry = load_config(str(make_model(home / "model2")))
    plan = full_cache_plan(identity, geometry, 600)
    window = Window("too long", "d", (5,) * 600, 560)
    with pytest.raises(UserError, match="longer than the 512"):
        list(workers.in_processes(str(home / "model2"), [(window, (plan,))], 2, "code"))


def test_a_cache_above_its_promise_ends_the_study(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load(str(home / "model"))
    plan = BudgetPlan.read(home / "plans/demo-50.json")
    monkeypatch.setattr(scoring, "score_plan", lambda *given: replace(score_plan(*given), allocated_bytes=10**9))
    with pytest.raises(RuntimeError, match="held 1000000000 bytes on w, but promised"):
        list(rows(loaded, Window("w", "d", (5,) * 192, 160), [plan], "code"))


def test_the_test_sees_no_document_that_the_search_saw(home: Path) -> None:
    loaded = load(str(home / "model"))
    wanted = asked_in(home).texts
    searched = load_documents([wanted.searched])
    seen = make_splits(searched, loaded.tokenizer, context=160, continuation=32, seed=0, search=WINDOWS_PER_SPLIT, validation=WINDOWS_PER_SPLIT)
    parts = (seen.calibration, seen.search, seen.validation)
    scored = cut(wanted, "test", loaded.tokenizer)
    assert scored.calibration == seen.calibration
    for windows in scored.scored.values():
        assert {window.document for window in windows}.isdisjoint(w.document for part in parts for w in part)
    assert [len({window.document for window in windows}) for windows in scored.scored.values()] == [2, 3]
    validated = cut(wanted, "validation", loaded.tokenizer)
    assert validated.scored == {wanted.searched: seen.validation[:2]}


def test_a_copy_of_a_document_that_was_searched_is_no_unseen_one(home: Path) -> None:
    loaded = load(str(home / "model"))
    searched = load_documents([str(home / "searched")])
    seen = make_splits(searched, loaded.tokenizer, context=160, continuation=32, seed=0, search=6, validation=6)
    copy = next(each for each in searched if each.name == seen.search[0].document)
    left = untouched([*searched, type(copy)("a copy", copy.text)], seen)
    assert len(left) == 20 - 15
    assert "a copy" not in {each.name for each in left}
    with pytest.raises(UserError, match="leaves none for the test"):
        untouched([copy], seen)


def test_what_a_budget_does_not_hold_is_left_out_with_its_reason(home: Path) -> None:
    contestants = [BASELINE, Method("nonsense", "", "packed"), Champion(OURS, "ours", "ours", folder=home / "plans")]
    loaded = load(str(home / "model"))
    flat = uniform_profile(loaded.identity, loaded.geometry)

    def make(spec: str) -> BudgetPlan:
        return resolve_plan(spec, loaded, 192, lambda: flat).plan

    found, left_out = entries(contestants, (0.5, 0.001), 192, make)
    assert [(one.contestant.name, one.budget) for one in found] == [("uniform", 0.5), (OURS, 0.5)]
    reasons = [one.reason for one in left_out]
    expected = ("raise the budget", "unknown allocation", "unknown allocation", "cannot read plan")
    assert all(word in reason for word, reason in zip(expected, reasons, strict=True))
    assert "made for 192 tokens" in entries(contestants[2:], (0.5,), 200, make)[1][0].reason
    greedy = Champion(OURS, "ours", "ours", folder=home / "plans", files=((0.3, "demo-50.json"),))
    assert "more than the budget of 30.00%" in entries([greedy], (0.3,), 192, make)[1][0].reason


def test_where_no_plan_was_searched_the_method_named_for_it_stands_in(home: Path) -> None:
    ours = Champion(OURS, "ours", "ours", folder=home / "plans", unsearched=((0.5, "a:0.5"), (0.2, "b:0.2")))
    made: list[str] = []
    plan = BudgetPlan.read(home / "plans/demo-50.json")

    def make(spec: str) -> BudgetPlan:
        made.append(spec)
        return plan

    assert ours.plans(0.5, make) == (str(home / "plans/demo-50.json"), (plan,))
    assert ours.plans(0.2, make) == ("b:0.2", (plan,))
    assert made == [str(home / "plans/demo-50.json"), "b:0.2"]


def test_unknown_contestants_and_budgets_are_one_sentence() -> None:
    nothing = {"model": "demo", "windows": None, "context": 3072, "continuation": 512}
    with pytest.raises(UserError, match="--methods nobody: no such contestant; choose among uniform, "):
        asked(**nothing, split="test", methods=["nobody"], budgets=None)
    with pytest.raises(UserError, match="--budgets 30"):
        asked(**nothing, split="test", methods=None, budgets=[30])
    assert [each.name for each in chosen(None)] == list(CONTESTANTS)
    wanted = asked(**{**nothing, "windows": 2}, split="validation", methods=["ours"], budgets=[0.3])
    assert wanted.texts.test == (("botocore", 2), ("ifcraft", 2), ("factbook", 2))


def by_hand(home: Path) -> Study:
    """Two corpora of two windows each and a control; every loss is written here."""
    plan = BudgetPlan.read(home / "plans/demo-50.json")
    draws = tuple(plan.model_copy(update={"context_length": 192 + extra}) for extra in (1, 2, 3))
    plans_of = {"uniform": (draws[0],), OURS: (draws[1],), "shuffled": (plan, draws[2])}
    losses = {
        "uniform": [0.4, 0.8, 0.6, 0.2, -0.1],
        OURS: [0.1, 0.2, 0.2, 0.1, 0.3],
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
    texts = Texts(controls=("c",))
    taking = tuple(Entry(CONTESTANTS[name], 0.125, "spec", plans) for name, plans in plans_of.items())
    scored = {"a": tuple(windows[:2]), "b": tuple(windows[2:4]), "c": tuple(windows[4:])}
    return Study(Asked(texts=texts, budgets=(0.125,)), scored, taking, (), found)


def row(plan: BudgetPlan, window: Window, nll: float, kl: float) -> Row:
    size, gain = plan.bytes_per_sequence - 8, 0.25
    base = {"run": "r", "code": "c", "seconds": 1.0, "nll_full": 2.0}
    return Row(plan=plan.digest, window=window.name, nll=nll, kl=kl, gain=gain, allocated_bytes=size, **base)


def test_means_differences_and_factors_are_those_reckoned_by_hand(home: Path) -> None:
    found = figures(by_hand(home))
    uniform = row_of(found, "uniform", 0.125)
    assert uniform is not None
    assert uniform["dnll"][0] == pytest.approx(0.5)  # the control does not count
    assert uniform["kl"][0] == pytest.approx(0.25)
    expected = bootstrap_mean([0.4 - 0.1, 0.8 - 0.2, 0.6 - 0.2, 0.2 - 0.1], list("abcd"))
    assert uniform["dnll_above_ours"] == pytest.approx([expected.mean, expected.low, expected.high], rel=1e-4)
    assert (uniform["n"], uniform["documents"], uniform["bytes"] - uniform["allocated"]) == (4, 4, 8)
    control = row_of(found, "uniform", 0.125, "c")
    assert control is not None
    assert control["dnll"] == [pytest.approx(-0.1), None, None]
    shuffled = row_of(found, "shuffled", 0.125)
    assert shuffled is not None
    assert shuffled["dnll"] == pytest.approx([0.3, 0.3, 0.3])
    ours = row_of(found, OURS, 0.125)
    assert ours is not None
    assert "dnll_above_ours" not in ours
    factor = {each["corpus"]: each for each in found["factors"]}
    assert factor[TOGETHER]["dnll"][0] == pytest.approx(2.0 / 0.6, rel=1e-4)
    assert factor["a"]["dnll"][:2] == pytest.approx([4, 4])
    assert [each["gain"][0] for each in found["corpora"]] == [0.25] * 4
    assert json.loads(dumped(found)) == found


def test_a_ratio_is_drawn_over_documents_and_infinite_over_nothing() -> None:
    found = bootstrap_ratio([2.0, 4.0, 9.0], [1.0, 2.0, 3.0], ["a", "a", "b"])
    assert found.mean == 15 / 6
    assert found.low < 2 < 3 < found.high  # only a, only b, and two documents know little
    assert (found.windows, found.documents) == (3, 2)
    assert np.isnan(bootstrap_ratio([2.0], [1.0], ["a"]).low)
    nothing = bootstrap_ratio([1.0, 1.0], [0.5, -0.5], ["a", "b"])
    assert nothing.mean == nothing.high == np.inf
    assert nothing.low == 2  # no scale where the mean is infinite


def test_the_table_says_what_is_least_and_what_cannot_be_told_apart(home: Path) -> None:
    text = table(figures(by_hand(home)))
    assert "| uniform, sinks + recent | .500 |" in text
    assert "| **ours, searched** | **.150** |" in text
    # Percentiles of ours are .100 and .200, of the pairs .175 and .525. Four documents ask for 1.86 times the distance
    # from the mean: Student's t of 3.16 over 1.96, times the root of 4 / 3.
    assert "| 12.5 % | .150 [.057, .243] | uniform, sinks + recent | .350 [.024, .676] |" in text
    assert "3.33 × [" in text
    assert "| c (control) | 1 | .250 | -.100 | .300 | .300 |" in text


def test_tables_go_between_the_markers_of_a_page(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nbehind\n")
    for text in ("first", "second"):
        put(page, text)
    assert page.read_text() == f"before\n{BEGIN}\n\nsecond\n\n{END}\nbehind\n"
    for wrong in ("nothing", BEGIN, f"{END} {BEGIN}", f"{BEGIN}{BEGIN}{END}"):
        page.write_text(wrong)
        with pytest.raises(UserError, match="needs one line <!-- fidelity -->"):
            put(page, "text")
        assert page.read_text() == wrong
    with pytest.raises(UserError, match="cannot be read"):
        put(tmp_path / "none.md", "text")


def test_the_picture_names_every_method_that_competes(home: Path) -> None:
    drawn = ElementTree.fromstring(picture(figures(by_hand(home))))
    named = [element.text for element in drawn.iter("{http://www.w3.org/2000/svg}text")]
    assert {"uniform, sinks + recent", "ours, searched", "12.5 %"} <= set(named)
    assert "ours, heads shuffled" not in named


def test_budgets_are_dealt_to_random_heads_with_seeds_of_their_own(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dealt: list[int] = []

    def shuffled(plan: BudgetPlan, seed: int) -> BudgetPlan:
        dealt.append(seed)
        return plan

    monkeypatch.setattr(methods, "shuffled", shuffled)
    ours = Champion(OURS, "ours", "ours", folder=home / "plans")
    spec, plans = Shuffled("shuffled", "", "control", of=ours).plans(0.5, lambda path: BudgetPlan.read(Path(path)))
    assert dealt == [0, 1, 2]
    assert len(plans) == 3
    assert spec.endswith("demo-50.json, dealt to random heads")


def contestants_by_group(group: str) -> Sequence[str]:
    return [each.name for each in CONTESTANTS.values() if each.group == group]


def test_every_group_has_contestants_and_names_are_those_of_plans() -> None:
    assert all(map(contestants_by_group, ("published", "packed", "ours", "control")))
    assert all("@4" in name for name in contestants_by_group("packed"))
    assert not any("@" in name for name in contestants_by_group("published"))
