"""Each family's RoPE, as the probe finds it, against the queries that the model itself computes."""

from typing import Any

import pytest
import torch
from model_families import FAMILIES, SHAPE, tiny_model
from plan_factory import make_plan, random_ids
from torch import Tensor
from torch.nn import Module
from transformers import CohereConfig, GlmConfig, LlamaConfig, Phi3Config, SmolLM3Config, StableLmConfig

from baklava.cache import attention
from baklava.cache.budgeted_cache import BudgetedCache
from baklava.errors import UserError
from baklava.eviction import AttentionMatching, HeavyHitter
from baklava.runtime.model_loader import LoadedModel

YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 128}
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [8.0] * 4}
MODELS: dict[str, tuple[Any, dict[str, Any]]] = FAMILIES | {
    "cohere, adjacent channels": (CohereConfig, {}),
    "glm, half of the channels": (GlmConfig, {"head_dim": 8, "partial_rotary_factor": 0.5}),
    "stablelm, a quarter of the channels": (StableLmConfig, {}),
    "smollm3, a layer without rope": (SmolLM3Config, {}),
    "yarn": (LlamaConfig, {"rope_parameters": YARN}),
    "longrope": (Phi3Config, {"rope_parameters": LONGROPE, "original_max_position_embeddings": 64}),
}
LAYERS_WITHOUT_ROPE = {
    "smollm3": 1,
    "smollm3, a layer without rope": 1,
    "cohere2": 2,
    "exaone4": 2,
    "granite hybrid": 2,
    "nemotron_h": 2,
}


def queries_at(loaded: LoadedModel, position: int) -> dict[Module, Tensor]:
    """Return the query of one token alone at a position, for each attention layer."""
    seen: dict[Module, Tensor] = {}

    def keep(module: Module, query: Tensor, *_: Any) -> None:
        seen[module] = query

    with attention.attention_hook(keep):
        loaded.model(input_ids=torch.tensor([[7]]), position_ids=torch.tensor([[position]]), use_cache=False)
    return seen


@torch.inference_mode()
@pytest.mark.parametrize("name", MODELS)
def test_a_shifted_query_is_the_query_at_the_other_position(name: str) -> None:
    config, fields = MODELS[name]
    loaded = LoadedModel.of(tiny_model(config(**(SHAPE | fields))))
    before, after = queries_at(loaded, 11), queries_at(loaded, 311)
    moved = 0
    for module, query in before.items():
        shift = attention.rotary_shift_of(module)
        assert shift is not None
        moved += len(shift.frequencies) > 0
        shifted = shift.shift(query, torch.full((1, 1), 300))
        torch.testing.assert_close(shifted, after[module], atol=1e-4, rtol=1e-4)
    assert moved == len(before) - LAYERS_WITHOUT_ROPE.get(name, 0)


@torch.inference_mode()
def test_a_model_whose_rotation_is_not_known_is_refused_only_if_queries_must_be_moved() -> None:
    loaded = LoadedModel.of(tiny_model(LlamaConfig(**SHAPE)))
    attention.register_rotary_shift(loaded.model.model.layers[1].self_attn, None)
    sizes = [[20, 24]] * 4
    for eviction in (AttentionMatching(eviction_interval=4), HeavyHitter(eviction_interval=4, fit_references=8)):
        plan, refused = make_plan(loaded, sizes, eviction), "gives queries their positions in a way .* another eviction"
        with pytest.raises(UserError, match=refused):
            loaded.check_plan(plan)
        with pytest.raises(UserError, match=refused):
            loaded.model(random_ids(1, 40), past_key_values=BudgetedCache(plan))
    plan = make_plan(loaded, sizes, HeavyHitter(eviction_interval=4))
    loaded.check_plan(plan)
    assert loaded.model(random_ids(1, 40), past_key_values=BudgetedCache(plan)).logits.isfinite().all()


@torch.inference_mode()
def test_a_rotation_that_is_none_of_the_models_frequencies_is_not_known() -> None:
    model = tiny_model(LlamaConfig(**SHAPE))
    model.model.rotary_emb.register_forward_hook(lambda module, args, output: tuple(part.flip(-1) for part in output))
    loaded = LoadedModel.of(model)
    with pytest.raises(UserError, match="gives queries their positions"):
        loaded.check_plan(make_plan(loaded, [[20, 24]] * 4, AttentionMatching(eviction_interval=4)))
    assert [attention.rotary_shift_of(layer.self_attn) for layer in loaded.model.model.layers] == [None] * 4
