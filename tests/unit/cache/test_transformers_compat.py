from collections.abc import Callable
from typing import Any

import pytest
import torch
from model_families import FAMILIES, SHAPE, full_cache, model_pair, tiny_model
from plan_factory import make_plan, random_ids
from torch import Tensor
from torch.testing import assert_close
from transformers import LlamaConfig, MistralConfig
from transformers.cache_utils import (
    DYNAMIC_LAYER_TYPE_MAPPING,
    STATIC_LAYER_TYPE_MAPPING,
    DynamicLayer,
    DynamicSlidingWindowLayer,
)

from baklava.cache.attention import AttentionParams
from baklava.cache.budgeted_cache import BudgetedCache
from baklava.cache.budgeted_layer import BudgetedLayer, Padding
from baklava.data.documents import load_documents
from baklava.data.windows import cut_windows
from baklava.errors import UserError
from baklava.evaluation.window_scoring import prefill_window, score_plan
from baklava.eviction import Eviction, HeavyHitter, StreamingLLM
from baklava.plan.budget_plan import BudgetPlan, LayerBudget, full_cache_plan
from baklava.plan.geometry import CacheGeometry
from baklava.runtime.model_loader import LoadedModel

Maker = Callable[..., LoadedModel]

EVICTIONS = [
    StreamingLLM(sinks=2),
    HeavyHitter(sinks=2, eviction_interval=4, distance=0),
    HeavyHitter(sinks=2, eviction_interval=3, reduction="max", distance=0),
]
eviction_table = pytest.mark.parametrize("eviction", EVICTIONS, ids=str)


def tight(loaded: LoadedModel, eviction: Eviction) -> BudgetPlan:
    return make_plan(loaded, [[12, 20], [16, 16]], eviction)


def cached_positions(cache: BudgetedCache, row: int = 0) -> list[list[int]]:
    return [cache.cached_positions(layer, head, row).tolist() for layer in range(2) for head in range(2)]


def fed(loaded: LoadedModel, plan: BudgetPlan, prompt: Tensor, rest: Tensor) -> tuple[Tensor, BudgetedCache]:
    """Logits of a prompt's last token and of the tokens after it, one by one, in a fresh cache."""
    cache = BudgetedCache(plan)
    logits = [loaded.model(prompt, past_key_values=cache).logits[:, -1:]]
    logits += [loaded.model(token[:, None], past_key_values=cache).logits for token in rest.unbind(1)]
    return torch.cat(logits, 1), cache


@torch.inference_mode()
@eviction_table
def test_a_second_turn_feeds_only_what_is_new_to_a_cache_that_has_evicted(tiny: Maker, eviction: Eviction) -> None:
    loaded, lengths = tiny(), list[int]()
    cache, options = BudgetedCache(tight(loaded, eviction)), {"max_new_tokens": 10, "do_sample": False}
    hook = loaded.model.get_input_embeddings().register_forward_pre_hook(lambda _, ids: lengths.append(ids[0].shape[1]))
    first = loaded.model.generate(random_ids(1, 40), past_key_values=cache, **options)
    text = torch.cat([first, random_ids(1, 12, seed=9)], 1)
    second = loaded.model.generate(text, past_key_values=cache, **options)
    hook.remove()
    # A turn starts with the last token of the one before, which was made and never fed.
    assert lengths == [40, *[1] * 9, 13, *[1] * 9]
    assert cache.get_seq_length() == 71 == second.shape[1] - 1
    assert max(map(len, cached_positions(cache))) <= 20


@pytest.mark.slow
@torch.inference_mode()
@eviction_table
def test_a_padded_row_has_the_positions_and_logits_that_it_has_alone(tiny: Maker, eviction: Eviction) -> None:
    loaded, ids, pads = tiny(), random_ids(3, 90, seed=1), [7, 0, 25]
    mask = torch.arange(90)[None] >= torch.tensor(pads)[:, None]
    cache = BudgetedCache(tight(loaded, eviction))
    logits = [loaded.model(ids[:, :40], attention_mask=mask[:, :40], past_key_values=cache).logits[:, -1:]]
    after_the_prompt = [cached_positions(cache, row) for row in range(3)]
    for t in range(40, 90):
        logits.append(loaded.model(ids[:, t : t + 1], attention_mask=mask[:, : t + 1], past_key_values=cache).logits)
    for row, pad in enumerate(pads):
        prompt, rest = ids[row : row + 1, pad:40], ids[row : row + 1, 40:]
        assert after_the_prompt[row] == cached_positions(fed(loaded, cache.plan, prompt, rest[:, :0])[1])
        alone, single = fed(loaded, cache.plan, prompt, rest)
        assert_close(torch.cat(logits, 1)[row : row + 1], alone, atol=1e-4, rtol=1e-4)
        assert cached_positions(cache, row) == cached_positions(single)
        assert all(positions[:2] == [0, 1] for positions in cached_positions(cache, row))


@pytest.mark.slow
@torch.inference_mode()
@eviction_table
def test_a_budget_is_unseen_by_the_forward_of_a_prompt_and_seen_by_a_stream(tiny: Maker, eviction: Eviction) -> None:
    loaded, ids = tiny(), random_ids(1, 60)
    full, cache = loaded.model(ids, use_cache=False).logits, BudgetedCache(tight(loaded, eviction))
    assert_close(loaded.model(ids, past_key_values=cache).logits, full, atol=1e-4, rtol=1e-4)
    streamed, _ = fed(loaded, cache.plan, ids[:, :1], ids[:, 1:])
    off = (streamed - full).abs().amax((0, 2))
    until = 12 - (eviction.eviction_interval if eviction.scored else 0)
    assert off[:until].max() < 1e-4
    assert off[-20:].min() > 0.1


@torch.inference_mode()
def test_full_layers_are_not_taken_for_sliding_ones() -> None:
    loaded, _ = model_pair("gemma2")
    cache = full_cache(loaded)
    assert loaded.geometry.windows == (16, None, 16, None)
    assert cache.is_sliding == [True, False, True, False]
    assert [isinstance(layer, BudgetedLayer) for layer in cache.layers] == [False, True, False, True]


def test_a_model_whose_layers_all_slide_is_refused() -> None:
    with pytest.raises(UserError, match="nothing to budget"):
        CacheGeometry.from_config(MistralConfig(**SHAPE, sliding_window=16))


@torch.inference_mode()
def test_a_checkpoint_that_asks_for_a_cache_of_its_own_generates_in_ours(tiny: Maker) -> None:
    model = tiny().model
    model.generation_config.cache_implementation = "static"
    loaded = LoadedModel.of(model)
    cache = BudgetedCache(tight(loaded, StreamingLLM(sinks=2)))
    model.generate(random_ids(1, 30), past_key_values=cache, max_new_tokens=5, do_sample=False)
    assert cache.get_seq_length() == 34


RESHUFFLES: dict[str, tuple[Callable[[BudgetedCache], Any], list[int]]] = {
    "beams": (lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])), [2, 0, 0]),
    "fewer rows": (lambda cache: cache.batch_select_indices(torch.tensor([2, 1])), [2, 1]),
    "copies": (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
}


@pytest.mark.slow
@torch.inference_mode()
@eviction_table
@pytest.mark.parametrize("reshuffle", RESHUFFLES)
def test_rows_that_change_places_take_entries_positions_and_scores_along(
    tiny: Maker, eviction: Eviction, reshuffle: str
) -> None:
    loaded, ids, pads = tiny(), random_ids(3, 42, seed=2), [5, 0, 21]
    change, rows = RESHUFFLES[reshuffle]
    mask = torch.arange(42)[None] >= torch.tensor(pads)[:, None]
    cache = BudgetedCache(tight(loaded, eviction))
    for part in (slice(40), slice(40, 41), slice(41, 42)):
        loaded.model(ids[:, part], attention_mask=mask[:, : part.stop], past_key_values=cache)
    change(cache)
    moved, mask, ours = [cached_positions(cache, place) for place in range(len(rows))], mask[rows], []
    rest = random_ids(len(rows), 20, seed=4)
    for token in rest.split(1, 1):
        mask = torch.cat([mask, mask[:, -1:]], 1)
        ours.append(loaded.model(token, attention_mask=mask, past_key_values=cache).logits)
    for place, row in enumerate(rows):
        prompt, text = ids[row : row + 1, pads[row] : 40], torch.cat([ids[row, 40:], rest[place]])[None]
        assert moved[place] == cached_positions(fed(loaded, cache.plan, prompt, text[:, :2])[1])
        alone, single = fed(loaded, cache.plan, prompt, text)
        assert_close(torch.cat(ours, 1)[place], alone[0, 3:], atol=1e-4, rtol=1e-4)
        assert cached_positions(cache, place) == cached_positions(single)
    cache.check_integrity(mask.shape[1])


@pytest.mark.slow
@torch.inference_mode()
@eviction_table
def test_beams_under_a_budget_score_as_their_own_text_does_in_a_fresh_cache(tiny: Maker, eviction: Eviction) -> None:
    loaded, prompt = tiny(), random_ids(1, 30)
    plan = tight(loaded, eviction)
    options = {"num_beams": 4, "num_return_sequences": 4, "max_new_tokens": 25, "do_sample": False}
    beams = loaded.model.generate(
        prompt, past_key_values=BudgetedCache(plan), return_dict_in_generate=True, output_scores=True, **options
    )
    assert len({tuple(beam.tolist()) for beam in beams.sequences}) == 4
    for beam, mean in zip(beams.sequences, beams.sequences_scores, strict=True):
        logits, _ = fed(loaded, plan, prompt, beam[None, 30:-1])
        log_probs = logits[0].log_softmax(-1).gather(1, beam[30:, None])
        assert_close(log_probs.mean(), mean, atol=1e-4, rtol=1e-4)


@torch.inference_mode()
def test_decoding_that_takes_tokens_back_is_refused_in_a_sentence(tiny: Maker) -> None:
    loaded = tiny()
    options = {"prompt_lookup_num_tokens": 3, "max_new_tokens": 20, "do_sample": False}
    with pytest.raises(UserError, match="decode without assisted or prompt-lookup generation"):
        loaded.model.generate(random_ids(1, 20).repeat(1, 2), past_key_values=full_cache(loaded), **options)


def test_a_cache_is_neither_croppable_nor_compileable_nor_initialized_early(tiny: Maker) -> None:
    cache = full_cache(tiny())
    cache.early_initialization(1, 2, 8, torch.float32, torch.device("cpu"))
    assert (cache.is_croppable, cache.is_compileable, cache.is_initialized) == (False, False, False)
    assert cache.get_max_length() == -1


@torch.inference_mode()
def test_a_reset_cache_is_as_good_as_new(tiny: Maker) -> None:
    loaded, ids = tiny(), random_ids(2, 40)
    cache, mask = BudgetedCache(tight(loaded, HeavyHitter(sinks=2, eviction_interval=4, distance=0))), torch.ones(2, 40)
    mask[0, :9] = 0
    loaded.model(ids, attention_mask=mask, past_key_values=cache)
    cache.reset()
    assert (cache.get_seq_length(), cache.nbytes) == (0, 0)
    mask[0, :9], mask[1, :5] = 1, 0  # another mask in the same place
    loaded.model(ids, attention_mask=mask, past_key_values=cache)
    assert [int(cache.cached_positions(1, 0, row)[-1]) for row in (0, 1)] == [39, 34]
    cache.reset()
    again = loaded.model(ids[:1], past_key_values=cache).logits
    assert_close(again, loaded.model(ids[:1], use_cache=False).logits, atol=1e-4, rtol=1e-4)


def test_a_new_mask_in_a_reused_buffer_is_counted_again() -> None:
    padding, buffer = Padding(), torch.ones(2, 1, 1, 10, dtype=torch.bool)
    first = buffer[:]
    assert padding.count(first, None, 0, 10).tolist() == [0, 0]
    del first
    buffer[1, ..., :4] = False
    assert padding.count(buffer[:], None, 0, 10).tolist() == [0, 4]


def test_the_caches_of_other_models_stay_transformers_own(tiny: Maker) -> None:
    full_cache(tiny())
    assert DYNAMIC_LAYER_TYPE_MAPPING["full_attention"] is DynamicLayer
    assert DYNAMIC_LAYER_TYPE_MAPPING["sliding_attention"] is DynamicSlidingWindowLayer
    layers = [*DYNAMIC_LAYER_TYPE_MAPPING.values(), *STATIC_LAYER_TYPE_MAPPING.values()]
    assert [layer for layer in layers if layer.__module__.startswith("baklava")] == []


@torch.inference_mode()
def test_no_attention_weights_are_given_to_whoever_asks_for_them(tiny: Maker) -> None:
    loaded = tiny()
    for options in ({"past_key_values": full_cache(loaded)}, {"use_cache": False}):
        output = loaded.model(random_ids(1, 10), output_attentions=True, **options)
        assert not output.attentions


@torch.inference_mode()
@pytest.mark.parametrize("reduction", ["mean", "max"])
def test_every_query_head_of_a_group_counts_for_its_kv_head(reduction: Any) -> None:
    eviction = HeavyHitter(sinks=0, recent_ratio=0, eviction_interval=1, reduction=reduction, distance=0)
    layer = BudgetedLayer(LayerBudget(tokens=(3,), key_bits=(32,), value_bits=(32,)), eviction)
    key = torch.eye(8)[None, None]
    # One head looks for token 3 only, the other for token 5.
    query = 50 * torch.stack([torch.eye(8)[token].expand(8, 8) for token in (3, 5)])[None]
    layer.update(key, key)
    layer.attend(query, key, key, None, AttentionParams(1.0))
    assert layer.cached_positions(0, 0).tolist() == [3, 5]


@pytest.mark.slow
@torch.inference_mode()
@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3", "gpt_oss"])
@pytest.mark.parametrize("scored", [False, True])
def test_padding_that_sees_nothing_spreads_no_nan(family: str, scored: bool) -> None:
    loaded, _ = model_pair(family)
    full = full_cache_plan(loaded.identity, loaded.geometry, 30, bits=32)
    plan = full.model_copy(update={"eviction": HeavyHitter(eviction_interval=8, distance=0).config}) if scored else full
    cache, mask = BudgetedCache(plan), torch.ones(3, 80, dtype=torch.long)
    # The second row is nothing but padding at first.
    mask[0, :25], mask[1, :40] = 0, 0
    for part in (slice(0, 40), slice(40, 47), *(slice(t, t + 1) for t in range(47, 80))):
        ids = random_ids(3, part.stop - part.start, seed=part.start)
        logits = loaded.model(ids, attention_mask=mask[:, : part.stop], past_key_values=cache).logits
        assert logits.isfinite().all()
    cache.check_integrity(80)


@torch.inference_mode()
def test_offloading_is_refused_in_a_sentence(tiny: Maker) -> None:
    loaded = tiny()
    cache = full_cache(loaded)
    loaded.model(random_ids(1, 10), past_key_values=cache)
    for ask in (lambda: cache.offload(0), cache.layers[0].prefetch):
        with pytest.raises(UserError, match="build it without offloading"):
            ask()


def test_what_other_versions_pass_to_update_is_taken() -> None:
    loaded, _ = model_pair("gemma2")
    cache, entries = full_cache(loaded), torch.zeros(1, 2, 5, 8)
    cache.update(entries, entries, 0, {"cache_position": torch.arange(5)}, sliding_window=16)
    key, _ = cache.update(entries, entries, 1, {"cache_position": torch.arange(5)}, sin=None)
    assert key.budgeted_layer is cache.layers[1]


def test_layers_of_one_kind_with_different_shapes_are_refused_in_a_sentence() -> None:
    uneven = LlamaConfig(**SHAPE, per_layer_config={1: {"num_key_value_heads": 1}})
    with pytest.raises(UserError, match="share one"):
        CacheGeometry.from_config(uneven)


@pytest.mark.demo
def test_a_real_model_needs_its_first_tokens(demo: LoadedModel) -> None:
    window = cut_windows(load_documents(["ifcraft"]), demo.tokenizer, context=512, continuation=128)[0]
    prefilled = prefill_window(demo, window, [])
    grid = [[64] * demo.geometry.kv_heads] * demo.geometry.layers
    with_sinks, without = (
        score_plan(demo, prefilled, make_plan(demo, grid, StreamingLLM(sinks=sinks), bits=16)).dnll for sinks in (4, 0)
    )
    # Measured: 0.45 and 1.35 nats per token.
    assert with_sinks < 0.7
    assert without > with_sinks + 0.5


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_checkpoint_that_turns_its_cache_off_generates_in_ours(family: str) -> None:
    config, fields = FAMILIES[family]
    loaded = LoadedModel.of(tiny_model(config(**(SHAPE | fields | {"use_cache": False}))))
    cache, prompt = full_cache(loaded), random_ids(1, 20)
    output = loaded.model.generate(prompt, past_key_values=cache, max_new_tokens=9, do_sample=False)
    cache.check_integrity(28)
    choices = loaded.model(output, use_cache=False).logits[0, 19:-1].argmax(-1)
    assert output[0, 20:].tolist() == choices.tolist()


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("padded", [False, True])
def test_a_call_without_use_cache_does_not_feed_its_text_to_ours_again(family: str, padded: bool) -> None:
    loaded, _ = model_pair(family)
    options: dict[str, Any] = {"max_new_tokens": 9, "use_cache": False}
    if padded:
        options["attention_mask"] = torch.tensor([[0] * 5 + [1] * 15])
    with pytest.raises(UserError, match="use_cache"):
        loaded.model.generate(random_ids(1, 20), past_key_values=full_cache(loaded), **options)
