from itertools import pairwise
from typing import Any

import pytest
import torch
from model_families import FAMILIES, SHAPE, TOKENS, full_cache, model_pair, tiny_model
from plan_factory import random_ids
from torch import Tensor
from torch.testing import assert_close
from transformers import (
    AfmoeConfig,
    BloomConfig,
    Cache,
    CwmConfig,
    DeepseekV2Config,
    DeepseekV3Config,
    DiffLlamaConfig,
    DogeConfig,
    DynamicCache,
    FalconConfig,
    JambaConfig,
    Mamba2Config,
    MiMoV2FlashConfig,
    MiniMaxConfig,
    MptConfig,
    Olmo3Config,
    OpenAIGPTConfig,
    RecurrentGemmaConfig,
    XGLMConfig,
)

from baklava.cache import attention
from baklava.cache.budgeted_cache import BudgetedCache
from baklava.cache.budgeted_layer import BudgetedLayer
from baklava.cache.sliding_layer import SlidingLayer
from baklava.errors import UserError
from baklava.plan import geometry
from baklava.plan.budget_plan import full_cache_plan
from baklava.plan.geometry import CacheGeometry, ModelIdentity
from baklava.runtime.model_loader import LoadedModel

LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 8,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "first_k_dense_replace": 4,
}

family_table = pytest.mark.parametrize("family", FAMILIES)


def dynamic(model: Any) -> DynamicCache:
    return DynamicCache(config=model.config)


def padded(rows: int, tokens: int, *pads: int) -> tuple[Tensor, Tensor]:
    mask = torch.ones(rows, tokens, dtype=torch.long)
    for row, pad in enumerate(pads):
        mask[row, :pad] = 0
    return random_ids(rows, tokens, seed=3), mask


@torch.inference_mode()
def stream(model: Any, cache: Cache, ids: Tensor, mask: Tensor, *cuts: int) -> Tensor:
    """Logits of the real tokens of a text that is fed in parts."""
    logits = [
        model(
            ids[:, start:stop],
            attention_mask=mask[:, :stop],
            position_ids=torch.arange(start, stop)[None],  # Bamba would count them from 0
            past_key_values=cache,
        ).logits
        for start, stop in pairwise((0, *cuts, ids.shape[1]))
    ]
    return torch.cat(logits, 1)[mask.bool()]


@torch.inference_mode()
@family_table
@pytest.mark.parametrize("cached", [False, True], ids=["without a cache", "budgeted"])
def test_every_family_attends_as_transformers_eager_attention_does(family: str, cached: bool) -> None:
    loaded, eager = model_pair(family)
    ids, mask = padded(2, 60, 9)
    for given in (None, mask):
        options: dict[str, Any] = {"past_key_values": full_cache(loaded)} if cached else {"use_cache": False}
        real = mask.bool() if given is not None else torch.ones_like(mask).bool()
        ours = loaded.model(ids, attention_mask=given, **options).logits[real]
        assert_close(ours, eager(ids, attention_mask=given, use_cache=False).logits[real], atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@family_table
def test_a_left_padded_batch_decodes_to_the_same_logits(family: str) -> None:
    loaded, eager = model_pair(family)
    ids, mask = padded(3, 60, 7, 0, 25)
    steps = range(40, 60)
    ours, theirs = full_cache(loaded), dynamic(eager)
    assert_close(
        stream(loaded.model, ours, ids, mask, *steps), stream(eager, theirs, ids, mask, *steps), atol=1e-4, rtol=1e-4
    )
    assert ours.get_seq_length() == 60
    assert ours.nbytes <= 3 * ours.reserved_bytes


@family_table
def test_a_text_in_chunks_of_seven_gives_the_same_logits(family: str) -> None:
    loaded, eager = model_pair(family)
    ids, mask = padded(2, 60, 5)
    chunks = range(7, 60, 7)
    whole = stream(eager, dynamic(eager), ids, mask)
    assert_close(stream(loaded.model, full_cache(loaded), ids, mask, *chunks), whole, atol=3e-4, rtol=1e-4)


GENERATIONS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "3 beams": {"do_sample": False, "num_beams": 3},
    "3 beams returned": {"do_sample": False, "num_beams": 3, "num_return_sequences": 2},
    "prompt in chunks of 7": {"do_sample": False, "prefill_chunk_size": 7},
    "sampled": {"do_sample": True, "temperature": 0.8, "top_p": 0.95, "num_return_sequences": 2},
}


@pytest.mark.slow
@torch.inference_mode()
@family_table
@pytest.mark.parametrize("generation", GENERATIONS)
def test_generate_gives_the_tokens_of_transformers_own_cache(family: str, generation: str) -> None:
    loaded, eager = model_pair(family)
    ids, mask = padded(2, 40, 6)
    made = []
    for model, cache in ((loaded.model, full_cache(loaded)), (eager, dynamic(eager))):
        torch.manual_seed(5)
        made.append(
            model.generate(
                ids, attention_mask=mask, past_key_values=cache, max_new_tokens=24, **GENERATIONS[generation]
            )
        )
    assert made[0].shape[1] == 64
    assert torch.equal(*made)


@pytest.mark.slow
@torch.inference_mode()
@family_table
def test_two_turns_on_one_cache_give_the_tokens_of_transformers_own_cache(family: str) -> None:
    loaded, eager = model_pair(family)
    ids, mask = padded(2, 30, 6)
    ours, theirs = full_cache(loaded), dynamic(eager)
    for turn in (0, 1):
        made = [
            model.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=15, do_sample=False)
            for model, cache in ((loaded.model, ours), (eager, theirs))
        ]
        assert torch.equal(*made)
        # The last token was made, and never fed.
        assert ours.get_seq_length() == made[0].shape[1] - 1
        ids = torch.cat([made[0], random_ids(2, 10, seed=turn)], 1)
        mask = torch.cat([mask, torch.ones(2, ids.shape[1] - mask.shape[1], dtype=torch.long)], 1)


def stored_dtypes(cache: BudgetedCache) -> set[torch.dtype]:
    held: list[Tensor] = []
    for layer in cache.layers:
        if isinstance(layer, BudgetedLayer):
            held += [
                part for group in layer.groups for storage in (group.keys, group.values) for part in storage.encoded
            ]
        elif isinstance(layer, SlidingLayer):
            held += [layer.keys, layer.values]
    return {tensor.dtype for tensor in held}


@pytest.mark.slow
@family_table
@pytest.mark.parametrize(
    ("dtype", "stored"),
    [
        (torch.float32, torch.float16),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16),
    ],
    ids=str,
)
def test_16_bits_are_as_near_to_the_model_as_its_own_dtype_is(
    family: str, dtype: torch.dtype, stored: torch.dtype
) -> None:
    (loaded, eager), (_, exact) = model_pair(family, dtype), model_pair(family)
    ids, mask = padded(2, 60, 9)
    steps = range(40, 60)
    cache = full_cache(loaded, bits=16)
    ours = stream(loaded.model, cache, ids, mask, *steps)
    theirs, reference = (stream(model, dynamic(model), ids, mask, *steps) for model in (eager, exact))
    assert ours.dtype == theirs.dtype
    assert stored_dtypes(cache) == {stored}
    ours_off, theirs_off = ((logits.float() - reference).abs().mean() for logits in (ours, theirs))
    assert ours_off <= 1.2 * theirs_off + 1e-3


@pytest.mark.parametrize("config", [DeepseekV2Config, DeepseekV3Config])
def test_a_latent_cache_is_refused_by_its_config(config: Any) -> None:
    latent = config(**(SHAPE | LATENT))
    for look_at in (CacheGeometry.from_config, lambda config: LoadedModel.of(tiny_model(config))):
        with pytest.raises(UserError, match="latent cache"):
            look_at(latent)


@torch.inference_mode()
@pytest.mark.parametrize("config", [DeepseekV2Config, DeepseekV3Config])
def test_keys_that_a_model_changes_after_the_cache_are_refused_in_the_first_forward(config: Any) -> None:
    latent = config(**(SHAPE | LATENT))
    # What such a model hands to its cache: one head of latents.
    shape = CacheGeometry(layers=4, kv_heads=1, query_group=4, head_dim=8, windows=(None,) * 4)
    cache = BudgetedCache(full_cache_plan(ModelIdentity.from_config(latent, id="latent"), shape, 50))
    model = tiny_model(latent)
    model.set_attn_implementation(attention.ATTN_IMPLEMENTATION)
    with pytest.raises(UserError, match="never reached baklava's attention"):
        model(random_ids(1, 10), past_key_values=cache)


OUTSIDERS = {
    "bloom": BloomConfig(**TOKENS, vocab_size=64, hidden_size=32, n_layer=4, n_head=4),
    "mpt": MptConfig(vocab_size=64, d_model=32, n_layers=4, n_heads=4, max_seq_len=512),
    "falcon": FalconConfig(**(SHAPE | {"num_key_value_heads": 4, "alibi": True, "multi_query": False})),
    "xglm": XGLMConfig(**TOKENS, vocab_size=64, d_model=32, ffn_dim=64, num_layers=4, attention_heads=4),
}


@torch.inference_mode()
@pytest.mark.parametrize("outsider", OUTSIDERS)
def test_a_model_without_the_attention_interface_is_refused_and_gives_no_token(outsider: str) -> None:
    config, ids = OUTSIDERS[outsider], random_ids(1, 10)
    model, plan = (
        tiny_model(config),
        full_cache_plan(ModelIdentity.from_config(config, id=outsider), CacheGeometry.from_config(config), 50),
    )
    with pytest.raises(UserError, match="never reached baklava's attention"):
        model(ids, past_key_values=BudgetedCache(plan))
    with pytest.raises(UserError, match="never reached baklava's attention"):
        model.generate(ids, past_key_values=BudgetedCache(plan), max_new_tokens=1, do_sample=False)


@torch.inference_mode()
def test_a_model_that_attends_twice_to_what_it_stored_once_is_refused() -> None:
    loaded = LoadedModel.of(tiny_model(DiffLlamaConfig(**SHAPE)))
    with pytest.raises(UserError, match="attends twice"):
        loaded.model(random_ids(1, 30), past_key_values=full_cache(loaded))


@pytest.mark.parametrize(
    "config", [OpenAIGPTConfig(vocab_size=64, n_embd=32, n_layer=2, n_head=4), *OUTSIDERS.values()]
)
def test_a_model_whose_attention_cannot_be_chosen_is_refused_at_once(config: Any) -> None:
    with pytest.raises(UserError, match="does not attend through transformers' attention interface"):
        LoadedModel.of(tiny_model(config))


UNUSUAL = {
    "a layer that says it has no cache": CwmConfig(**(SHAPE | {"head_dim": 8})),
    "layers that say so, of two kinds": Olmo3Config(
        **(SHAPE | {"layer_types": ["full_attention", "sliding_attention"] * 2})
    ),
    "attention whose output is viewed": AfmoeConfig(**(SHAPE | {"head_dim": 8, "num_dense_layers": 4})),
}


@torch.inference_mode()
@pytest.mark.parametrize("config", UNUSUAL.values(), ids=UNUSUAL)
def test_models_that_use_attention_in_unusual_ways_generate_in_parts_as_they_do_whole(config: Any) -> None:
    loaded, ids = LoadedModel.of(tiny_model(config)), random_ids(1, 60)
    cache = full_cache(loaded)
    logits = [loaded.model(part, past_key_values=cache).logits for part in ids.split([20, 1, 39], 1)]
    assert_close(torch.cat(logits, 1), loaded.model(ids, use_cache=False).logits, atol=1e-4, rtol=1e-4)


@torch.inference_mode()
def test_values_of_another_dimension_than_keys_are_refused() -> None:
    config = MiMoV2FlashConfig(**(SHAPE | {"head_dim": 8, "v_head_dim": 16, "n_routed_experts": 2}))
    loaded = LoadedModel.of(tiny_model(config))
    with pytest.raises(UserError, match="stores others than its config says cannot be budgeted"):
        loaded.model(random_ids(1, 20), past_key_values=full_cache(loaded))


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (JambaConfig(**SHAPE, attn_layer_period=2, attn_layer_offset=1, mamba_d_state=8), "forget the text before"),
        (RecurrentGemmaConfig(**SHAPE, attention_window_size=16), "none with full attention"),
        (MiniMaxConfig(**SHAPE, head_dim=8), "keeps its states in no cache that can be replaced"),
        (
            Mamba2Config(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_heads=4, head_dim=16),
            "none with full attention",
        ),
    ],
    ids=["jamba", "recurrent_gemma", "minimax", "mamba2"],
)
def test_states_that_cannot_be_taken_along_are_refused(config: Any, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        LoadedModel.of(tiny_model(config))


def test_states_in_the_modules_of_a_model_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = ["linear_attention", "linear_attention", "full_attention", "linear_attention"]
    monkeypatch.setattr(geometry, "_layer_kinds", lambda config: (kinds, (0, 0, None, 0)))
    with pytest.raises(UserError, match="layer 0 of recurrent_gemma keeps its state outside of the cache"):
        CacheGeometry.from_config(RecurrentGemmaConfig(**SHAPE, attention_window_size=16))


@torch.inference_mode()
@pytest.mark.parametrize("cached", [False, True], ids=["without a cache", "budgeted"])
def test_a_model_with_masks_of_its_own_is_refused(cached: bool) -> None:
    loaded = LoadedModel.of(tiny_model(DogeConfig(**SHAPE)))
    with pytest.raises(UserError, match=r"attention masks? "):
        loaded.model(random_ids(1, 20), past_key_values=full_cache(loaded) if cached else None)
