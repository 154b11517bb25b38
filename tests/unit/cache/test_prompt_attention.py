"""Attention of many tokens in compiled passes gives what PyTorch's own operations give, scores included."""

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from baklava.cache.attention import (
    AttentionParams,
    CentroidEntries,
    attend_values,
    attention_probs,
    visibility_mask,
)
from baklava.cache.head_groups import AttentionInputs, ScoreAccumulator, score_updates
from baklava.cache.kernels import prompt_attention
from baklava.eviction import HeavyHitter, SnapKV

Shape = tuple[int, int, int, int, int, int]
SHAPES = st.tuples(
    st.integers(1, 2),
    st.integers(1, 3),
    st.integers(1, 4),
    st.integers(2, 70),
    st.integers(0, 50),
    st.sampled_from([8, 64]),
)


def inputs_of(shape: Shape, *, softcap: float | None, sinks: bool, centroids: int) -> AttentionInputs:
    """Queries over entries that came before them, at positions with gaps that differ between heads, and their own."""
    batch, heads, group, queries, before, head_dim = shape
    query = torch.randn(batch, heads, group, queries, head_dim)
    key, value = torch.randn(2, batch, heads, before + queries, head_dim)
    old = torch.rand(batch, heads, 3 * before + 1).argsort(-1)[..., :before].sort(-1).values
    own = torch.arange(3 * before + 1, 3 * before + 1 + queries)
    positions = torch.cat([old, own.expand(batch, heads, -1)], -1)
    entries = None
    if centroids:
        means = torch.randn(2, batch, heads, centroids, head_dim)
        entries = CentroidEntries(means[0], means[1], torch.randn(batch, heads, centroids))
    params = AttentionParams(0.3, softcap, torch.randn(heads * group) if sinks else None)
    return AttentionInputs(query, key, value, own[None], positions, params, centroids=entries)


def reference(inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
    """Output and probabilities of all queries at once."""
    num_own = inputs.query.shape[3]
    visible = visibility_mask(inputs.query_positions, inputs.key_positions[..., -num_own:])
    probs = attention_probs(inputs.query, inputs.key, visible, inputs.params, inputs.centroids)
    skipped = 0 if inputs.centroids is None else inputs.centroids.key.shape[2]
    return attend_values(probs, inputs.value, inputs.centroids), probs[..., skipped:]


@given(SHAPES, st.sampled_from([None, 5.0]), st.booleans(), st.sampled_from([0, 3]), st.integers(0, 99))
@settings(derandomize=True, max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@torch.inference_mode()
def test_outputs_and_sums_are_those_of_all_probabilities(
    monkeypatch: pytest.MonkeyPatch, shape: Shape, softcap: float | None, sinks: bool, centroids: int, seed: int
) -> None:
    torch.manual_seed(seed)
    inputs = inputs_of(shape, softcap=softcap, sinks=sinks, centroids=centroids)
    output, probs = reference(inputs)
    with monkeypatch.context() as patch:
        patch.setattr(prompt_attention, "BLOCK_LOGITS", 1000)
        patch.setattr(prompt_attention, "MIN_THREAD_LOGITS", 1)
        patch.setattr(torch, "get_num_threads", lambda: 3)
        assert_close(inputs.attend(masked=True), output, atol=2e-5, rtol=2e-5)
        for hitter in (HeavyHitter(), HeavyHitter(reduction="mean", power=1, distance=0)):
            scores = torch.zeros(inputs.key.shape[:3])
            own = inputs.attend_and_observe([ScoreAccumulator(hitter, scores, hitter.query_sample)], masked=True)
            assert_close(own, output, atol=2e-5, rtol=2e-5)
            reduced = probs.amax(2).square() if hitter.power == 2 else probs.mean(2)
            distance = inputs.query_positions[:, None, :, None] - inputs.key_positions[:, :, None]
            reduced = torch.where(distance >= hitter.distance, reduced, 0)
            ends = inputs.query_positions[0, 0], inputs.query_positions[0, -1], inputs.key_positions
            expected = hitter.running_mean(torch.zeros_like(scores), reduced.sum(2), *ends)
            assert_close(scores, expected, atol=1e-6, rtol=2e-4)


@pytest.mark.parametrize("stride", [1, 4])
@torch.inference_mode()
def test_scores_continue_as_without_compiled_passes(monkeypatch: pytest.MonkeyPatch, stride: int) -> None:
    torch.manual_seed(3)
    inputs = inputs_of((1, 2, 3, 70, 40, 16), softcap=None, sinks=False, centroids=0)
    before = torch.rand(inputs.key.shape[:3])
    evictions = [HeavyHitter(stride=stride), HeavyHitter(power=1, stride=stride), SnapKV(window=3)]

    def observe() -> list[Tensor]:
        accumulators = [ScoreAccumulator(eviction, before.clone(), eviction.query_sample) for eviction in evictions]
        output = inputs.attend_and_observe(accumulators, masked=True, start=30, prompt_tokens=100)
        return [output, *(each.scores for each in accumulators)]

    compiled = observe()
    monkeypatch.setattr(score_updates, "can_attend_prompt", lambda *states: False)
    for ours, theirs in zip(compiled, observe(), strict=True):
        assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


@torch.inference_mode()
def test_products_are_rounded_only_while_they_are_computed() -> None:
    torch.manual_seed(4)
    inputs = inputs_of((1, 3, 3, 64, 200, 64), softcap=None, sinks=False, centroids=0)
    rounded = replace(inputs, params=replace(inputs.params, fp32_precision="bf16"))
    before = torch.backends.mkldnn.matmul.fp32_precision
    assert_close(rounded.attend(masked=True), inputs.attend(masked=True), atol=0.05, rtol=0.05)
    assert torch.backends.mkldnn.matmul.fp32_precision == before
    with pytest.raises(RuntimeError, match="in the middle"), prompt_attention.fp32_precision("bf16"):
        raise RuntimeError("in the middle")
    assert torch.backends.mkldnn.matmul.fp32_precision == before


def test_gradients_and_other_dtypes_are_left_to_pytorch() -> None:
    states = torch.randn(1, 2, 4, 8)
    assert not prompt_attention.can_attend_prompt(states, states)  # a gradient would be lost
    with torch.inference_mode():
        assert prompt_attention.can_attend_prompt(states, states)
        assert not prompt_attention.can_attend_prompt(states.bfloat16(), states.bfloat16())
        with torch.autocast("cpu", torch.bfloat16):
            assert not prompt_attention.can_attend_prompt(states, states)


def test_two_threads_that_round_leave_the_setting_as_it_was() -> None:
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    first, second = prompt_attention.fp32_precision("bf16"), prompt_attention.fp32_precision("bf16")
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert matmul.fp32_precision == "bf16"
    second.__exit__(None, None, None)
    assert matmul.fp32_precision == before
