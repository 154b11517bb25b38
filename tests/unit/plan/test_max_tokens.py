"""A cache that knows how long its sequence will be promises less, and does nothing else differently."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plan_factory import chunked, mixed, plan_of, random_ids

from baklava.errors import UserError
from baklava.eviction import METHODS, HeavyHitter, Streaming
from baklava.plan.budget_plan import BudgetPlan
from baklava.runtime.prefill import prefill

EVICTIONS = [
    Streaming(sinks=2),
    HeavyHitter(sinks=3, interval=4, distance=0),
    HeavyHitter(sinks=2, interval=5, staged=True, centroids=2),
    *(METHODS[name](sinks=2, interval=4) for name in ("tova", "snapkv", "key_norm", "keydiff", "expected_attention")),
]
BITS = [[(32, 32), (32, 32)], [(16, 16), (8, 4)], [(4, 3), (2, 16)], [(6, 5), (3, 2)]]


def plans(loaded) -> list[BudgetPlan]:
    made = [
        mixed(plan_of(loaded, [[20, 40], [28, 64]], eviction), bits)
        for eviction in EVICTIONS
        for bits in BITS
        if not eviction.staged or min(min(pair) for pair in bits) < 16
    ]
    return made + [chunked(plan, 9) for plan in made]


@torch.inference_mode()
def fed(loaded, plan, ids, prompt, room):
    cache, logits = prefill(loaded, plan, ids[:, :prompt], max_tokens=room)
    seen = [logits]
    for token in range(prompt, ids.shape[1]):
        assert 0 < cache.nbytes <= cache.reserved_bytes
        cache.check_integrity()
        seen.append(loaded.model(ids[:, token : token + 1], past_key_values=cache).logits[:, -1])
    assert cache.nbytes <= cache.reserved_bytes
    return cache, torch.stack(seen)


@given(st.data())
@settings(max_examples=60)
def test_a_sequence_holds_no_more_than_is_promised_for_its_length(tiny, data):
    loaded = tiny(head_dim=16)
    plan = data.draw(st.sampled_from(plans(loaded)))
    prompt, more = data.draw(st.integers(1, 60)), data.draw(st.integers(0, 30))
    room = prompt + more + data.draw(st.integers(0, 40))
    cache, _ = fed(loaded, plan, random_ids(1, prompt + more), prompt, room)
    assert cache.reserved_bytes == plan.bytes_for(room) <= plan.bytes_per_sequence


@pytest.mark.parametrize("eviction", EVICTIONS, ids=str)
def test_room_changes_neither_what_is_kept_nor_what_is_said(tiny, eviction):
    loaded, ids = tiny(head_dim=16), random_ids(1, 50)
    plan = mixed(plan_of(loaded, [[20, 40], [28, 64]], eviction), [(16, 16), (8, 4)])
    without, said = fed(loaded, plan, ids, 18, None)
    within, same = fed(loaded, plan, ids, 18, 50)
    assert torch.equal(said, same)
    for layer, head in [(0, 0), (0, 1), (1, 0), (1, 1)]:
        assert torch.equal(without.cached_positions(layer, head), within.cached_positions(layer, head))
    assert within.reserved_bytes < without.reserved_bytes


def test_a_promise_grows_with_the_tokens_until_the_largest_budget(tiny):
    for plan in plans(tiny(head_dim=16)):
        promised = [plan.bytes_for(tokens) for tokens in range(1, 80)]
        assert promised == sorted(promised)
        assert promised[63] == promised[-1] == plan.bytes_per_sequence
        assert promised[10] < plan.bytes_per_sequence


@torch.inference_mode()
def test_a_full_sequence_holds_to_the_byte_what_its_room_promised(tiny):
    loaded, ids = tiny(), random_ids(1, 30)
    plan = plan_of(loaded, [[20, 40], [28, 64]], Streaming(sinks=2), bits=16)
    cache, _ = fed(loaded, plan, ids, 10, 30)
    assert cache.nbytes == plan.bytes_for(30)


@torch.inference_mode()
def test_more_tokens_than_there_is_room_for_are_refused(tiny):
    loaded = tiny()
    plan = plan_of(loaded, [[20, 40], [28, 64]], Streaming())
    cache, _ = prefill(loaded, plan, random_ids(1, 10), max_tokens=11)
    loaded.model(random_ids(1, 1), past_key_values=cache)
    with pytest.raises(UserError, match="1 tokens behind 11 in a cache that was made for a sequence of 11"):
        loaded.model(random_ids(1, 1), past_key_values=cache)
    with pytest.raises(UserError, match="12 tokens behind 0"):
        prefill(loaded, plan, random_ids(1, 12), max_tokens=11)


@torch.inference_mode()
@pytest.mark.parametrize("eviction", EVICTIONS, ids=str)
def test_a_copy_goes_on_alone_in_a_room_of_its_own(tiny, eviction):
    loaded, ids = tiny(head_dim=16), random_ids(1, 70)
    plan = mixed(plan_of(loaded, [[20, 40], [28, 64]], eviction), [(16, 16), (8, 4)])
    cache, logits = prefill(loaded, plan, ids[:, :18], max_tokens=18)
    held = cache.nbytes
    copied = cache.copy(max_tokens=70)
    assert copied.plan is cache.plan
    _, expected = fed(loaded, plan, ids, 18, None)
    said = [logits]
    for token in range(18, 70):
        said.append(loaded.model(ids[:, token : token + 1], past_key_values=copied).logits[:, -1])
        assert copied.nbytes <= copied.reserved_bytes
    assert torch.equal(torch.stack(said), expected)
    assert (cache.nbytes, cache.get_seq_length()) == (held, 18)
    assert held <= cache.reserved_bytes < copied.reserved_bytes
