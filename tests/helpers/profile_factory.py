"""Random profiles: every number that an allocation method may use, for a model of 4 layers and 3 KV heads."""

from dataclasses import replace
from functools import cache
from typing import Any, get_args

import numpy as np

from baklava.allocation import BitPair, Limits
from baklava.eviction import StreamingLLM
from baklava.plan.budget_plan import EvictionConfig
from baklava.plan.geometry import CacheGeometry, ModelIdentity
from baklava.profiling.profile import LossCurves, LossMeasure, Profile, Ranking, RankingName

LAYERS, KV_HEADS, GROUP = 4, 3, 2
FULL = (None,) * LAYERS
SLIDING = (None, 64, None, 64)
BITS: tuple[BitPair, ...] = ((16, 16), (4, 4), (4, 2), (3, 3))
RANKS = (1, 2, 4, 10, 30, 80, 200, 500, 1000)
ENTRIES = (16, 64, 256, 512, 1004)


def geometry_of(windows: tuple[int | None, ...] = FULL) -> CacheGeometry:
    return CacheGeometry(layers=len(windows), kv_heads=KV_HEADS, query_group=GROUP, head_dim=16, windows=windows)


def limits_for(total: int, min_tokens: int, max_tokens: int, bits: BitPair = (16, 16), layers: int = LAYERS) -> Limits:
    """Limits whose budget suffices for `total` entries in ring buffers."""
    limits = Limits(geometry_of((None,) * layers), StreamingLLM().config, 0, min_tokens, max_tokens, bits)
    budget_bytes = total * limits.entry_bytes(bits) + limits.num_heads * limits.fixed_bytes(bits)
    return replace(limits, budget_bytes=budget_bytes)


@cache
def profile_of(seed: int, windows: tuple[int | None, ...] = FULL, better: bool = False) -> Profile:
    """Scores have ties and curves noise. With `better`, head 1 of layer 0 exceeds head 0 in everything."""
    draw = np.random.default_rng(seed)
    importance = draw.uniform(0, 1.5, (LAYERS, KV_HEADS, GROUP))
    layer_importance = tuple(draw.uniform(0, 1, LAYERS).tolist())
    spread = draw.uniform(0.2, 2, (2, 1, LAYERS, KV_HEADS, 1))
    scores = -np.sort(spread * np.log(RANKS) + draw.normal(0, 1, (2, 2, LAYERS, KV_HEADS, len(RANKS)))).round(1)
    spared = np.array([0, 0.01, 0.02, 0.03])[:, None] * draw.uniform(0, 3, (LAYERS, KV_HEADS, 1, 1))
    falling = draw.uniform(0.5, 1.5, (LAYERS, KV_HEADS, 1, len(ENTRIES))) / np.sqrt(ENTRIES)
    losses = (falling + spared) * draw.uniform(0.1, 2, (LAYERS, KV_HEADS, 1, 1))
    if better:
        importance[0, 1], losses[0, 1] = importance[0, 0] + 0.1, losses[0, 0] * 1.5
        scores[..., 0, 1, :] = scores[..., 0, 0, :] + 0.3
    return profile_with(importance, layer_importance, scores, losses, windows)


def profile_with(
    importance: np.ndarray,
    layer_importance: tuple[float, ...],
    scores: np.ndarray,
    losses: np.ndarray,
    windows: tuple[int | None, ...] = FULL,
) -> Profile:
    grid = nested(importance.reshape(len(importance), -1))
    named_scores = zip(get_args(RankingName), scores, strict=True)
    rankings = {name: Ranking(tokens=RANKS[-1], ranks=RANKS, scores=nested(values)) for name, values in named_scores}
    measured = dict.fromkeys(get_args(LossMeasure), nested(losses))
    curves = LossCurves(eviction=EvictionConfig(method="streaming_llm"), entries=ENTRIES, bits=BITS, losses=measured)
    return Profile(
        model=ModelIdentity(id="tiny", config_hash="abc"),
        geometry=geometry_of(windows),
        windows="none",
        importance={"value": grid, "key": grid},
        layer_importance=layer_importance,
        rankings=rankings,
        curves=curves,
    )


def nested(values: np.ndarray) -> Any:
    return tuple(nested(value) for value in values) if values.ndim > 1 else tuple(values.tolist())
