"""Plans made by hand, and random tokens."""

import torch
from torch import Tensor

from baklava.cache.attention import rotary_shift_of
from baklava.cache.score_predictor import ScorePredictor, entry_features
from baklava.eviction import (
    METHODS,
    Eviction,
    HeavyHitter,
    StreamingLLM,
)
from baklava.plan.budget_plan import AllocationConfig, BudgetPlan, LayerBudget, PrefillConfig
from baklava.runtime.model_loader import LoadedModel


def make_plan(
    loaded: LoadedModel, tokens: list[list[int]], eviction: Eviction, bits: int = 32, context_length: int = 100
) -> BudgetPlan:
    """Return a plan with these capacities per (layer, KV head)."""
    same = (bits,) * loaded.geometry.kv_heads
    layers = tuple(LayerBudget(tokens=tuple(row), key_bits=same, value_bits=same) for row in tokens)
    return BudgetPlan(
        model=loaded.identity,
        geometry=loaded.geometry,
        context_length=context_length,
        eviction=eviction.config,
        allocation=AllocationConfig(method="by hand", budget=1.0),
        layers=layers,
        score_predictors=random_predictors(loaded) if eviction.predicted_share else None,
    )


def random_predictors(loaded: LoadedModel) -> tuple[tuple[str, ...] | None, ...]:
    """Return random score predictors for every layer with full attention."""
    geometry, draw = loaded.geometry, torch.Generator().manual_seed(5)
    rotary = next(found for module in loaded.model.modules() if (found := rotary_shift_of(module)) is not None)
    entries = torch.zeros(1, geometry.kv_heads, 1, geometry.head_dim)
    features = entry_features(entries, entries, rotary).shape[2]
    weights = (torch.randn(geometry.kv_heads, features, generator=draw) for _ in geometry.full_attention_layers)
    return geometry.spread((ScorePredictor(own).encode() for own in weights), None)


def random_ids(rows: int, tokens: int, seed: int = 0) -> Tensor:
    return torch.randint(1, 64, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def with_chunked_prefill(plan: BudgetPlan, chunk: int) -> BudgetPlan:
    """Return the plan with chunked prefill."""
    return plan.model_copy(update={"prefill": PrefillConfig(mode="chunked", chunk_size=chunk)})


def with_bits(plan: BudgetPlan, bits: list[tuple[int, int]]) -> BudgetPlan:
    """Return the plan with these bits of keys and values per KV head, in every layer."""
    keys, values = zip(*bits, strict=True)
    layers = [layer and LayerBudget(tokens=layer.tokens, key_bits=keys, value_bits=values) for layer in plan.layers]
    return plan.model_copy(update={"layers": tuple(layers)})


EVICTIONS = [
    StreamingLLM(sinks=2),
    HeavyHitter(sinks=3, eviction_interval=4, distance=0, stride=3),
    HeavyHitter(sinks=2, eviction_interval=5, distance=8, residual_length=12, centroids=2),
    METHODS["attention_matching"](sinks=2, eviction_interval=4, references=9, distance=3),
    METHODS["attention_matching"](sinks=2, eviction_interval=4, references=16, fit_references=8, centroids=2),
    METHODS["kvzap"](sinks=2, eviction_interval=4, references=16, fit_references=8, distance=3, share=0.5),
    HeavyHitter(sinks=2, eviction_interval=4, distance=0, fit_references=12),
    METHODS["snapkv"](sinks=2, eviction_interval=4, window=5, fit_references=12),
    METHODS["expected_attention"](sinks=2, eviction_interval=4, window=20),
    *(METHODS[name](sinks=2, eviction_interval=4) for name in ("tova", "key_norm", "keydiff", "kvzip")),
]


def quantized_plan(loaded: LoadedModel, eviction: Eviction, bits: int = 4) -> BudgetPlan:
    return make_plan(loaded, [[14, 40], [25, 25]], eviction, bits=bits)


def with_mixed_precision(loaded: LoadedModel, plan: BudgetPlan) -> BudgetPlan:
    """Return the plan with mixed precision: a random order of the key channels of every KV head."""
    draw, geometry = torch.Generator().manual_seed(7), loaded.geometry
    orders = [torch.randperm(geometry.head_dim, generator=draw).tolist() for _ in range(geometry.kv_heads)]
    channels = (tuple(bytes(order).hex() for order in orders),) * geometry.layers
    return BudgetPlan.model_validate({**plan.model_dump(), "key_channels": channels})
