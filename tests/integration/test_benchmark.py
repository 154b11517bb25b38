import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from baklava.errors import UserError
from baklava.evaluation.speed import BASELINE, Timing, time_interleaved
from baklava.eviction import METHODS, HeavyHitter, StreamingLLM
from baklava.runtime.model_loader import LoadedModel
from benchmarks.cli import main
from benchmarks.kernels import (
    FULL_PLAN,
    NO_CACHE,
    STATIC,
    benchmark_decode,
    benchmark_prefill,
    plot,
    same_plan_in_all_layers,
    table,
)

Maker = Callable[..., LoadedModel]


def test_decode_rows_allocate_what_their_plans_reserve(tiny: Maker, tmp_path: Path) -> None:
    loaded = tiny()
    results = benchmark_decode(loaded, contexts=[128, 200], batches=[1, 2], share=0.5, rounds=2)
    budgeted = [row for row in results["rows"] if row["plan"] not in (BASELINE, STATIC, NO_CACHE)]
    assert len(budgeted) == 4 * 6
    for row in budgeted:
        assert 0.9 <= row["allocated_over_reserved"] <= 1.0
        assert row["milliseconds"] > 0
        assert row["over_floor"] > 0
    plot(results, tmp_path / "decode.png")
    assert (tmp_path / "decode.png").read_bytes().startswith(b"\x89PNG")
    assert len(table(results).splitlines()) == 1 + len(results["rows"])


def test_decode_times_given_plans_instead_of_made_ones(tiny: Maker) -> None:
    loaded = tiny()
    plans = {"own": same_plan_in_all_layers(loaded, (60, 70), StreamingLLM(), 16, 128)}
    rows = benchmark_decode(loaded, contexts=[128], batches=[3], share=0.5, rounds=2, plans=plans)["rows"]
    assert [row["plan"] for row in rows] == [BASELINE, STATIC, NO_CACHE, "own", FULL_PLAN]
    full = rows[-1]
    assert full["allocated_bytes"] > rows[-2]["allocated_bytes"] > 0


def test_prefill_compares_every_method_with_the_baseline_and_with_streaming(tiny: Maker, tmp_path: Path) -> None:
    results = benchmark_prefill(tiny(), contexts=[160], batches=[2], share=0.5, rounds=1, memory=False)
    rows = {row["plan"]: row for row in results["rows"]}
    timed = {name for name, method in METHODS.items() if not method().predicted_share}
    assert rows.keys() >= {BASELINE, *timed, f"{StreamingLLM.name}, chunked"}
    assert rows[StreamingLLM.name]["over_streaming"] == rows[BASELINE]["over_baseline"] == 1
    plot(results, tmp_path / "prefill.png")
    assert "expected_attention" in table(results)


def test_ratios_are_taken_round_by_round() -> None:
    one, other = Timing((2.0, 20.0, 3.0)), Timing((1.0, 10.0, 1.0))
    assert one.ratio_to(other) == 2
    assert one.total_ratio_to(other) == 25 / 12


def test_each_round_starts_with_another_run() -> None:
    order: list[str] = []
    time_interleaved({name: lambda name=name: order.append(name) for name in "abc"}, rounds=2, warmup_rounds=1)
    assert "".join(order) == "abcbcacab"


def test_too_few_entries_are_reported_in_one_sentence(tiny: Maker) -> None:
    with pytest.raises(UserError, match="raise --contexts or --share"):
        same_plan_in_all_layers(tiny(), (25, 25), HeavyHitter(), 16, 128)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("decode --share 2", "baklava-benchmark: --share 2 is not a share of the entries below 1; try 0.2"),
        ("prefill --share 0", "baklava-benchmark prefill: error: argument --share: 0 is not a number above 0"),
        ("fidelity --methods nobody", "baklava-benchmark: --methods nobody: no such method"),
        ("fidelity --page none.md --methods nobody", "baklava-benchmark: --page none.md cannot be read"),
        ("decode --windows 3", "baklava-benchmark: error: unrecognized arguments: --windows 3"),
        ("fidelity --share 0.2", "baklava-benchmark: error: unrecognized arguments: --share 0.2"),
        ("", "baklava-benchmark: error: the following arguments are required: NAME"),
    ],
)
def test_a_command_line_error_is_one_sentence(arguments: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = main(arguments.split())
    except SystemExit as exit_request:
        code = int(str(exit_request.code))
    assert code == 2
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith(message)


def test_a_script_sends_no_telemetry_to_the_hub() -> None:
    code = (
        "from baklava.console import run_cli\n"
        "def main():\n    import huggingface_hub.constants as hub\n    print(hub.HF_HUB_DISABLE_TELEMETRY)\n"
        "run_cli('x', main)"
    )
    opt_outs = ("HF_HUB_DISABLE_TELEMETRY", "DO_NOT_TRACK")
    environment = {name: value for name, value in os.environ.items() if name not in opt_outs}
    ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "True"
