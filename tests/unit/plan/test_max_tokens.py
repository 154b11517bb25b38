"""A cache that knows the maximum length of its sequence reserves less, and behaves the same otherwise."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plan_factory import make_plan, random_ids, with_bits, with_chunked_prefill

from baklava.errors import UserError
from baklava.eviction import METHODS, HeavyHitter, StreamingLLM
from baklava.plan.budget_plan import BudgetPlan
from baklava.runtime.prefill import prefill

EVICTIONS = [
    StreamingLLM(sinks=2),
    HeavyHitter(sinks=3, eviction_interval=4, distance=0),
    HeavyHitter(sinks=2, eviction_interval=5, residual_length=8, centroids=2),
    *(
        METHODS[name](sinks=2, eviction_interval=4)
        for name in ("tova", "snapkv", "key_norm", "keydiff", "expected_attention")
    ),
]
BITS = [[(32, 32), (32, 32)], [(16, 16), (8, 4)], [(4, 3), (2, 16)], [(6, 5), (3, 2)]]


def plans(loaded) -> list[BudgetPlan]:
    combined = [
        with_bits(make_plan(loaded, [[20, 40], [28, 64]], eviction), bits)
        for eviction in EVICTIONS
        for bits in BITS
        if not eviction.residual_length or min(min(pair) for pair in bits) < 16
    ]
    return combined + [with_chunked_prefill(plan, 9) for plan in combined]


@torch.inference_mode()
def decode_rest(loaded, plan, ids, prompt, max_tokens):
    cache, logits = prefill(loaded, plan, ids[:, :prompt], max_tokens=max_tokens)
    seen = [logits]
    for token in range(prompt, ids.shape[1]):
        assert 0 < cache.nbytes <= cache.reserved_bytes
        cache.check_integrity(token)
        seen.append(loaded.model(ids[:, token : token + 1], past_key_values=cache).logits[:, -1])
    assert cache.nbytes <= cache.reserved_bytes
    return cache, torch.stack(seen)


@pytest.mark.slow
@given(st.data())
@settings(max_examples=30)
def test_a_sequence_allocates_no_more_than_is_reserved_for_its_length(tiny, data):
    loaded = tiny(head_dim=16)
    plan = data.draw(st.sampled_from(plans(loaded)))
    prompt, more = data.draw(st.integers(1, 60)), data.draw(st.integers(0, 30))
    max_tokens = prompt + more + data.draw(st.integers(0, 40))
    cache, _ = decode_rest(loaded, plan, random_ids(1, prompt + more), prompt, max_tokens)
    assert cache.reserved_bytes == plan.bytes_for(max_tokens) <= plan.bytes_per_sequence


@pytest.mark.slow
@pytest.mark.parametrize("eviction", EVICTIONS, ids=str)
def test_max_tokens_changes_neither_entries_nor_logits(tiny, eviction):
    loaded, ids = tiny(head_dim=16), random_ids(1, 50)
    plan = with_bits(make_plan(loaded, [[20, 40], [28, 64]], eviction), [(16, 16), (8, 4)])
    without, said = decode_rest(loaded, plan, ids, 18, None)
    within, same = decode_rest(loaded, plan, ids, 18, 50)
    assert torch.equal(said, same)
    for layer, head in [(0, 0), (0, 1), (1, 0), (1, 1)]:
        assert torch.equal(without.cached_positions(layer, head), within.cached_positions(layer, head))
    assert within.reserved_bytes < without.reserved_bytes


def test_reserved_bytes_grow_with_the_tokens_until_the_largest_budget(tiny):
    for plan in plans(tiny(head_dim=16)):
        reserved = [plan.bytes_for(tokens) for tokens in range(1, 80)]
        assert reserved == sorted(reserved)
        assert reserved[63] == reserved[-1] == plan.bytes_per_sequence
        assert reserved[10] < plan.bytes_per_sequence


@torch.inference_mode()
def test_a_sequence_of_max_tokens_allocates_exactly_the_reserved_bytes(tiny):
    loaded, ids = tiny(), random_ids(1, 30)
    plan = make_plan(loaded, [[20, 40], [28, 64]], StreamingLLM(sinks=2), bits=16)
    cache, _ = decode_rest(loaded, plan, ids, 10, 30)
    assert cache.nbytes == plan.bytes_for(30)


@torch.inference_mode()
def test_more_than_max_tokens_are_refused(tiny):
    loaded = tiny()
    plan = make_plan(loaded, [[20, 40], [28, 64]], StreamingLLM())
    cache, _ = prefill(loaded, plan, random_ids(1, 10), max_tokens=11)
    loaded.model(random_ids(1, 1), past_key_values=cache)
    with pytest.raises(UserError, match="1 tokens after 11 in a cache with max_tokens 11"):
        loaded.model(random_ids(1, 1), past_key_values=cache)
    with pytest.raises(UserError, match="12 tokens after 0"):
        prefill(loaded, plan, random_ids(1, 12), max_tokens=11)


@pytest.mark.slow
@torch.inference_mode()
@pytest.mark.parametrize("eviction", EVICTIONS, ids=str)
def test_a_copy_continues_independently_with_its_own_max_tokens(tiny, eviction):
    loaded, ids = tiny(head_dim=16), random_ids(1, 46)
    plan = with_bits(make_plan(loaded, [[20, 32], [28, 40]], eviction), [(16, 16), (8, 4)])
    cache, logits = prefill(loaded, plan, ids[:, :18], max_tokens=18)
    held = cache.nbytes
    copied = cache.copy(max_tokens=46)
    assert copied.plan is cache.plan
    _, expected = decode_rest(loaded, plan, ids, 18, None)
    said = [logits]
    for token in range(18, 46):
        said.append(loaded.model(ids[:, token : token + 1], past_key_values=copied).logits[:, -1])
        assert copied.nbytes <= copied.reserved_bytes
    assert torch.equal(torch.stack(said), expected)
    assert (cache.nbytes, cache.get_seq_length()) == (held, 18)
    assert held <= cache.reserved_bytes < copied.reserved_bytes
