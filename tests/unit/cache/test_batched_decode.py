"""Sequences that are decoded together get what they get alone, out of the same caches."""

import copy

import pytest
import torch
from model_families import FAMILIES, model_pair
from plan_factory import EVICTIONS, make_plan, random_ids, with_bits, with_chunked_prefill

from baklava.cache.budgeted_cache import BudgetedCache
from baklava.cache.storage import allocated_bytes
from baklava.errors import UserError
from baklava.eviction import AttentionMatching, HeavyHitter, StreamingLLM, build_eviction
from baklava.plan.budget_plan import full_cache_plan
from baklava.runtime.batched_forward import batched_forward, decode_step
from baklava.runtime.prefill import TokenChunk, make_prefill_task, prefill

GRID = [(0, 0), (0, 1), (1, 0), (1, 1)]


def plan_per_method(loaded):
    plans = [make_plan(loaded, [[20, 40], [28, 64]], eviction) for eviction in EVICTIONS]
    bits = [[(16, 16), (8, 4)], [(5, 4), (3, 3)], [(32, 32), (6, 5)]]
    return [with_bits(plan, bits[place % 3]) for place, plan in enumerate(plans)]


@torch.inference_mode()
def decode(loaded, caches, rows, steps):
    """Feed each cache a row of tokens, all caches together, and return the logits per step."""
    return torch.stack([decode_step(loaded, caches, [int(row[step]) for row in rows]) for step in range(steps)])


def check_like_alone(loaded, starts, steps=30):
    """Check that each sequence, a (plan, prompt), has the logits and entries in the batch that it has alone."""
    rows = random_ids(len(starts), steps, seed=5)
    together = [prefill(loaded, plan, prompt, max_tokens=prompt.shape[1] + steps)[0] for plan, prompt in starts]
    logits = decode(loaded, together, rows, steps)
    for row, (plan, prompt) in enumerate(starts):
        alone, _ = prefill(loaded, plan, prompt)
        with torch.inference_mode():
            expected = [loaded.model(token[None, None], past_key_values=alone).logits[0, -1] for token in rows[row]]
        error = (logits[:, row] - torch.stack(expected)).abs()
        assert error[0].max() < 0.01
        if build_eviction(plan.eviction).query_sample.window == 0:
            continue  # equal tokens have equal scores but for rounding, so either may go
        assert error.mean() < 0.01  # a code that is rounded to the other side moves a few
        for layer, head in GRID:
            positions, positions_alone = (
                set(cache.cached_positions(layer, head).tolist()) for cache in (together[row], alone)
            )
            assert len(positions) == len(positions_alone)
            assert len(positions - positions_alone) <= 1
        together[row].check_integrity(alone.get_seq_length())
    return together


@pytest.mark.slow
def test_batched_sequences_of_different_plans_and_lengths_equal_the_same_alone(tiny):
    loaded = tiny(head_dim=16)
    starts = [(plan, random_ids(1, 5 + 13 * place, seed=place)) for place, plan in enumerate(plan_per_method(loaded))]
    check_like_alone(loaded, starts)


BITS = [(32, 32), (16, 16), (5, 4)]
# each method in one width, and the first in all of them
METHODS_AND_BITS = [
    *((eviction, BITS[place % 3]) for place, eviction in enumerate(EVICTIONS)),
    *((EVICTIONS[0], bits) for bits in BITS[1:]),
]


@pytest.mark.slow
@pytest.mark.parametrize(("eviction", "bits"), METHODS_AND_BITS, ids=lambda part: getattr(part, "name", str(part)))
def test_batched_sequences_of_one_plan_equal_the_same_alone(tiny, eviction, bits):
    loaded = tiny(head_dim=16)
    plan = with_bits(make_plan(loaded, [[20, 40], [28, 64]], eviction), [bits, bits])
    starts = [(plan, random_ids(1, tokens, seed=tokens)) for tokens in (50, 50, 57, 3, 90)]
    for cache in check_like_alone(loaded, starts):
        assert cache.nbytes <= cache.reserved_bytes


def slabs(cache):
    return [layer.slab for layer in cache.budgeted_layers]


@pytest.mark.parametrize("centroids", [0, 2])
@pytest.mark.parametrize("bits", [(32, 32), (16, 16), (5, 4)])
@torch.inference_mode()
def test_each_sequence_keeps_its_own_slabs_of_exactly_the_promised_bytes(tiny, bits, centroids):
    loaded = tiny(head_dim=16)
    plan = with_bits(
        make_plan(loaded, [[20, 40], [28, 64]], HeavyHitter(eviction_interval=4, distance=0)), [bits, bits]
    )
    plan = plan.model_copy(update={"eviction": plan.eviction.model_copy(update={"centroids": centroids})})
    caches = [prefill(loaded, plan, random_ids(1, 10 + 20 * seed, seed=seed), max_tokens=120)[0] for seed in range(4)]
    before = [slabs(cache) for cache in caches]
    decode(loaded, caches, random_ids(4, 10), 10)
    left = caches.pop()
    decode(loaded, caches, random_ids(3, 10), 10)
    caches.append(left)
    decode(loaded, caches, random_ids(4, 30), 30)
    for cache, own in zip(caches, before, strict=True):
        assert all(now is then for now, then in zip(slabs(cache), own, strict=True))
        assert cache.nbytes == plan.bytes_for(120)
        cache.check_integrity(cache.get_seq_length())


@torch.inference_mode()
def test_a_copy_has_slabs_of_its_own_size_and_goes_on_alike(tiny):
    loaded = tiny(head_dim=16)
    plan = with_bits(make_plan(loaded, [[20, 40], [28, 64]], HeavyHitter(eviction_interval=4)), [(5, 4), (16, 16)])
    cache, _ = prefill(loaded, plan, random_ids(1, 12), max_tokens=30)
    copied = cache.copy(60)
    assert (cache.nbytes, copied.nbytes) == (plan.bytes_for(30), plan.bytes_for(60))
    ids = random_ids(1, 15, seed=2)
    assert torch.equal(decode(loaded, [cache], ids, 15), decode(loaded, [copied], ids, 15))
    decode(loaded, [copied], ids, 15)
    copied.check_integrity(42)
    with pytest.raises(UserError, match="max_tokens 30"):
        decode(loaded, [cache], ids, 15)


@torch.inference_mode()
def test_a_deep_copy_is_a_copy_and_a_cache_cannot_be_pickled(tiny, tmp_path):
    loaded = tiny(head_dim=16)
    plan = with_bits(make_plan(loaded, [[20, 40], [28, 64]], HeavyHitter(eviction_interval=4)), [(5, 4), (16, 16)])
    cache, _ = prefill(loaded, plan, random_ids(1, 30), max_tokens=60)
    before, copied = allocated_bytes().current, copy.deepcopy(cache)
    assert allocated_bytes().current - before == copied.nbytes == cache.nbytes == plan.bytes_for(60)
    ids = random_ids(1, 15, seed=2)
    assert torch.equal(decode(loaded, [cache], ids, 15), decode(loaded, [copied], ids, 15))
    with pytest.raises(UserError, match="cannot be pickled"):
        torch.save(cache, tmp_path / "cache.pt")


@pytest.mark.slow
def test_a_batch_allocates_the_plan_and_not_the_text(tiny):
    loaded = tiny()
    plan = make_plan(loaded, [[20, 40], [28, 64]], HeavyHitter(eviction_interval=4, distance=0), bits=16)
    caches = check_like_alone(loaded, [(plan, random_ids(1, 100, seed=seed)) for seed in range(4)], steps=100)
    assert [len(caches[2].cached_positions(*place)) for place in GRID] == [16, 36, 24, 60]  # just evicted
    assert all(cache.nbytes == plan.bytes_for(200) < plan.full_bytes_per_sequence for cache in caches)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_batched_sequences_of_every_family_equal_the_same_alone(family):
    loaded, _ = model_pair(family)
    plan = full_cache_plan(loaded.identity, loaded.geometry, 100, bits=32)
    rows, steps = [random_ids(1, tokens, seed=tokens) for tokens in (3, 20, 45)], 20
    more = random_ids(3, steps, seed=9)
    caches = [prefill(loaded, plan, row)[0] for row in rows]
    logits = decode(loaded, caches, more, steps)
    for row, prompt in enumerate(rows):
        alone, _ = prefill(loaded, plan, prompt)
        with torch.inference_mode():
            expected = [loaded.model(token[None, None], past_key_values=alone).logits[0, -1] for token in more[row]]
        torch.testing.assert_close(logits[:, row], torch.stack(expected), atol=2e-3, rtol=2e-3)


@torch.inference_mode()
def test_an_error_in_one_cache_fails_the_step(tiny, monkeypatch):
    loaded = tiny()
    plan = make_plan(loaded, [[20, 40], [28, 64]], HeavyHitter(eviction_interval=4, distance=0))
    caches = [prefill(loaded, plan, random_ids(1, 30, seed=seed))[0] for seed in range(3)]

    def explode(*args):
        raise MemoryError("no memory")

    monkeypatch.setattr(caches[1].layers[1].groups[0], "maybe_evict", explode)
    with pytest.raises(MemoryError, match="no memory"):
        decode_step(loaded, caches, [1, 2, 3])


def test_a_step_needs_one_token_per_sequence(tiny):
    loaded = tiny()
    plan = make_plan(loaded, [[20, 40], [28, 64]], StreamingLLM())
    for caches, tokens in [([], []), ([BudgetedCache(plan)], [1, 2])]:
        with pytest.raises(UserError, match="one new token for each"):
            decode_step(loaded, caches, tokens)


def advance_together(loaded, task, caches, rows, tokens):
    """Prefill a prompt in chunks of about so many tokens, each in one forward with a token of every cache."""
    logits, done, step = [], None, 0
    while done is None:
        own = [TokenChunk(cache, row[step : step + 1]) for cache, row in zip(caches, rows, strict=True)]
        chunk = task.next_chunk(tokens)
        results, errors = batched_forward(loaded, own if chunk is None else [*own, chunk])
        assert errors == {}
        done = task.step(tokens) if chunk is None else task.process(results[len(own) :])
        logits.append(results[: len(own)])
        step += 1
    return torch.stack(logits), done


@torch.inference_mode()
def check_mixed(loaded, plan, tokens, tolerance):
    """Check that decoding sequences and a prompt in the same forwards get what they get alone."""
    prompts, rows = [random_ids(1, 20 + 30 * place, seed=place) for place in range(3)], random_ids(2, 60, seed=9)
    caches = [prefill(loaded, plan, prompt, max_tokens=200)[0] for prompt in prompts[:2]]
    copies = [cache.copy(200) for cache in caches]
    task = make_prefill_task(loaded, plan, prompts[2], 200)
    logits, (cache, last) = advance_together(loaded, task, caches, rows, tokens)
    assert len(logits) > 1
    alone, expected = prefill(loaded, plan, prompts[2], max_tokens=200)
    torch.testing.assert_close(last, expected, **tolerance)
    assert_same_positions(cache, alone)
    for number, row in enumerate(rows):
        for step in range(len(logits)):
            own = decode_step(loaded, [copies[number]], [int(row[step])])
            torch.testing.assert_close(logits[step, number], own[0], **tolerance)
        assert_same_positions(caches[number], copies[number])


def assert_same_positions(one, other):
    for layer in range(len(one.layers)):
        if one.plan.layers[layer] is not None:
            for head in range(one.plan.geometry.kv_heads):
                assert one.cached_positions(layer, head).tolist() == other.cached_positions(layer, head).tolist()


@pytest.mark.parametrize("chunk", [None, 40], ids=["dense", "chunked"])
@pytest.mark.parametrize("eviction", [StreamingLLM(), *(each for each in EVICTIONS if each.name != "kvzip")])
def test_a_prompt_and_decoding_sequences_share_their_forwards(tiny, eviction, chunk):
    loaded = tiny(head_dim=32)
    plan = with_bits(make_plan(loaded, [[50, 40], [48, 64]], eviction), [(16, 16), (32, 32)])
    plan = with_chunked_prefill(plan, chunk) if chunk else plan
    check_mixed(loaded, plan, 17, {"atol": 2e-3, "rtol": 2e-3})


@pytest.mark.parametrize("chunk", [None, 40], ids=["dense", "chunked"])
@pytest.mark.parametrize("bits", [[(8, 6), (5, 16)], [(4, 3), (2, 2)]], ids=str)
@pytest.mark.parametrize(
    "eviction",
    [
        StreamingLLM(),
        HeavyHitter(eviction_interval=5, distance=0, centroids=2),
        HeavyHitter(eviction_interval=5, distance=0, residual_length=8),
        AttentionMatching(eviction_interval=4, references=16, fit_references=8, centroids=2),
    ],
)
def test_coded_entries_of_a_prompt_and_of_decoding_sequences_share_their_forwards(tiny, eviction, bits, chunk):
    loaded = tiny(head_dim=32)
    plan = with_bits(make_plan(loaded, [[50, 40], [48, 64]], eviction), bits)
    check_mixed(loaded, with_chunked_prefill(plan, chunk) if chunk else plan, 17, {"atol": 2e-3, "rtol": 2e-3})


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_of_every_family_shares_forwards_with_decoding_sequences(family):
    loaded, _ = model_pair(family)
    plan = with_chunked_prefill(full_cache_plan(loaded.identity, loaded.geometry, 200, bits=32), 33)
    check_mixed(loaded, plan, 33, {"atol": 2e-3, "rtol": 2e-3})


@torch.inference_mode()
def test_a_chunk_that_fails_leaves_the_other_sequences_as_they_are_alone(tiny, monkeypatch):
    loaded = tiny()
    plan = make_plan(loaded, [[20, 40], [28, 64]], HeavyHitter(eviction_interval=4, distance=0))
    cache, _ = prefill(loaded, plan, random_ids(1, 30))
    copied, task = cache.copy(), make_prefill_task(loaded, plan, random_ids(1, 50))
    chunk = task.next_chunk(20)

    def explode(*args):
        raise MemoryError("no memory")

    monkeypatch.setattr(chunk.cache.layers[1], "attend", explode)
    logits, errors = batched_forward(loaded, [TokenChunk(cache, torch.tensor([5])), chunk])
    assert (list(errors), str(errors[1])) == ([1], "no memory")
    torch.testing.assert_close(logits[:1], decode_step(loaded, [copied], [5]), atol=1e-4, rtol=1e-4)
