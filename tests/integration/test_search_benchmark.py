"""Facts about the benchmark of the search: the naive way scores the same, figures add up, tables go to their place."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from search_factory import record
from search_process import ROOT, make_model, make_texts

from baklava.allocation import Uniform, allocate
from baklava.data.windows import Window
from baklava.errors import UserError
from baklava.evaluation.window_scoring import prefill_window, score_plan
from baklava.eviction import HeavyHitter, StreamingLLM
from baklava.profiling.profile import uniform_profile
from baklava.runtime.model_loader import LoadedModel
from benchmarks.markdown_page import read_checked, write_section
from benchmarks.search import baseline as naive
from benchmarks.search.config import Asked, quick
from benchmarks.search.markdown import scale, table
from benchmarks.search.run import PARTS, study
from benchmarks.search.startup import Ran, overhead
from tuning.study.search_space import recorded_evictions


@pytest.mark.parametrize("eviction", [StreamingLLM(sinks=1), HeavyHitter(reduction="max", eviction_interval=8)])
@pytest.mark.parametrize("bits", [(16, 16), (8, 4)])
@pytest.mark.parametrize("step", [1, 64])
def test_the_naive_way_has_the_same_scores(
    tiny: Callable[..., LoadedModel], eviction: StreamingLLM | HeavyHitter, bits: tuple[int, int], step: int
) -> None:
    loaded = tiny()
    ids = torch.randint(2, 60, (160,), generator=torch.Generator().manual_seed(0)).tolist()
    window = Window(name="w", document="d", ids=tuple(ids), context_length=128)
    profile = uniform_profile(loaded.identity, loaded.geometry)
    plan = allocate(profile, budget=0.5, context_length=160, method=Uniform(), eviction=eviction, bits=bits)
    slow = naive.score(loaded, plan, window, step)
    fast = score_plan(loaded, prefill_window(loaded, window, recorded_evictions()), plan)
    assert fast.kl > 1e-4
    assert slow["nll"] == pytest.approx(fast.nll, abs=2e-4)
    assert slow["kl"] == pytest.approx(fast.kl, rel=2e-2, abs=1e-5)


def ran() -> Ran:
    trials = [record(1, [2.0] * 4), record(2, [2.0] * 2, "pruned"), record(3, [2.0] * 4).model_copy(update={"twin": 1})]
    timed = [each.model_copy(update={"metrics": {"seconds": 2.0 * len(each.windows)}}) for each in trials]
    said = [(1.0, "starting replicas 2/2 replicas, 0:01 spent"), (9.0, "trials: the first one is under way")]
    said += [(13.0, "trial 1 of 3: KL 0.1"), (14.0, "trial 2 of 3: KL"), (18.0, "trial 3 of 3: KL"), (30.0, "ended")]
    return Ran(Path("none"), tuple(timed), tuple(said))


def test_overhead_is_wall_time_over_scoring_time_of_what_was_scored() -> None:
    found = overhead(ran())
    assert found["scoring_seconds"] == 12  # the third trial has the scores of the first
    assert found["overhead"] == pytest.approx((18 - 9) / (12 / 2))
    assert (found["first_trial_starts"], found["first_trial_ends"], found["search_seconds"]) == (9, 13, 30)


FIGURES = {
    "overhead": overhead(ran()),
    "naive": {
        "stepped": {"times": 9.5, "times_per_window": 7.4, "nll_apart": 3e-5},
        "at_once": {"times": 3.5, "times_per_window": 2.4, "nll_apart": 2e-6},
    },
    "replicas": {"threads": 1, "one": 1.0, "two": 1.83, "times": 1.83},
    "dispatch": [{"replicas": 1, "per_second": 1.5, "ideal": 5.0}, {"replicas": 2, "per_second": 1.25, "ideal": 10.0}],
    "machine": {"cpus": 2},
}


def test_the_table_has_every_figure_next_to_its_aim() -> None:
    text = table(FIGURES)
    for cell in ("1.50 ×", "9.5 ×", "7.4 ×", "3.5 ×", "2.4 ×", "1.83 ×", "≤ 1.25", "≥ 8 ×", "≥ 1.7 ×", "3e-05 nats"):
        assert cell in text
    only = table({"dispatch": FIGURES["dispatch"]})
    assert only.splitlines()[0] == "| replicas that sleep instead of scoring | 1 | 2 |"


def test_the_reach_of_a_head_is_its_rate_times_the_seconds_of_a_trial() -> None:
    assert "| replicas that one head keeps busy | 1 | 5 | 19 | 75 | 300 |" in scale(FIGURES)


def test_a_table_takes_the_place_between_its_own_markers_alone(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- one -->\nold\n<!-- /one -->\nb\n<!-- two -->\nkept\n<!-- /two -->\n")
    write_section(page, "one", "new")
    assert page.read_text() == "a\n<!-- one -->\n\nnew\n\n<!-- /one -->\nb\n<!-- two -->\nkept\n<!-- /two -->\n"
    with pytest.raises(UserError, match=r"--scale .* needs one line <!-- three -->"):
        read_checked(page, "three", "--scale")


def test_an_unknown_part_is_refused_before_anything_is_loaded() -> None:
    with pytest.raises(UserError, match=f"no such part; take some of {', '.join(PARTS)}"):
        study(Asked(model="nobody/has-this"), ("everything",))


def test_quick_sizes_are_smaller_and_nothing_else() -> None:
    full, small = asdict(Asked()), asdict(quick())
    assert all(small[name] <= full[name] for name in full if isinstance(full[name], int | float))
    assert asdict(replace(quick(), texts="t")) == asdict(quick(texts="t"))


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[object]:
    monkeypatch.setenv("BAKLAVA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("BAKLAVA_DATA", str(tmp_path / "data"))
    texts = make_texts(tmp_path / "texts")
    return ["--model", make_model(tmp_path / "model"), "--texts", texts, "--json", tmp_path / "search.json"]


@pytest.mark.drill
@pytest.mark.ray
def test_the_whole_benchmark_runs_and_its_searches_score_as_the_naive_way_does(
    place: list[object], tmp_path: Path
) -> None:
    readme, page = tmp_path / "README.md", tmp_path / "scale.md"
    readme.write_text("<!-- search -->\n<!-- /search -->\n")
    page.write_text("<!-- scale -->\n<!-- /scale -->\n")
    script = [sys.executable, str(ROOT / "jobs/benchmark.py"), "search", "--quick"]
    command = [*script, *map(str, place), "--readme", str(readme), "--scale", str(page)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "search.json").read_text())
    assert max(found["naive"][way]["nll_apart"] for way in ("stepped", "at_once")) < 1e-3
    assert found["overhead"]["trials"] == found["asked"]["trials"]
    assert [row["replicas"] for row in found["dispatch"]] == found["asked"]["dispatched"]
    assert "two replicas of 1 thread over one" in readme.read_text()
    assert "replicas that one head keeps busy" in page.read_text()
