"""Facts about the search benchmark: the baseline scores the same, results add up, tables go to their sections."""

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
from benchmarks.markdown_page import read_page, write_section
from benchmarks.search.baseline import score_window
from benchmarks.search.run import PARTS, format_scale, format_tables, run_benchmark
from benchmarks.search.timed_search import SearchBenchmarkConfig, TimedSearch, measure_overhead, quick_config
from tuning.study.search_space import recorded_evictions


@pytest.mark.parametrize("eviction", [StreamingLLM(sinks=1), HeavyHitter(reduction="max", eviction_interval=8)])
@pytest.mark.parametrize("bits", [(16, 16), (8, 4)])
@pytest.mark.parametrize("step", [1, 64])
def test_the_baseline_has_the_same_scores(
    tiny: Callable[..., LoadedModel], eviction: StreamingLLM | HeavyHitter, bits: tuple[int, int], step: int
) -> None:
    loaded = tiny()
    ids = torch.randint(2, 60, (160,), generator=torch.Generator().manual_seed(0)).tolist()
    window = Window(name="w", document="d", ids=tuple(ids), context_length=128)
    profile = uniform_profile(loaded.identity, loaded.geometry)
    plan = allocate(profile, budget=0.5, context_length=160, method=Uniform(), eviction=eviction, bits=bits)
    slow = score_window(loaded, plan, window, step)
    fast = score_plan(loaded, prefill_window(loaded, window, recorded_evictions(loaded.moves_queries)), plan)
    assert fast.kl > 1e-4
    assert slow["nll"] == pytest.approx(fast.nll, abs=2e-4)
    assert slow["kl"] == pytest.approx(fast.kl, rel=2e-2, abs=1e-5)


def timed_search() -> TimedSearch:
    trials = [record(1, [2.0] * 4), record(2, [2.0] * 2, "pruned"), record(3, [2.0] * 4).model_copy(update={"twin": 1})]
    timed = [trial.model_copy(update={"metrics": {"seconds": 2.0 * len(trial.windows)}}) for trial in trials]
    log_lines = [(1.0, "starting replicas 2/2 replicas, 0:01 spent"), (9.0, "trials: the first one is running")]
    log_lines += [
        (13.0, "trial 1 of 3: KL 0.1"),
        (14.0, "trial 2 of 3: KL"),
        (18.0, "trial 3 of 3: KL"),
        (30.0, "ended"),
    ]
    return TimedSearch(Path("none"), tuple(timed), tuple(log_lines))


def test_overhead_is_wall_time_over_scoring_time_of_what_was_scored() -> None:
    overhead = measure_overhead(timed_search())
    assert overhead["scoring_seconds"] == 12  # the third trial has the scores of the first
    assert overhead["overhead"] == pytest.approx((18 - 9) / (12 / 2))
    assert (overhead["first_trial_starts"], overhead["first_trial_ends"], overhead["search_seconds"]) == (9, 13, 30)


RESULTS = {
    "overhead": measure_overhead(timed_search()),
    "baseline": {
        "token_by_token": {"speedup": 9.5, "speedup_per_window": 7.4, "max_nll_difference": 3e-5},
        "one_forward": {"speedup": 3.5, "speedup_per_window": 2.4, "max_nll_difference": 2e-6},
    },
    "scaling": {"threads": 1, "one": 1.0, "two": 1.83, "speedup": 1.83},
    "dispatch": [
        {"workers": 1, "trials_per_second": 1.5, "ideal_trials_per_second": 5.0},
        {"workers": 2, "trials_per_second": 1.25, "ideal_trials_per_second": 10.0},
    ],
    "machine": {"cpus": 2},
}


def test_the_table_has_every_result_with_its_aim() -> None:
    text = format_tables(RESULTS)
    for cell in ("1.50 ×", "9.5 ×", "7.4 ×", "3.5 ×", "2.4 ×", "1.83 ×", "≤ 1.25", "≥ 8 ×", "≥ 1.7 ×", "3e-05 nats"):
        assert cell in text
    dispatch_only = format_tables({"dispatch": RESULTS["dispatch"]})
    assert dispatch_only.splitlines()[0] == "| workers that sleep instead of scoring | 1 | 2 |"


def test_the_reach_of_a_head_is_its_rate_times_the_seconds_of_a_trial() -> None:
    assert "| workers that one head keeps busy | 1 | 5 | 19 | 75 | 300 |" in format_scale(RESULTS)


def test_a_section_is_replaced_between_its_own_markers_only(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- one -->\nold\n<!-- /one -->\nb\n<!-- two -->\nkept\n<!-- /two -->\n")
    write_section(page, "one", "new")
    assert page.read_text() == "a\n<!-- one -->\n\nnew\n\n<!-- /one -->\nb\n<!-- two -->\nkept\n<!-- /two -->\n"
    with pytest.raises(UserError, match=r"--page .* needs one line <!-- three -->"):
        read_page(page, "three")


def test_an_unknown_part_is_refused_before_anything_is_loaded() -> None:
    with pytest.raises(UserError, match=f"no such part; choose among {', '.join(PARTS)}"):
        run_benchmark(SearchBenchmarkConfig(model="nobody/has-this"), ("everything",))


def test_quick_sizes_are_smaller_and_nothing_else() -> None:
    full, small = asdict(SearchBenchmarkConfig()), asdict(quick_config())
    assert all(small[name] <= full[name] for name in full if isinstance(full[name], int | float))
    assert replace(quick_config(), texts="t") == quick_config(texts="t")


@pytest.fixture
def options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[object]:
    monkeypatch.setenv("BAKLAVA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("BAKLAVA_DATA", str(tmp_path / "data"))
    texts = make_texts(tmp_path / "texts")
    return ["--model", make_model(tmp_path / "model"), "--texts", texts, "--json", tmp_path / "search.json"]


@pytest.mark.drill
@pytest.mark.ray
def test_the_whole_benchmark_runs_and_its_search_scores_as_the_baseline_does(
    options: list[object], tmp_path: Path
) -> None:
    page = tmp_path / "search.md"
    page.write_text("<!-- search -->\n<!-- /search -->\n<!-- scale -->\n<!-- /scale -->\n")
    script = [sys.executable, str(ROOT / "jobs/benchmark.py"), "search", "--quick"]
    command = [*script, *map(str, options), "--page", str(page)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stderr
    found = json.loads((tmp_path / "search.json").read_text())
    assert max(found["baseline"][mode]["max_nll_difference"] for mode in ("token_by_token", "one_forward")) < 1e-3
    assert found["overhead"]["trials"] == found["config"]["trials"]
    assert [row["workers"] for row in found["dispatch"]] == found["config"]["dispatch_workers"]
    assert "two workers with 1 thread, over one" in page.read_text()
    assert "workers that one head keeps busy" in page.read_text()
