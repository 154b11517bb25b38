"""The compiled kernel decodes as the reference does, which is a step of each head group in PyTorch."""

import copy
import errno
import importlib
import logging
import os
import platform
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from filelock import FileLock, Timeout
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from model_families import SHAPE, full_cache, tiny_model
from plan_factory import EVICTIONS, make_plan, random_ids, with_bits, with_mixed_precision
from torch.testing import assert_close
from transformers import Gemma2Config, GptOssConfig
from triton_step import Budget, Layer

from baklava.cache import budgeted_layer
from baklava.cache import table_columns as columns
from baklava.cache.attention import AttentionParams
from baklava.cache.budgeted_cache import BudgetedCache
from baklava.cache.kernels import fused_decode, numba_decode, numba_runtime
from baklava.errors import UserError
from baklava.eviction import METHODS, HeavyHitter, StreamingLLM
from baklava.plan.budget_plan import full_cache_plan
from baklava.runtime.batched_forward import decode_step
from baklava.runtime.model_loader import LoadedModel
from baklava.runtime.prefill import prefill

GRID = [(0, 0), (0, 1), (1, 0), (1, 1)]
FUSED = [eviction for eviction in EVICTIONS if eviction.name != "expected_attention"]
BITS = [[(32, 32), (16, 16)], [(8, 8), (16, 6)], [(6, 5), (5, 4)], [(4, 3), (3, 2)], [(2, 4), (4, 32)]]


@pytest.fixture(autouse=True)
def _check_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_decode, "CHECK_TABLES", True)


@pytest.fixture
def loaded(tiny: Any) -> LoadedModel:
    """A model whose heads have the shape of the demo model's, so that one kernel serves both."""
    return tiny(head_dim=64, group=3)


@torch.inference_mode()
def stream(loaded: LoadedModel, cache: BudgetedCache, ids: torch.Tensor) -> torch.Tensor:
    """Logits after each token, fed one by one."""
    return torch.cat([loaded.model(token[:, None], past_key_values=cache).logits for token in ids.unbind(1)], 1)


def positions(cache: BudgetedCache, row: int = 0) -> list[set[int]]:
    return [set(cache.cached_positions(layer, head, row).tolist()) for layer, head in GRID]


def check_against_reference(
    monkeypatch: pytest.MonkeyPatch, loaded: LoadedModel, plan: Any, prompt: torch.Tensor, ids: torch.Tensor
) -> None:
    fused, _ = prefill(loaded, plan, prompt)
    ours = stream(loaded, fused, ids)
    with monkeypatch.context() as patch:
        patch.setattr(budgeted_layer, "can_fuse", lambda *arguments: False)
        reference, _ = prefill(loaded, plan, prompt)
        theirs = stream(loaded, reference, ids)
    error = (ours - theirs).abs()
    assert error[:, 0].max() < 5e-3  # of the new token, a number may be rounded to the other side
    assert error.mean() < 0.01
    for row in range(len(prompt)):
        for mine, other in zip(positions(fused, row), positions(reference, row), strict=True):
            assert len(mine) == len(other)
            assert len(mine - other) <= 1
    fused.check_integrity(prompt.shape[1] + ids.shape[1])


@pytest.mark.parametrize("bits", BITS, ids=str)
@pytest.mark.parametrize("eviction", FUSED, ids=str)
def test_every_method_decodes_in_all_bits_as_the_reference_does(
    monkeypatch: pytest.MonkeyPatch, loaded: LoadedModel, eviction: Any, bits: Any
) -> None:
    plan = with_bits(make_plan(loaded, [[20, 40], [28, 64]], eviction), bits)
    check_against_reference(monkeypatch, loaded, plan, random_ids(1, 90), random_ids(1, 30, seed=2))


@pytest.mark.parametrize("bits", [[(6, 6), (5, 4)], [(4, 8), (3, 3)], [(2, 2), (4, 4)]], ids=str)
def test_graded_keys_of_several_rows_decode_as_the_reference_does(
    monkeypatch: pytest.MonkeyPatch, loaded: LoadedModel, bits: Any
) -> None:
    eviction = HeavyHitter(sinks=2, eviction_interval=5, distance=8, residual_length=8, centroids=3)
    plan = with_mixed_precision(loaded, with_bits(make_plan(loaded, [[20, 40], [28, 64]], eviction), bits))
    check_against_reference(monkeypatch, loaded, plan, random_ids(3, 90), random_ids(3, 30, seed=2))


@pytest.mark.parametrize("options", [{"reduction": "mean", "power": 1}, {"reduction": "max", "distance": 32}], ids=str)
def test_scores_of_heavy_hitters_are_those_of_the_reference(
    monkeypatch: pytest.MonkeyPatch, loaded: LoadedModel, options: dict[str, Any]
) -> None:
    plan = make_plan(loaded, [[50, 60], [70, 80]], HeavyHitter(**({"sinks": 2, "eviction_interval": 20} | options)))
    scores = []
    for fuses in (True, False):
        with monkeypatch.context() as patch:
            if not fuses:
                patch.setattr(budgeted_layer, "can_fuse", lambda *arguments: False)
            cache, _ = prefill(loaded, plan, random_ids(1, 90))
            stream(loaded, cache, random_ids(1, 37, seed=2))
        scores.append([group.scores[..., : group.num_filled] for layer in cache.layers for group in layer.groups])
    for ours, theirs in zip(*scores, strict=True):
        assert_close(ours, theirs, atol=1e-6, rtol=1e-3)


HITTERS = st.builds(
    HeavyHitter,
    sinks=st.sampled_from([0, 1, 3]),
    eviction_interval=st.sampled_from([1, 2, 9]),
    distance=st.sampled_from([0, 1, 32]),
    residual_length=st.sampled_from([0, 3, 9, 24]),
    centroids=st.sampled_from([0, 2]),
)
HEAD_BITS = st.tuples(*[st.sampled_from([32, 16, 8, 6, 5, 4, 3, 2])] * 2)
SPARE_ENTRIES = st.sampled_from([0, 1, 9, 30, 300])


@given(
    eviction=st.one_of(st.just(StreamingLLM(sinks=0)), st.just(StreamingLLM(sinks=3)), HITTERS),
    spare=st.tuples(SPARE_ENTRIES, SPARE_ENTRIES),
    bits=st.tuples(HEAD_BITS, HEAD_BITS),
    mixed=st.booleans(),
    prompt=st.sampled_from([1, 2, 17, 60]),
    turn=st.sampled_from([1, 4, 30]),
)
@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_plan_decodes_as_the_reference_does_over_turns_copies_and_rows(
    monkeypatch: pytest.MonkeyPatch,
    loaded: LoadedModel,
    eviction: Any,
    spare: tuple[int, int],
    bits: Any,
    mixed: bool,
    prompt: int,
    turn: int,
) -> None:
    low = eviction.config.min_tokens
    plan = with_bits(make_plan(loaded, [[low + spare[0], low + spare[1]], [low + spare[1], low + 1]], eviction), bits)
    plan = with_mixed_precision(loaded, plan) if mixed else plan

    @torch.inference_mode()
    def play() -> torch.Tensor:
        cache = BudgetedCache(plan)
        loaded.model(random_ids(2, prompt), past_key_values=cache)
        logits = [stream(loaded, cache, random_ids(2, 12, seed=1))]
        logits.append(loaded.model(random_ids(2, turn, seed=2), past_key_values=cache).logits)
        stream(loaded, cache, random_ids(2, 1, seed=3))
        cache = cache.copy()
        logits.append(stream(loaded, cache, random_ids(2, 3, seed=4)))
        cache.batch_select_indices(torch.tensor([1, 1]))
        logits.append(stream(loaded, cache, random_ids(2, 20, seed=5)))
        cache.check_integrity(prompt + turn + 36)
        return torch.cat(logits, 1)

    ours = play()
    with monkeypatch.context() as patch:
        patch.setattr(budgeted_layer, "can_fuse", lambda *arguments: False)
        theirs = play()
    assert (ours - theirs).abs().mean() < 0.02 * theirs.abs().mean()


@pytest.mark.parametrize("eviction", [FUSED[0], FUSED[2], METHODS["snapkv"](sinks=2, eviction_interval=4)], ids=str)
@torch.inference_mode()
def test_tokens_known_in_advance_get_what_they_get_one_by_one(
    monkeypatch: pytest.MonkeyPatch, loaded: LoadedModel, eviction: Any
) -> None:
    plan = with_bits(make_plan(loaded, [[20, 40], [28, 64]], eviction), [(5, 4), (3, 3)])
    cache, _ = prefill(loaded, plan, random_ids(2, 90))
    ids = random_ids(2, 30, seed=2)
    expected = stream(loaded, cache.copy(), ids)
    for fuses in (True, False):
        forced = cache.copy()
        groups = [group for layer in forced.budgeted_layers for group in layer.groups]
        with monkeypatch.context() as patch, forced.teacher_forcing():
            if not fuses:
                patch.setattr(budgeted_layer, "can_fuse", lambda *arguments: False)
            logits = [loaded.model(part, past_key_values=forced).logits for part in (ids[:, :11], ids[:, 11:])]
            assert all(group.is_dequantized is not fuses for group in groups)
        assert not any(group.is_dequantized for group in groups)
        assert (torch.cat(logits, 1) - expected).abs().mean() < 0.01
        forced.check_integrity(120)


ANY_BITS = st.sampled_from([32, 16, 8, 6, 5, 4, 3, 2])
SCORED = [METHODS[name](sinks=2, eviction_interval=5, pooling=1) for name in ("tova", "snapkv", "key_norm", "kvzip")]


@given(
    eviction=st.one_of(
        st.builds(
            HeavyHitter,
            sinks=st.sampled_from([0, 3]),
            recent_ratio=st.sampled_from([0.0, 0.5, 1.0]),
            eviction_interval=st.sampled_from([1, 2, 9, 32]),
            power=st.sampled_from([1, 2]),
            distance=st.sampled_from([0, 8]),
            residual_length=st.sampled_from([0, 3, 9, 24]),
            centroids=st.sampled_from([0, 1, 4, 16]),
        ),
        st.sampled_from([*SCORED, METHODS["snapkv"](sinks=2, eviction_interval=5, centroids=2), StreamingLLM(sinks=2)]),
    ),
    heads=st.lists(st.tuples(SPARE_ENTRIES, ANY_BITS, ANY_BITS, st.booleans()), min_size=1, max_size=3),
    rows=st.sampled_from([1, 2]),
    prompt=st.sampled_from([1, 20, 90]),
    calls=st.lists(st.sampled_from([1, 2, 7, 40]), min_size=3, max_size=6),
)
@settings(max_examples=40, deadline=None, derandomize=True)
@torch.inference_mode()
def test_entries_scores_and_centroids_are_those_of_the_reference_after_any_evictions(
    eviction: Any, heads: list[tuple[int, int, int, bool]], rows: int, prompt: int, calls: list[int]
) -> None:
    low = eviction.config.min_tokens
    budgets = [Budget(low + spare, *bits) for spare, *bits in heads]
    layer = Layer(budgets, eviction, rows=rows, group=3, head_dim=64, prompt=prompt)
    for num_tokens in calls:
        layer.step(AttentionParams(0.125), num_tokens)


@pytest.mark.parametrize("kind", ["softcap", "learned sinks"])
def test_softcap_and_learned_sinks_are_as_in_transformers(kind: str) -> None:
    fields: dict[str, Any] = {"head_dim": 32, "sliding_window": 16}
    if kind == "softcap":
        config = Gemma2Config(**(SHAPE | fields | {"attn_logit_softcapping": 2.0}))
    else:
        config = GptOssConfig(**(SHAPE | fields | {"num_local_experts": 2, "num_experts_per_tok": 1}))
    model = tiny_model(config)
    loaded, ids = LoadedModel.of(model), random_ids(2, 60)
    cache = full_cache(loaded)
    with torch.inference_mode():
        loaded.model(ids[:, :40], past_key_values=cache)
        ours = stream(loaded, cache, ids[:, 40:])
        loaded.model.set_attn_implementation("eager")
        assert_close(ours, loaded.model(ids, use_cache=False).logits[:, 40:], atol=1e-4, rtol=1e-4)


@torch.inference_mode()
def test_sequences_of_several_plans_and_lengths_decode_together_as_they_do_alone(loaded: LoadedModel) -> None:
    plans = [
        with_bits(make_plan(loaded, [[20, 40], [28, 64]], FUSED[2]), [(5, 4), (3, 3)]),
        make_plan(loaded, [[20, 40], [28, 64]], StreamingLLM(sinks=2), 16),
        full_cache_plan(loaded.identity, loaded.geometry, 200),
    ]
    starts = [(plans[place % 3], random_ids(1, 9 + 17 * place, seed=place)) for place in range(7)]
    together = [prefill(loaded, plan, prompt)[0] for plan, prompt in starts]
    ids = random_ids(len(starts), 80, seed=9)
    logits = torch.stack([decode_step(loaded, together, ids[:, step].tolist()) for step in range(80)], 1)
    for row, (plan, prompt) in enumerate(starts):
        alone, _ = prefill(loaded, plan, prompt)
        error = (logits[row] - stream(loaded, alone, ids[row : row + 1])[0]).abs()
        assert error.mean() < 1e-3  # a code that is rounded to the other side moves a few
        for ours, theirs in zip(positions(together[row]), positions(alone), strict=True):
            assert len(ours - theirs) == len(theirs - ours) <= 1
        together[row].check_integrity(len(starts[row][1][0]) + 80)


@torch.inference_mode()
def test_several_threads_decode_what_one_does(monkeypatch: pytest.MonkeyPatch, loaded: LoadedModel) -> None:
    plan = with_bits(make_plan(loaded, [[20, 40], [28, 64]], FUSED[2]), [(5, 4), (3, 3)])
    caches = [prefill(loaded, plan, random_ids(1, 30 + 20 * place, seed=place))[0] for place in range(4)]
    copies = [cache.copy() for cache in caches]
    steps = random_ids(12, 4, seed=9).tolist()
    alone = torch.stack([decode_step(loaded, caches, tokens) for tokens in steps])
    monkeypatch.setattr(fused_decode, "MIN_THREAD_SLOTS", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    together = torch.stack([decode_step(loaded, copies, tokens) for tokens in steps])
    assert_close(together, alone, atol=1e-5, rtol=1e-5)
    for cache, copied in zip(caches, copies, strict=True):
        assert positions(cache) == positions(copied)
    assert any(thread.name.startswith("decode-kernel") for thread in threading.enumerate())


@given(st.lists(st.integers(0, 50), max_size=12), st.integers(1, 5))
@settings(derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_each_row_runs_on_one_thread(monkeypatch: pytest.MonkeyPatch, work: list[int], threads: int) -> None:
    done: list[int] = []

    def run(rows: slice) -> int:
        done.extend(range(len(work))[rows])
        return len(range(len(work))[rows])

    with monkeypatch.context() as patch:
        patch.setattr(torch, "get_num_threads", lambda: threads)
        assert numba_runtime.run_on_threads(run, np.array(work, np.int64), 10) == len(work)
    assert sorted(done) == list(range(len(work)))


def test_what_a_thread_raises_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(rows: slice) -> int:
        if rows.start:
            raise ValueError("in the second half")
        return 0

    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    with pytest.raises(ValueError, match="second half"):
        numba_runtime.run_on_threads(run, np.array([5, 5]), 1)


def test_copies_and_beams_have_entries_of_their_own(loaded: LoadedModel) -> None:
    plan = with_bits(make_plan(loaded, [[20, 40], [28, 64]], FUSED[1]), [(5, 4), (3, 3)])
    cache, _ = prefill(loaded, plan, random_ids(1, 90))
    stream(loaded, cache, random_ids(1, 5, seed=1))
    copied = cache.copy()
    first, second = random_ids(1, 30, seed=2), random_ids(1, 30, seed=3)
    diverged = stream(loaded, copied, second)
    straight = stream(loaded, cache, first)
    again, _ = prefill(loaded, plan, random_ids(1, 90))
    stream(loaded, again, random_ids(1, 5, seed=1))
    assert_close(straight, stream(loaded, again.copy(), first), atol=1e-5, rtol=1e-5)
    assert_close(diverged, stream(loaded, again, second), atol=1e-5, rtol=1e-5)
    beams = BudgetedCache(plan)
    output = loaded.model.generate(
        random_ids(2, 40), past_key_values=beams, max_new_tokens=12, num_beams=3, do_sample=False
    )
    beams.check_integrity(output.shape[1] - 1)


def test_a_copy_has_a_table_and_counters_of_its_own(loaded: LoadedModel) -> None:
    cache, _ = prefill(loaded, make_plan(loaded, [[20, 40], [28, 64]], FUSED[1]), random_ids(1, 90))
    stream(loaded, cache, random_ids(1, 1))
    table = cache.budgeted_layers[0].table
    copied = cache.copy().budgeted_layers[0].table
    assert table is not None
    assert copied is not None
    assert (copied.rows[..., columns.COUNTERS] == table.rows[..., columns.COUNTERS]).all()
    assert not (copied.rows[..., columns.SCORES] == table.rows[..., columns.SCORES]).any()
    before = table.rows.copy()
    copied.groups[0].num_filled += 1
    assert (table.rows == before).all()
    assert (copied.rows[..., columns.FILLED] != table.rows[..., columns.FILLED]).any()


@torch.inference_mode()
def test_a_layer_that_is_copied_alone_writes_to_memory_of_its_own(loaded: LoadedModel) -> None:
    cache, _ = prefill(loaded, make_plan(loaded, [[20, 40], [28, 64]], FUSED[1]), random_ids(1, 90))
    stream(loaded, cache, random_ids(1, 1))
    layer = cache.budgeted_layers[0]
    before = [tensor.clone() for tensor in layer.slab.tensors], layer.table.rows.copy()
    copied = copy.deepcopy(layer)
    states = torch.randn(1, 2, 1, 64)
    keys, values = copied.update(states, states)
    copied.attend(torch.randn(1, 6, 1, 64), keys, values, None, AttentionParams(0.125))
    assert copied.cumulative_length == layer.cumulative_length + 1
    assert all(map(torch.equal, layer.slab.tensors, before[0]))
    assert (layer.table.rows == before[1]).all()


class NewestHitter(HeavyHitter):
    """A method of a plug-in, which is no heavy hitter although it inherits from it."""

    def score(self, observation: Any) -> torch.Tensor:
        return observation.reduce_group("max")[:, :, -1].float()


@torch.inference_mode()
def test_a_method_that_inherits_from_heavy_hitters_keeps_its_own_scores(
    monkeypatch: pytest.MonkeyPatch, loaded: LoadedModel
) -> None:
    layer = Layer([Budget(40, 16, 16)], NewestHitter(sinks=2, eviction_interval=5), group=3, head_dim=64, prompt=60)
    for _ in range(12):
        layer.step(AttentionParams(0.125))


@torch.inference_mode()
def test_copies_and_rows_of_a_cache_that_is_teacher_forced_go_on(
    monkeypatch: pytest.MonkeyPatch, loaded: LoadedModel
) -> None:
    plan = with_bits(make_plan(loaded, [[20, 40], [28, 64]], FUSED[1]), [(5, 4), (3, 3)])
    cache, _ = prefill(loaded, plan, random_ids(2, 90))
    monkeypatch.setattr(budgeted_layer, "can_fuse", lambda *arguments: False)
    rest = random_ids(2, 8, seed=4)
    with cache.teacher_forcing():
        loaded.model(random_ids(2, 5), past_key_values=cache)
        copied = cache.copy()
        cache.batch_select_indices(torch.tensor([1, 1]))
        logits = loaded.model(rest[1:].expand(2, -1), past_key_values=cache).logits
        expected = loaded.model(rest, past_key_values=copied).logits
    assert_close(logits[0], logits[1])
    assert_close(logits[0], expected[1], atol=1e-4, rtol=1e-4)


def test_code_on_disk_that_was_compiled_for_other_columns_is_removed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stale, other = tmp_path / "numba_decode.decode_layer.nbc", tmp_path / "other.nbc"
    stale.touch()
    other.touch()
    monkeypatch.setattr(numba_decode.layout._cache, "_cache_path", str(tmp_path))
    numba_decode.drop_stale_code()
    assert stale.exists()
    monkeypatch.setattr(numba_decode, "LAYOUT", 1)
    numba_decode.drop_stale_code()
    assert not stale.exists()
    assert other.exists()


@pytest.mark.parametrize(("cached", "new"), [(1, 2), (2, 1), (2, 4)])
@torch.inference_mode()
def test_a_cache_goes_on_only_with_as_many_sequences_as_it_has(loaded: LoadedModel, cached: int, new: int) -> None:
    cache, _ = prefill(loaded, make_plan(loaded, [[20, 40], [28, 64]], FUSED[1]), random_ids(cached, 50))
    with pytest.raises(UserError, match=f"{new} sequences go on in a cache of {cached}"):
        loaded.model(random_ids(new, 1), past_key_values=cache)
    if cached > 1:
        with pytest.raises(RuntimeError, match="1 rows of 2 KV heads"):
            decode_step(loaded, [cache], [5])


@torch.inference_mode()
def test_no_slot_is_written_that_a_cache_does_not_have(loaded: LoadedModel) -> None:
    for eviction in (StreamingLLM(sinks=2), HeavyHitter(sinks=2, eviction_interval=4)):
        cache, _ = prefill(loaded, make_plan(loaded, [[300, 300], [300, 300]], eviction), random_ids(1, 10))
        for layer in cache.budgeted_layers:  # as after errors in the middle of steps
            layer.cumulative_length += 250
            for group in layer.groups:
                group.num_filled += 290 if eviction.scored else 0
        with pytest.raises(RuntimeError, match="drop the cache after an error"):
            stream(loaded, cache, random_ids(1, 10))


@torch.inference_mode()
def test_values_of_autocast_decode(loaded: LoadedModel) -> None:
    plan = with_bits(make_plan(loaded, [[20, 40], [28, 64]], FUSED[1]), [(5, 16), (32, 3)])
    cache, _ = prefill(loaded, plan, random_ids(1, 90))
    exact = stream(loaded, cache.copy(), random_ids(1, 8))
    with torch.autocast("cpu", torch.bfloat16):
        rounded = stream(loaded, cache, random_ids(1, 8))
    assert (rounded.float() - exact).abs().mean() < 0.1 * exact.abs().mean()


def test_only_what_the_kernel_can_do_is_given_to_it(loaded: LoadedModel, tiny: Any) -> None:
    def groups_of(model: LoadedModel, eviction: Any) -> Any:
        cache, _ = prefill(model, make_plan(model, [[20, 40], [28, 64]], eviction), random_ids(1, 50))
        return cache.budgeted_layers[0].groups

    key, hitter = torch.zeros(1, 2, 1, 64), HeavyHitter(sinks=2, eviction_interval=4)
    expected = next(eviction for eviction in EVICTIONS if eviction.name == "expected_attention")
    with torch.inference_mode():
        assert fused_decode.can_fuse(groups_of(loaded, hitter), key)
        assert not fused_decode.can_fuse(groups_of(loaded, hitter), key.bfloat16())
        assert not fused_decode.can_fuse(groups_of(loaded, expected), key)
        assert not fused_decode.can_fuse(groups_of(tiny(), hitter), key[..., :8])
    assert not fused_decode.can_fuse(groups_of(loaded, hitter), key)  # a gradient would be lost


def test_a_table_that_is_out_of_date_is_a_fault(loaded: LoadedModel) -> None:
    cache, _ = prefill(loaded, make_plan(loaded, [[20, 40], [28, 64]], FUSED[1]), random_ids(1, 90))
    stream(loaded, cache, random_ids(1, 2))
    group = cache.budgeted_layers[0].groups[0]
    group.scores = group.scores.clone()
    with pytest.raises(RuntimeError, match="table was not made again"):
        stream(loaded, cache, random_ids(1, 1))


def forget_numba() -> None:
    fused_decode.kernel.cache_clear()
    numba_runtime.is_available.cache_clear()


def test_without_numba_sequences_are_decoded_one_by_one_after_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, loaded: LoadedModel
) -> None:
    monkeypatch.setattr(numba_runtime, "find_spec", lambda name: None)
    forget_numba()
    try:
        with caplog.at_level(logging.WARNING):
            cache, _ = prefill(loaded, full_cache_plan(loaded.identity, loaded.geometry, 60), random_ids(1, 20))
            stream(loaded, cache, random_ids(1, 5))
        assert [record.message for record in caplog.records if "pip install" in record.message] != []
        assert sum("numba" in record.message for record in caplog.records) == 1
        cache.check_integrity(25)
    finally:
        forget_numba()


def test_with_numba_that_cannot_be_imported_sequences_are_decoded_one_by_one_after_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "llvmlite", None)
    forget_numba()
    try:
        with caplog.at_level(logging.WARNING):
            assert fused_decode.kernel() is None
        assert "numba cannot be imported (import of llvmlite halted" in caplog.text
    finally:
        forget_numba()


def test_the_kernel_compiles_without_a_folder_for_its_code(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_folder(**options: Any) -> Any:
        if options.get("cache"):
            raise RuntimeError("cannot cache function: no locator available")
        return lambda function: ("compiled", function)

    monkeypatch.setattr(numba_decode, "njit", no_folder)
    assert numba_decode.compiled(importlib.import_module)[0] == "compiled"


def test_the_kernel_compiles_with_a_full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("numba.core.caching.IndexDataCacheFile.save", full)
    assert numba_decode.compiled(lambda number: number + 1)(2) == 3


def test_compiling_is_announced_if_it_takes_long(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(numba_runtime, "NOTICE_SECONDS", 0.01)
    slow = SimpleNamespace(decode_layer=lambda *arguments: time.sleep(0.5), evict_layer=lambda *arguments: None)
    monkeypatch.setattr(fused_decode, "kernel", lambda: slow)
    fused_decode.prepare.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            fused_decode.prepare(64, 3)
        assert "compiling kernels" in caplog.text
    finally:
        fused_decode.prepare.cache_clear()


def test_one_process_compiles_at_a_time_if_a_lock_can_be_had(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    locked = []

    def decode(*arguments: Any) -> None:
        try:
            with FileLock(tmp_path / "kernel.lock", timeout=0):
                locked.append(False)
        except Timeout:
            locked.append(True)

    module = SimpleNamespace(decode_layer=decode, evict_layer=lambda *arguments: None)
    monkeypatch.setattr(fused_decode, "kernel", lambda: module)
    for folder in (tmp_path, tmp_path / "file" / "below"):
        (tmp_path / "file").write_text("no folder")
        monkeypatch.setenv("BAKLAVA_CACHE", str(folder))
        fused_decode.prepare.cache_clear()
        fused_decode.prepare(64, 3)
    fused_decode.prepare.cache_clear()
    assert locked == [True, False]


@pytest.mark.drill
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="the CPU is of another kind")
def test_the_kernels_are_right_without_avx512(tmp_path: Path) -> None:
    files = [Path(__file__).with_name(f"test_{name}.py") for name in ("fused_decode", "prompt_attention")]
    environment = os.environ | {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": "", "NUMBA_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not drill", *map(str, files)]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout[-3000:]
    assert list(tmp_path.rglob("*.nbc"))  # compiled anew
