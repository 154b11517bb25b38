"""A prompt that is processed step by step gives what one forward gives."""

import itertools

import pytest
import torch
from plan_factory import EVICTIONS, make_plan, random_ids, with_bits

from baklava.cache.budgeted_cache import BudgetedCache
from baklava.errors import UserError
from baklava.eviction import HeavyHitter, KVzip, StreamingLLM
from baklava.runtime.prefill import (
    CONTINUATION_CHUNK_TOKENS,
    ChunkedPrefill,
    make_prefill_task,
    prefill,
    prefill_and_record,
    prefill_workspace_bytes,
)

every_method = pytest.mark.parametrize("eviction", EVICTIONS, ids=lambda eviction: eviction.name)
GRID = [(0, 0), (0, 1), (1, 0), (1, 1)]


def prefill_in_steps(loaded, plan, ids, sizes, max_tokens=None):
    task = make_prefill_task(loaded, plan, ids[0].tolist(), max_tokens)
    for number, size in enumerate(itertools.cycle(sizes), 1):
        if result := task.step(size):
            return *result, number
        assert 0 <= task.nbytes <= prefill_workspace_bytes(plan, ids.shape[1], 4) + plan.bytes_for(max_tokens)


@pytest.mark.slow
@every_method
@pytest.mark.parametrize("sizes", [[120], [7], [1, 30, 2], [64, 36]], ids=str)
@torch.inference_mode()
def test_steps_of_any_size_give_what_one_forward_gives(tiny, eviction, sizes):
    loaded, ids = tiny(head_dim=16), random_ids(1, 100)
    plan = with_bits(make_plan(loaded, [[20, 40], [28, 64]], eviction), [(16, 16), (32, 32)])
    cache, logits, _ = prefill_in_steps(loaded, plan, ids, sizes, max_tokens=130)
    whole, expected = prefill(loaded, plan, ids, max_tokens=130)
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    for layer, head in GRID:
        assert torch.equal(cache.cached_positions(layer, head), whole.cached_positions(layer, head))
    if not cache.eviction.query_sample.uses_repetition:
        plain = BudgetedCache(plan, 130)
        torch.testing.assert_close(logits, loaded.model(ids, past_key_values=plain).logits[:, -1], atol=1e-4, rtol=1e-4)
        for layer, head in GRID:
            assert torch.equal(cache.cached_positions(layer, head), plain.cached_positions(layer, head))
    for token in random_ids(12, 1, seed=3):
        pair = [loaded.model(token[None], past_key_values=own).logits for own in (cache, whole)]
        torch.testing.assert_close(*pair, atol=2e-3, rtol=2e-3)
    assert cache.nbytes == whole.nbytes <= cache.reserved_bytes == plan.bytes_for(130)


@every_method
def test_a_prefill_allocates_its_workspace_to_the_byte_and_then_the_plan(tiny, eviction):
    loaded, ids = tiny(), random_ids(1, 90)
    plan = make_plan(loaded, [[20, 40], [28, 64]], eviction)
    task = make_prefill_task(loaded, plan, ids[0].tolist())
    if isinstance(eviction, KVzip):
        recording = prefill_and_record(loaded, ids, [eviction]).recording
        tensors = [*recording.keys, *recording.values, *recording.reconstruction]
        tensors += [scores for layer in recording.scores for scores in layer.values()]
        assert sum(tensor.untyped_storage().nbytes() for tensor in tensors) == prefill_workspace_bytes(plan, 90, 4)
        assert task.step(5) is not None
        return
    for _ in range(89):
        assert task.step(1) is None
    # The last query of 4 heads of 8 in 2 layers is to come.
    missing = eviction.query_sample.single_block * 4 * 4 * 8 * 2
    workspace = prefill_workspace_bytes(plan, 90, 4)
    assert task.nbytes == workspace - missing
    assert task.step(1) is None  # one layer of two is compressed, so that no step takes long
    assert task.nbytes < workspace / 2 + plan.bytes_per_sequence / 2 + 1
    cache, _ = task.step(1)
    assert task.nbytes == cache.nbytes <= plan.bytes_per_sequence


def test_a_prefilled_cache_shares_no_memory_with_the_prompt(tiny):
    loaded, ids = tiny(), random_ids(1, 90)
    cache, _, _ = prefill_in_steps(
        loaded, make_plan(loaded, [[20, 40], [28, 64]], HeavyHitter(eviction_interval=4)), ids, [30]
    )
    cache.check_integrity(90)
    for layer in cache.budgeted_layers:
        memory = layer.slab.tensors[0].untyped_storage()
        assert all(tensor.untyped_storage().data_ptr() == memory.data_ptr() for tensor in layer.slab.tensors)
        assert memory.nbytes() == sum(tensor.nbytes for tensor in layer.slab.tensors)


def test_an_empty_prompt_and_another_models_plan_are_refused(tiny):
    loaded = tiny()
    plan = make_plan(loaded, [[20, 40], [28, 64]], StreamingLLM())
    with pytest.raises(UserError, match="at least one token"):
        make_prefill_task(loaded, plan, [])
    with pytest.raises(UserError, match="was made for"):
        make_prefill_task(tiny(layers=3), plan, [1])


@every_method
@torch.inference_mode()
def test_a_continuation_gives_what_plain_forwards_give(tiny, eviction):
    loaded, ids, more = tiny(), random_ids(1, 60), random_ids(1, 2 * CONTINUATION_CHUNK_TOKENS + 3, seed=1)
    plan = make_plan(loaded, [[20, 40], [28, 64]], eviction)
    cache, logits = prefill(loaded, plan, ids)
    plain = cache.copy()
    task, steps = ChunkedPrefill(loaded, cache, logits, more[0].tolist()), 1
    while not (result := task.step(CONTINUATION_CHUNK_TOKENS)):
        steps += 1
    assert (steps, task.num_processed) == (3, more.shape[1])
    for start in range(0, more.shape[1], CONTINUATION_CHUNK_TOKENS):
        output = loaded.model(more[:, start : start + CONTINUATION_CHUNK_TOKENS], past_key_values=plain)
    torch.testing.assert_close(result[1], output.logits[:, -1], atol=1e-4, rtol=1e-4)
    assert torch.equal(cache.cached_positions(1, 1), plain.cached_positions(1, 1))
    assert ChunkedPrefill(loaded, cache, logits, []).step(1)[1] is logits


@every_method
def test_a_step_that_allows_for_all_never_allocates_the_full_cache(tiny, eviction):
    loaded, ids = tiny(), random_ids(1, 90)
    plan = make_plan(loaded, [[20, 40], [28, 64]], eviction)
    task = make_prefill_task(loaded, plan, ids)
    cache, _ = task.run()
    assert task.num_processed >= 90
    assert task.nbytes <= cache.nbytes <= plan.bytes_per_sequence
