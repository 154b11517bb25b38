import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plan_factory import make_plan, random_ids
from reference_cache import ReferenceHead
from torch import Tensor
from transformers import DynamicCache, Qwen2Config, Qwen2ForCausalLM

from baklava.cache.attention import AttentionParams
from baklava.cache.budgeted_cache import BudgetedCache
from baklava.cache.budgeted_layer import BudgetedLayer
from baklava.cache.rotary_shift import RotaryShift
from baklava.cache.storage import Slab, TensorSpec
from baklava.errors import UserError
from baklava.eviction import (
    TOVA,
    AttentionMatching,
    Eviction,
    ExpectedAttention,
    HeavyHitter,
    KeyDiff,
    KeyNorm,
    SnapKV,
    StreamingLLM,
)
from baklava.plan.budget_plan import LayerBudget, full_cache_plan
from baklava.runtime.model_loader import LoadedModel

Maker = Callable[..., LoadedModel]

EVICTIONS = [
    StreamingLLM(sinks=2),
    StreamingLLM(sinks=0),
    HeavyHitter(sinks=2, eviction_interval=4, stride=1, distance=0),
    HeavyHitter(sinks=2, eviction_interval=1, recent_ratio=0.25, stride=3, distance=0),
    HeavyHitter(sinks=0, eviction_interval=6, reduction="max", power=2, distance=1),
    HeavyHitter(sinks=0, eviction_interval=4, pooling=5, distance=0),
    AttentionMatching(sinks=1, eviction_interval=3, references=7, distance=2),
    TOVA(sinks=1, eviction_interval=3),
    SnapKV(sinks=2, eviction_interval=4, window=3),
    KeyNorm(sinks=2, eviction_interval=5),
    KeyDiff(sinks=0, eviction_interval=4),
    ExpectedAttention(sinks=2, eviction_interval=4, window=6),
]


@pytest.mark.slow
@torch.inference_mode()
@pytest.mark.parametrize("eviction", EVICTIONS, ids=str)
@given(capacities=st.tuples(st.integers(9, 30), st.integers(9, 30)), prompt=st.integers(1, 40), seed=st.integers(0, 3))
@settings(max_examples=10, deadline=None)
def test_a_layer_equals_dense_attention_with_explicit_positions(
    eviction: Eviction, capacities: tuple[int, int], prompt: int, seed: int
) -> None:
    heads, group, dim, steps = 2, 2, 4, 40
    kernel = AttentionParams(0.5, rotary_shift=RotaryShift(torch.empty(0)))
    draw = torch.Generator().manual_seed(seed)
    query = torch.randn(1, heads * group, prompt + steps, dim, generator=draw)
    key, value = (torch.randn(1, heads, prompt + steps, dim, generator=draw) for _ in range(2))
    layer = BudgetedLayer(LayerBudget(tokens=capacities, key_bits=(32, 32), value_bits=(32, 32)), eviction)
    reference = [ReferenceHead(c, eviction, key[0, h], value[0, h]) for h, c in enumerate(capacities)]
    for start, stop in [(0, prompt), *((t, t + 1) for t in range(prompt, prompt + steps))]:
        part = slice(start, stop)
        layer.update(key[:, :, part], value[:, :, part])
        output = layer.attend(query[:, :, part], key[:, :, part], value[:, :, part], None, kernel)
        for index, head in enumerate(reference):
            rows = slice(index * group, (index + 1) * group)
            expected = (head.step if start else head.prompt)(query[0, rows, part], 0.5)
            torch.testing.assert_close(output[0, rows], expected, atol=1e-5, rtol=1e-5)
            assert layer.cached_positions(index, 0).tolist() == sorted(head.cached)


@torch.inference_mode()
def test_a_budget_that_covers_the_text_gives_the_tokens_of_transformers_own_cache(tiny: Maker) -> None:
    loaded, ids = tiny(), random_ids(1, 60)
    for plan in (
        full_cache_plan(loaded.identity, loaded.geometry, 120, bits=32),
        make_plan(loaded, [[130, 140], [128, 200]], HeavyHitter(eviction_interval=8, distance=0)),
    ):
        ours = loaded.model.generate(ids, past_key_values=BudgetedCache(plan), max_new_tokens=50, do_sample=False)
        theirs = loaded.model.generate(ids, past_key_values=DynamicCache(), max_new_tokens=50, do_sample=False)
        assert torch.equal(ours, theirs)


@pytest.mark.slow
@torch.inference_mode()
@pytest.mark.parametrize("eviction", EVICTIONS, ids=str)
def test_storage_is_the_plan_after_long_decoding_and_never_more(tiny: Maker, eviction: Eviction) -> None:
    loaded = tiny()
    plan = make_plan(loaded, [[12, 40], [25, 25]], eviction, bits=16)
    cache = BudgetedCache(plan)
    loaded.model(random_ids(1, 90), past_key_values=cache)
    for token in random_ids(120, 1):
        assert cache.nbytes <= cache.reserved_bytes
        loaded.model(token[None], past_key_values=cache)
    cache.check_integrity(210)
    assert cache.nbytes == cache.reserved_bytes
    assert cache.get_seq_length() == 210
    for layer, row in enumerate(plan.tokens):
        for head, tokens in enumerate(row):
            held = cache.cached_positions(layer, head)
            assert tokens - eviction.eviction_interval <= len(held) <= tokens
            assert held[: eviction.sinks].tolist() == list(range(eviction.sinks))
            assert held[-1] == 209


@torch.inference_mode()
def test_bytes_are_freed_layer_by_layer_during_the_prompt(tiny: Maker) -> None:
    loaded = tiny(layers=3)
    cache = BudgetedCache(make_plan(loaded, [[16, 16]] * 3, StreamingLLM(), bits=32))
    held: list[int] = []

    def watch(*_: object) -> None:
        held.append(cache.nbytes)

    hooks = [layer.self_attn.register_forward_hook(watch) for layer in loaded.model.model.layers]
    loaded.model(random_ids(1, 500), past_key_values=cache)
    for hook in hooks:
        hook.remove()
    layer_bytes = 2 * 16 * 8 * 4 * 2
    assert held == [layer_bytes, 2 * layer_bytes, 3 * layer_bytes]


@pytest.mark.slow
@torch.inference_mode()
# Equal tokens have keys of equal norm in the first layer, and nobody says which of them stays.
@pytest.mark.parametrize("eviction", [one for one in EVICTIONS if not isinstance(one, KeyNorm)], ids=str)
def test_a_left_padded_batch_equals_its_rows_alone(tiny: Maker, eviction: Eviction) -> None:
    loaded, ids = tiny(), random_ids(3, 40, seed=1)
    plan = make_plan(loaded, [[12, 20], [15, 15]], eviction)
    mask = torch.ones_like(ids)
    mask[0, :7], mask[2, :25] = 0, 0
    options = {"max_new_tokens": 60, "do_sample": False}
    batch = loaded.model.generate(ids, attention_mask=mask, past_key_values=BudgetedCache(plan), **options)
    for row in range(3):
        real = ids[row : row + 1, mask[row].bool()]
        alone = loaded.model.generate(real, past_key_values=BudgetedCache(plan), **options)
        assert torch.equal(batch[row, 40:], alone[0, real.shape[1] :])


@torch.inference_mode()
def test_a_second_turn_attends_to_cached_entries_and_itself(tiny: Maker) -> None:
    loaded, ids = tiny(), random_ids(1, 90)
    cache = BudgetedCache(full_cache_plan(loaded.identity, loaded.geometry, 90, bits=32))
    turns = [loaded.model(ids[:, part], past_key_values=cache).logits for part in (slice(50), slice(50, 90))]
    torch.testing.assert_close(torch.cat(turns, 1), loaded.model(ids).logits, atol=1e-4, rtol=1e-4)


@torch.inference_mode()
def test_a_copied_cache_goes_its_own_way(tiny: Maker) -> None:
    loaded = tiny()
    cache = BudgetedCache(make_plan(loaded, [[20, 30], [15, 15]], HeavyHitter(eviction_interval=4, distance=0)))
    loaded.model(random_ids(1, 50), past_key_values=cache)
    before, snapshot = cache.cached_positions(0, 0), copy.deepcopy(cache)
    loaded.model(random_ids(1, 10, seed=5), past_key_values=snapshot)
    assert torch.equal(cache.cached_positions(0, 0), before)
    assert snapshot.get_seq_length() == 60


@torch.inference_mode()
def test_beams_are_reordered_with_their_entries(tiny: Maker) -> None:
    loaded, ids = tiny(), random_ids(2, 30)
    plan = make_plan(loaded, [[130, 130], [130, 140]], HeavyHitter(eviction_interval=4, distance=0))
    options = {"num_beams": 3, "max_new_tokens": 20, "do_sample": False}
    ours = loaded.model.generate(ids, past_key_values=BudgetedCache(plan), **options)
    assert torch.equal(ours, loaded.model.generate(ids, past_key_values=DynamicCache(), **options))


@torch.inference_mode()
def test_a_model_that_does_not_attend_through_baklava_is_refused(tiny: Maker) -> None:
    loaded = tiny()
    cache = BudgetedCache(full_cache_plan(loaded.identity, loaded.geometry, 50))
    loaded.model.set_attn_implementation("sdpa")
    try:
        with pytest.raises(UserError, match="never reached baklava's attention"):
            loaded.model(random_ids(1, 10), past_key_values=cache)
    finally:
        loaded.model.set_attn_implementation("baklava")


@torch.inference_mode()
def test_what_a_budgeted_cache_cannot_do_is_refused_in_a_sentence(tiny: Maker) -> None:
    loaded, other = tiny(), tiny(kv_heads=1)
    plan = full_cache_plan(loaded.identity, loaded.geometry, 50)
    with pytest.raises(UserError, match="use the plan with the model it was made for"):
        other.model(random_ids(1, 10), past_key_values=BudgetedCache(plan))
    right_padded = torch.tensor([[1, 1, 0]])
    with pytest.raises(UserError, match="padding on the left only"):
        loaded.model(random_ids(1, 3), attention_mask=right_padded, past_key_values=BudgetedCache(plan))
    cache = BudgetedCache(plan)
    loaded.model(random_ids(1, 10), past_key_values=cache)
    with pytest.raises(UserError, match="cannot come back"):
        cache.layers[0].crop(-3)


class Rounded(DynamicCache):
    """A full cache that rounds what it holds to 16 bits; a prompt is attended to before it is held."""

    def update(self, key: Tensor, value: Tensor, index: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if key.shape[2] == 1:
            return super().update(key.half().float(), value.half().float(), index, *args, **kwargs)
        attended, layer = super().update(key, value, index, *args, **kwargs), self.layers[index]
        layer.keys, layer.values = layer.keys.half().float(), layer.values.half().float()
        return attended


@torch.inference_mode()
@pytest.mark.parametrize(("bits", "full_cache"), [(16, Rounded), (32, DynamicCache)])
def test_sliding_layers_allocate_their_window_and_not_the_prompt(bits: Any, full_cache: type[DynamicCache]) -> None:
    shape = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
    sliding = {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 2, "eos_token_id": None}
    torch.manual_seed(0)
    loaded = LoadedModel.of(Qwen2ForCausalLM(Qwen2Config(**shape, **heads, **sliding, initializer_range=0.25)).eval())
    assert loaded.geometry.windows == (None, None, 16, 16)
    ids, cache = random_ids(1, 100), BudgetedCache(full_cache_plan(loaded.identity, loaded.geometry, 130, bits))
    ours = loaded.model(ids, past_key_values=cache).logits
    assert cache.nbytes <= cache.reserved_bytes
    theirs, full = loaded.model(ids).logits, full_cache(config=loaded.model.config)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    loaded.model(ids, past_key_values=full)
    # In two kernels' order of sums a few entries in a thousand round to the other half next to them.
    most = 2e-3 if bits == 16 else 1e-4
    for token in random_ids(25, 1):
        ours = loaded.model(token[None], past_key_values=cache).logits
        theirs = loaded.model(token[None], past_key_values=full).logits
        torch.testing.assert_close(ours, theirs, atol=most, rtol=1e-4)
        cache.check_integrity(full.get_seq_length())


@torch.inference_mode()
def test_an_overrun_is_caught(tiny: Maker) -> None:
    loaded = tiny()
    cache = BudgetedCache(make_plan(loaded, [[12, 12], [12, 12]], StreamingLLM()))
    loaded.model(random_ids(1, 50), past_key_values=cache)
    cache.check_integrity(50)
    layer = cache.layers[0]
    layer.slab = Slab([TensorSpec((layer.slab.nbytes + 1,), torch.uint8)], 1, torch.device("cpu"))
    with pytest.raises(RuntimeError, match="but reserved"):
        cache.check_integrity(50)


@torch.inference_mode()
def test_unsupported_masks_are_rejected(tiny: Maker) -> None:
    loaded, ids = tiny(), random_ids(2, 6)
    plan = full_cache_plan(loaded.identity, loaded.geometry, 50)
    packed = torch.block_diag(torch.ones(3, 3), torch.ones(3, 3)).tril().bool()[None, None].expand(2, 1, 6, 6)
    with pytest.raises(UserError, match="4D attention mask"):
        loaded.model(ids, attention_mask=packed, past_key_values=BudgetedCache(plan))
    cache, mask = BudgetedCache(plan), torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    loaded.model(ids, attention_mask=mask, past_key_values=cache)
    with pytest.raises(UserError, match="a mask over all turns"):
        loaded.model(ids, attention_mask=mask, past_key_values=cache)
