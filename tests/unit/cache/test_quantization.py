"""Caches whose entries are packed: what they hold, that entries do not drift, and that every way in is the same."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from plan_factory import make_plan, quantized_plan, random_ids, with_bits, with_chunked_prefill, with_mixed_precision
from torch import Tensor
from transformers import DynamicCache

from baklava.cache.budgeted_cache import BudgetedCache
from baklava.errors import UserError
from baklava.eviction import (
    TOVA,
    Eviction,
    ExpectedAttention,
    HeavyHitter,
    KeyDiff,
    KeyNorm,
    KVzip,
    SnapKV,
    StreamingLLM,
)
from baklava.runtime.model_loader import LoadedModel
from baklava.runtime.prefill import prefill

Maker = Callable[..., LoadedModel]

EVICTIONS = [
    StreamingLLM(sinks=2),
    StreamingLLM(sinks=0),
    HeavyHitter(sinks=2, eviction_interval=4, distance=0),
    HeavyHitter(sinks=0, eviction_interval=6, recent_ratio=0.2, residual_length=6, distance=0),
    TOVA(sinks=1, eviction_interval=3, residual_length=2),
    SnapKV(sinks=2, eviction_interval=4, window=3, residual_length=11),
    KeyNorm(sinks=2, eviction_interval=5),
    KeyDiff(sinks=0, eviction_interval=4, residual_length=4),
    ExpectedAttention(sinks=2, eviction_interval=4, window=6),
    KVzip(sinks=2, eviction_interval=4, residual_length=7),
]

every_eviction = pytest.mark.parametrize("eviction", EVICTIONS, ids=str)
# each method in one width, and heavy hitters in all of them
METHODS_AND_BITS = [
    *((eviction, (6, 4, 2)[place % 3]) for place, eviction in enumerate(EVICTIONS)),
    *((EVICTIONS[2], bits) for bits in (6, 4)),
]


def steps(loaded: LoadedModel, cache: BudgetedCache, ids: Tensor, **options: Any) -> Tensor:
    return torch.cat([loaded.model(token[:, None], past_key_values=cache, **options).logits for token in ids.T], 1)


@pytest.mark.slow
@torch.inference_mode()
@every_eviction
def test_storage_is_the_plan_after_long_decoding_and_never_more(tiny: Maker, eviction: Eviction) -> None:
    loaded = tiny()
    plan = quantized_plan(loaded, eviction, 3)
    cache, _ = prefill(loaded, plan, random_ids(1, 90))
    for token in random_ids(60, 1):
        assert cache.nbytes <= cache.reserved_bytes
        loaded.model(token[None], past_key_values=cache)
    cache.check_integrity(150)
    assert cache.nbytes == cache.reserved_bytes
    assert cache.reserved_bytes < 0.8 * quantized_plan(loaded, eviction, 16).bytes_per_sequence
    for layer, row in enumerate(plan.tokens):
        for head, tokens in enumerate(row):
            held = cache.cached_positions(layer, head)
            assert tokens - eviction.eviction_interval <= len(held) <= tokens
            assert held[: eviction.sinks].tolist() == list(range(eviction.sinks))


@pytest.mark.slow
@torch.inference_mode()
@pytest.mark.parametrize(("eviction", "bits"), METHODS_AND_BITS, ids=str)
def test_mixed_precision_keys_allocate_the_plan_together_and_one_by_one(
    tiny: Maker, eviction: Eviction, bits: int
) -> None:
    loaded, ids = tiny(head_dim=32), random_ids(2, 25, seed=3)
    plan = with_mixed_precision(loaded, with_bits(quantized_plan(loaded, eviction), [(bits, 4), (5, 16)]))
    one_by_one, _ = prefill(loaded, plan, random_ids(2, 80))
    together = copy.deepcopy(one_by_one)
    slow = steps(loaded, one_by_one, ids)
    with together.teacher_forcing():
        fast = loaded.model(ids, past_key_values=together).logits
    one_by_one.check_integrity(105)
    assert one_by_one.nbytes == 2 * one_by_one.reserved_bytes
    plain, _ = prefill(loaded, plan.model_copy(update={"key_channels": None}), random_ids(2, 80))
    # Sums in another order flip a code now and then, and what follows it: few logits, and little.
    assert float((fast - slow).abs().mean()) < 0.02 * float((steps(loaded, plain, ids) - slow).abs().mean())


@torch.inference_mode()
def test_a_quantized_cache_really_is_smaller(tiny: Maker) -> None:
    loaded = tiny(head_dim=64)
    held = {}
    for bits in (16, 8, 4, 3, 2):
        cache = BudgetedCache(make_plan(loaded, [[400, 400]] * 2, StreamingLLM(sinks=4), bits=bits))
        loaded.model(random_ids(2, 500), past_key_values=cache)
        held[bits] = cache.nbytes
    ratios = [held[bits] / held[16] for bits in (8, 4, 3, 2)]
    # bits / 16, a scale of 2 bytes in 128 per entry, four sinks, and the mean of the keys
    assert ratios == pytest.approx([0.516 + 0.006, 0.266 + 0.009, 0.203 + 0.01, 0.141 + 0.011], abs=0.004)


@pytest.mark.slow
@torch.inference_mode()
@every_eviction
def test_8_bits_are_nearly_16(tiny: Maker, eviction: Eviction) -> None:
    loaded, ids, after = tiny(), random_ids(1, 60), random_ids(1, 30, seed=2)
    caches = [prefill(loaded, quantized_plan(loaded, eviction, bits), ids)[0] for bits in (16, 8)]
    dense, packed = (steps(loaded, cache, after) for cache in caches)
    # Only the first tokens: one near tie that goes the other way changes which entries stay, and all that follows.
    assert float((dense - packed)[:, :3].abs().max()) < 0.1 * float(dense.std())


@pytest.mark.slow
@torch.inference_mode()
@pytest.mark.parametrize("bits", [8, 4, 3, 2])
@pytest.mark.parametrize("residual", [0, 4, 9])
def test_entries_that_stay_change_only_when_they_leave_the_residual(tiny: Maker, bits: int, residual: int) -> None:
    loaded = tiny()
    eviction = HeavyHitter(sinks=2, eviction_interval=4, recent_ratio=0.2, residual_length=residual, distance=0)
    cache = BudgetedCache(make_plan(loaded, [[20, 30], [25, 25]], eviction, bits=bits))
    loaded.model(random_ids(1, 60), past_key_values=cache)
    first = entries(cache)
    for turn in range(3):
        steps(loaded, cache, random_ids(1, 17, seed=turn))
        loaded.model(random_ids(1, 23, seed=turn), past_key_values=cache)
    last = entries(cache)
    remaining = first.keys() & last.keys()
    assert len(remaining) > 20
    assert all(torch.equal(first[name], last[name]) for name in remaining)


@pytest.mark.parametrize("residual", [5, 9, 17])
@torch.inference_mode()
def test_the_newest_entries_of_a_full_head_are_in_16_bits(tiny: Maker, residual: int) -> None:
    loaded = tiny()
    eviction = HeavyHitter(sinks=2, eviction_interval=4, recent_ratio=0.7, residual_length=residual, distance=0)
    exact, coded = (BudgetedCache(make_plan(loaded, [[20, 30], [25, 25]], eviction, bits=bits)) for bits in (16, 2))
    prompt = random_ids(1, 60)
    for cache in (exact, coded):
        loaded.model(prompt, past_key_values=cache)
    for number in range(1, 30):
        for cache in (exact, coded):
            steps(loaded, cache, random_ids(1, 1, seed=number))
        theirs, ours = (entries(cache, residual=True) for cache in (exact, coded))
        for group in coded.budgeted_layers[0].groups:
            newest = min(residual - 4, eviction.recent_window(group.budget.tokens)) + number % 4
            expected = range(60 + number - newest, 60 + number)
            assert group.cached_positions()[0, 0, -newest:].tolist() == list(expected)
            # What the first layer stores does not depend on what the cache holds. Rotations keep the length.
            for name in [(0, head, position) for head in group.budget.heads for position in expected]:
                torch.testing.assert_close(ours[name].norm(), theirs[name].norm(), rtol=2e-3, atol=0)


def entries(cache: BudgetedCache, residual: bool = False) -> dict[tuple[int, int, int], Tensor]:
    """Key and value of each (layer, head, position) that is held, with or without those in the residual."""
    found = {}
    for index, layer in enumerate(cache.budgeted_layers):
        for group in layer.groups:
            pair = torch.cat([group.keys.read(group.num_filled), group.values.read(group.num_filled)], -1)
            pair = pair if residual else pair[:, :, : group.residual_start]
            for place, head in enumerate(group.budget.heads):
                held = group.cached_positions().expand(-1, len(group.budget.heads), -1)
                positions = held[0, place, : pair.shape[2]].tolist()
                found |= {(index, head, position): pair[0, place, slot] for slot, position in enumerate(positions)}
    return found


@pytest.mark.slow
@torch.inference_mode()
@every_eviction
def test_tokens_see_the_same_together_and_one_by_one(tiny: Maker, eviction: Eviction) -> None:
    loaded, ids = tiny(), random_ids(1, 25, seed=3)
    # Three tokens: those after them are forced, and some of them stay in 16 bits as sinks.
    for prompt in (80, 3):
        one_by_one, _ = prefill(loaded, quantized_plan(loaded, eviction), random_ids(1, prompt))
        together = copy.deepcopy(one_by_one)
        slow = steps(loaded, one_by_one, ids)
        with together.teacher_forcing():
            fast = loaded.model(ids, past_key_values=together).logits
        torch.testing.assert_close(fast, slow, atol=1e-3, rtol=1e-3)
        assert together.nbytes == one_by_one.nbytes or not eviction.scored


@pytest.mark.slow
@torch.inference_mode()
# Equal tokens have keys of equal norm in the first layer; context reconstruction takes no padded rows.
@pytest.mark.parametrize("eviction", [e for e in EVICTIONS if not isinstance(e, KeyNorm | KVzip)], ids=str)
def test_a_left_padded_batch_equals_its_rows_alone(tiny: Maker, eviction: Eviction) -> None:
    loaded, ids = tiny(), random_ids(3, 40, seed=1)
    # Each row fills its heads: padding fills slots too, and recent tokens after it stay in 16 bits.
    plan = with_bits(make_plan(loaded, [[14, 18], [16, 16]], eviction), [(4, 4), (8, 3)])
    mask = torch.ones_like(ids)
    mask[0, :7], mask[2, :21] = 0, 0
    options = {"max_new_tokens": 16, "do_sample": False}
    batch = loaded.model.generate(ids, attention_mask=mask, past_key_values=BudgetedCache(plan), **options)
    for row in range(3):
        real = ids[row : row + 1, mask[row].bool()]
        alone = loaded.model.generate(real, past_key_values=BudgetedCache(plan), **options)
        assert torch.equal(batch[row, 40:], alone[0, real.shape[1] :])


def biased(loaded: LoadedModel) -> LoadedModel:
    """The same model, whose keys lie around a point far from zero."""
    for layer in loaded.model.model.layers:
        layer.self_attn.k_proj.bias = torch.nn.Parameter(torch.linspace(-4, 4, layer.self_attn.k_proj.out_features))
    return loaded


@pytest.mark.slow
@torch.inference_mode()
@pytest.mark.parametrize(
    "eviction", [StreamingLLM(), KeyNorm(eviction_interval=4), HeavyHitter(eviction_interval=4, distance=0)], ids=str
)
@pytest.mark.parametrize("first", [1, 3, 5])
def test_what_a_short_prompt_left_stays_as_it_is_when_a_long_turn_comes(
    tiny: Maker, eviction: Eviction, first: int
) -> None:
    loaded, ids = biased(tiny()), random_ids(1, 40)
    cache = BudgetedCache(make_plan(loaded, [[60, 60]] * 2, eviction, bits=4))
    loaded.model(ids[:, :first], past_key_values=cache)
    steps(loaded, cache, ids[:, first:18])
    group = cache.budgeted_layers[0].groups[0]
    before = group.keys.read(group.num_filled).clone()
    loaded.model(ids[:, 18:], past_key_values=cache)
    assert torch.equal(group.keys.read(18), before)


@pytest.mark.slow
@torch.inference_mode()
@pytest.mark.parametrize("eviction", [each for each in EVICTIONS if not each.query_sample.uses_repetition], ids=str)
def test_a_text_has_the_same_logits_however_it_is_chunked(tiny: Maker, eviction: Eviction) -> None:
    loaded, ids = biased(tiny(layers=1)), random_ids(1, 40)
    plan = make_plan(loaded, [[14, 20]], eviction, bits=4)
    expected = steps(loaded, BudgetedCache(plan), ids)
    for step in (40, 7):
        cache = BudgetedCache(plan)
        with cache.teacher_forcing():
            forced = [loaded.model(part, past_key_values=cache).logits for part in ids.split(step, 1)]
        torch.testing.assert_close(torch.cat(forced, 1), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
@torch.inference_mode()
@pytest.mark.parametrize(
    "eviction",
    [
        StreamingLLM(),
        HeavyHitter(eviction_interval=4, distance=0),
        SnapKV(eviction_interval=4),
        KeyDiff(eviction_interval=4),
    ],
    ids=str,
)
def test_a_row_shorter_than_the_sinks_has_them_in_16_bits_too(tiny: Maker, eviction: Eviction) -> None:
    loaded, ids = tiny(), random_ids(2, 16)
    plan, options = make_plan(loaded, [[20, 20]] * 2, eviction, bits=4), {"max_new_tokens": 30, "do_sample": False}
    mask = torch.ones_like(ids)
    mask[0, :14] = 0
    batch = loaded.model.generate(ids, attention_mask=mask, past_key_values=BudgetedCache(plan), **options)
    alone = loaded.model.generate(ids[:1, 14:], past_key_values=BudgetedCache(plan), **options)
    assert torch.equal(batch[0, 16:], alone[0, 2:])


@pytest.mark.slow
@torch.inference_mode()
@every_eviction
@pytest.mark.parametrize("bits", [[(16, 4), (4, 16)], [(8, 3), (2, 4)], [(32, 8), (4, 4)]], ids=str)
def test_heads_of_one_layer_have_bits_of_their_own(tiny: Maker, eviction: Eviction, bits: Any) -> None:
    loaded = tiny()
    plan = with_bits(make_plan(loaded, [[30, 30], [25, 25]], eviction), bits)
    cache, _ = prefill(loaded, plan, random_ids(2, 70))
    cache.check_integrity(70)
    loaded.model.generate(random_ids(2, 90), past_key_values=cache, max_new_tokens=20, do_sample=False)
    cache.check_integrity(109)
    assert cache.nbytes == 2 * cache.reserved_bytes


@pytest.mark.slow
@torch.inference_mode()
@pytest.mark.parametrize(
    "eviction",
    [StreamingLLM(sinks=2), HeavyHitter(sinks=2, eviction_interval=8, residual_length=8, distance=0)],
    ids=str,
)
def test_chunks_and_second_turns_are_near_a_full_cache(tiny: Maker, eviction: Eviction) -> None:
    loaded, ids = tiny(head_dim=32), random_ids(2, 120)
    plan = with_chunked_prefill(make_plan(loaded, [[140, 150]] * 2, eviction, bits=8), 24)
    cache, first = prefill(loaded, plan, ids[:, :60])
    second = loaded.model(ids[:, 60:100], past_key_values=cache).logits
    third = steps(loaded, cache, ids[:, 100:])
    ours = torch.cat([first[:, None], second, third], 1)
    exact = loaded.model(ids, past_key_values=DynamicCache()).logits[:, 59:]
    assert float((ours - exact).abs().mean()) < 0.03 * float(exact.std())


@pytest.mark.slow
@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "eviction",
    [StreamingLLM(sinks=2), HeavyHitter(sinks=2, eviction_interval=4, residual_length=9, distance=0)],
    ids=str,
)
def test_models_in_half_precision_pack_too(tiny: Maker, dtype: torch.dtype, eviction: Eviction) -> None:
    loaded = tiny(head_dim=32)
    loaded = LoadedModel.of(loaded.model.to(dtype), tokenizer=None, id="tiny")
    cache, logits = prefill(loaded, quantized_plan(loaded, eviction), random_ids(2, 50))
    outputs = steps(loaded, cache, random_ids(2, 60, seed=1))
    assert outputs.dtype == logits.dtype == dtype
    assert bool(outputs.isfinite().all())
    cache.check_integrity(110)
    assert cache.nbytes == 2 * cache.reserved_bytes


@torch.inference_mode()
def test_a_copied_cache_and_reordered_rows_keep_their_means(tiny: Maker) -> None:
    loaded = tiny()
    plan = quantized_plan(loaded, HeavyHitter(sinks=2, eviction_interval=4, distance=0))
    cache, _ = prefill(loaded, plan, random_ids(2, 60))
    swapped = copy.deepcopy(cache)
    swapped.reorder_cache(torch.tensor([1, 0]))
    token = random_ids(2, 8, seed=3)
    torch.testing.assert_close(
        steps(loaded, swapped, token.flip(0)), steps(loaded, cache, token).flip(0), atol=1e-4, rtol=1e-4
    )


@torch.inference_mode()
def test_heads_that_cannot_be_quantized_are_rejected_before_anything_runs(tiny: Maker) -> None:
    loaded = tiny(head_dim=4)
    cache = BudgetedCache(make_plan(loaded, [[20, 20]] * 2, StreamingLLM(), bits=3))
    with pytest.raises(UserError, match="heads of dimension 4 do not fill whole bytes in 3 bits"):
        loaded.model(random_ids(1, 10), past_key_values=cache)
