"""The Triton kernels decode as the reference does, in Triton's interpreter, and compile for GPUs. No GPU is needed."""

import logging
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from baklava.cache import table_columns as columns
from baklava.cache.kernels import triton_decode

triton = pytest.importorskip("triton", reason="Triton is not installed, so its kernels are not tested")
CASES = Path(__file__).with_name("triton_decode_cases.py")


def decode_rows(
    rows: int, head_dim: int = 32, group: int = 1, dtype: torch.dtype = torch.float32, **options: Any
) -> Any:
    """Call the kernels with tables of zeros."""
    numbers, none = torch.zeros(rows, dtype=torch.int64), torch.empty(0, 0, 0)
    states = torch.zeros(rows, head_dim, dtype=dtype)
    queries = torch.zeros(rows, group, head_dim, dtype=dtype)
    arguments = {
        "tables": torch.zeros(rows, columns.NUM_COLUMNS, dtype=torch.int64),
        "slots": numbers,
        "counts": numbers + 1,
        "positions": numbers,
        "query": queries,
        "key": states,
        "value": states,
        "output": queries.clone(),
        "sinks": none,
        "probs": none,
        "scaling": 1.0,
        "softcap": 0.0,
        "update": columns.NO_UPDATE,
        "distance": 32,
        "squared": True,
        "by_max": True,
        "max_entries": 100,
        "dense_dtype": torch.float16 if dtype == torch.float32 else dtype,
    }
    return triton_decode.decode_layer(**(arguments | options))


def test_the_kernels_decode_as_the_reference_does_in_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", str(CASES)]
    ran = subprocess.run(
        command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=500, check=False
    )
    assert ran.returncode == 0, ran.stdout[-5000:] + ran.stderr[-2000:]
    assert "skipped" not in ran.stdout


@pytest.mark.parametrize(
    ("capability", "dtype", "head_dim", "group", "update"),
    [
        (80, torch.float32, 32, 1, columns.KEEP_PROBS),
        (90, torch.bfloat16, 64, 3, columns.HEAVY_HITTER),
    ],
)
def test_the_kernels_compile_for_a_gpu(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capability: int,
    dtype: torch.dtype,
    head_dim: int,
    group: int,
    update: int,
) -> None:
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    from baklava.cache.kernels import triton_kernels

    compiled = {}

    class Compiler:
        """Stand for a kernel: a launch compiles it, and does not start it."""

        def __init__(self, name: str) -> None:
            self.name, self.kernel = name, getattr(triton_kernels, name)

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            def compile_it(*arguments: Any, **options: Any) -> None:
                compiled[self.name] = self.kernel.warmup(*arguments, grid=grid, **options).asm

            return compile_it

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    device = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", capability, 32),
        get_current_device=lambda: capability,
        get_current_stream=lambda number: 0,
    )
    monkeypatch.setattr(driver, "_active", device)
    for name in ("store_token", "attend_split", "join_splits", "use_probs"):
        monkeypatch.setattr(triton_kernels, name, Compiler(name))
    probs = torch.zeros(2, group, 100)
    decode_rows(2, head_dim, group, dtype, update=update, probs=probs, sinks=torch.zeros(2, group))
    assert compiled.keys() == {"store_token", "attend_split", "join_splits", "use_probs"}
    assert all(asm["cubin"] for asm in compiled.values())
    assert ("mma" in compiled["attend_split"]["ptx"]) == (dtype != torch.float32)  # tensor cores


def test_no_rows_launch_nothing() -> None:
    assert decode_rows(0).shape == (0, 3, 32)


def test_heads_that_the_kernels_do_not_take_are_refused() -> None:
    for head_dim in (48, 288):
        with pytest.raises(ValueError, match=f"heads of {head_dim} channels"):
            decode_rows(1, head_dim)


def test_arguments_that_are_written_are_contiguous() -> None:
    with pytest.raises(ValueError, match="output and probs must be contiguous"):
        decode_rows(1, output=torch.zeros(1, 32, 1).transpose(1, 2).expand(2, 1, 32)[:, :, ::2])


def test_a_cpu_is_for_the_interpreter_only(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not triton_decode.is_available.__wrapped__(torch.device("cpu"))
    monkeypatch.setattr(triton_decode, "_is_interpreted", lambda: True)
    assert not triton_decode.is_available.__wrapped__(torch.device("cuda"))


def test_without_triton_nothing_is_available(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_decode, "find_spec", lambda name: None)
    assert not triton_decode.is_available.__wrapped__(torch.device("cuda"))


@pytest.mark.parametrize("wrong", [False, True])
def test_a_first_launch_that_fails_is_one_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, wrong: bool
) -> None:
    def launch(**arguments: Any) -> None:
        if not wrong:
            raise RuntimeError("no compiler")
        arguments["output"].zero_()

    monkeypatch.setattr(triton_decode, "_is_interpreted", lambda: True)
    monkeypatch.setattr(triton_decode, "decode_layer", launch)
    triton_decode.is_available.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            assert not any(triton_decode.is_available(torch.device("cpu")) for _ in range(2))
        assert len(caplog.records) == 1
        assert ("the output of one entry is not its value" if wrong else "no compiler") in caplog.text
    finally:
        triton_decode.is_available.cache_clear()
