"""Steps of the Triton kernels against the reference. `test_triton_decode` runs this file in Triton's interpreter.

The interpreter must be chosen before the first import of Triton, and transformers imports it. So this file has a
process of its own, and a name that pytest does not collect.
"""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from triton_step import Budget, Layer

from baklava.cache.attention import AttentionParams
from baklava.cache.kernels import fused_decode, triton_decode
from baklava.eviction import METHODS, Eviction, HeavyHitter, StreamingLLM


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let rows have several blocks and splits, and not as many of both."""
    monkeypatch.setattr(fused_decode, "kernel", lambda: None)  # numba would take a CPU's entries
    monkeypatch.setattr(triton_decode, "ENTRY_BLOCK", 16)
    monkeypatch.setattr(triton_decode, "SCORE_BLOCK", 32)
    monkeypatch.setattr(triton_decode, "TARGET_PROGRAMS", 8)
    with torch.inference_mode():
        yield


def attention(layer: Layer, softcap: float | None = None, sinks: bool = False) -> AttentionParams:
    logits = torch.randn(layer.heads * layer.group, generator=torch.Generator().manual_seed(1))
    return AttentionParams(layer.head_dim**-0.5, softcap, logits if sinks else None)


def test_the_kernels_run_here() -> None:
    assert triton_decode.is_available(torch.device("cpu"))


@pytest.mark.parametrize(
    ("group", "head_dim", "eviction", "budgets"),
    [
        (3, 64, StreamingLLM(sinks=2), [(20, 16, 16), (32, 32, 4), (300, 8, 6)]),
        (1, 32, HeavyHitter(eviction_interval=3, distance=0, reduction="mean", power=1), [(30, 5, 3), (200, 2, 2)]),
        (16, 32, METHODS["tova"](sinks=2, eviction_interval=4), [(30, 6, 5), (50, 4, 32)]),
        (4, 128, METHODS["key_norm"](sinks=2, eviction_interval=4), [(40, 3, 8)]),
        (2, 96, HeavyHitter(eviction_interval=9, distance=8), [(60, 4, 3)]),
    ],
    ids=str,
)
def test_rings_and_scored_heads_of_all_shapes_and_bits_decode_as_the_reference_does(
    group: int, head_dim: int, eviction: Eviction, budgets: list[tuple[int, int, int]]
) -> None:
    layer = Layer([Budget(*each) for each in budgets], eviction, group=group, head_dim=head_dim, prompt=70)
    for _ in range(3):
        layer.step(attention(layer))


def test_centroids_recent_entries_and_mixed_precision_decode_as_the_reference_does() -> None:
    eviction = HeavyHitter(sinks=2, eviction_interval=3, distance=8, residual_length=7, centroids=3)
    budgets = [Budget(24, 3, 5, mixed=True), Budget(40, 6, 4, mixed=True), Budget(200, 2, 3, mixed=True)]
    layer = Layer(budgets, eviction, rows=2, group=3, head_dim=64, prompt=50)
    for _ in range(4):  # more than an interval, so entries move
        layer.step(attention(layer, softcap=2.0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_models_in_half_precision_decode_nearly_as_the_reference_does(dtype: torch.dtype) -> None:
    budgets = [Budget(40, 16, 4), Budget(60, 5, 32, mixed=True)]
    eviction = HeavyHitter(sinks=3, eviction_interval=8, distance=0, centroids=2)
    layer = Layer(budgets, eviction, group=2, head_dim=64, prompt=50, dtype=dtype)
    for _ in range(2):
        layer.step(attention(layer))


def test_nothing_is_read_after_the_last_entry() -> None:
    eviction = HeavyHitter(sinks=2, eviction_interval=20, distance=0, residual_length=20)
    budgets = [Budget(300, 32, 16), Budget(60, 4, 3), Budget(300, 5, 6, mixed=True)]
    layer = Layer(budgets, eviction, group=2, head_dim=64, prompt=45)
    for _ in range(2):
        layer.fill_empty_slots()
        layer.step(attention(layer, sinks=True))


BITS = st.sampled_from([32, 16, 8, 6, 5, 4, 3, 2])
EVICTIONS = st.one_of(
    st.builds(StreamingLLM, sinks=st.sampled_from([0, 3])),
    st.builds(
        HeavyHitter,
        sinks=st.sampled_from([0, 1, 3]),
        eviction_interval=st.sampled_from([1, 2, 9]),
        distance=st.sampled_from([0, 1, 32]),
        residual_length=st.sampled_from([0, 4, 16]),
        centroids=st.sampled_from([0, 2, 20]),
    ),
)


@given(
    eviction=EVICTIONS,
    heads=st.lists(
        st.tuples(st.sampled_from([1, 9, 30, 300]), BITS, BITS, st.booleans()), min_size=1, max_size=3, unique=True
    ),
    shape=st.sampled_from([(1, 1, 64), (2, 3, 32), (1, 4, 64), (1, 5, 128)]),
    prompt=st.sampled_from([1, 17, 60]),
    softcap=st.sampled_from([None, 1.0, 30.0]),
    sinks=st.booleans(),
)
@settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_layer_decodes_as_the_reference_does(
    eviction: Eviction,
    heads: list[tuple[int, int, int, bool]],
    shape: tuple[int, int, int],
    prompt: int,
    softcap: float | None,
    sinks: bool,
) -> None:
    low = eviction.config.min_tokens
    budgets = [Budget(low + spare, *bits) for spare, *bits in heads]
    rows, group, head_dim = shape
    layer = Layer(budgets, eviction, rows=rows, group=group, head_dim=head_dim, prompt=prompt)
    for _ in range(2):
        layer.step(attention(layer, softcap, sinks))
