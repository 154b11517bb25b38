"""The full cache of a prompt, recorded once so that many budgeted caches can be cut from it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer
from typing_extensions import override

from baklava.cache import attention
from baklava.cache.attention import (
    AttentionParams,
    BudgetedLayerBase,
    KVStates,
    QueryStates,
    merge_gqa_groups,
    split_gqa_groups,
)
from baklava.cache.head_groups import AttentionInputs, ScoreAccumulator, update_scores
from baklava.errors import UserError
from baklava.eviction import Eviction, Sample
from baklava.plan.geometry import CacheGeometry


class RecordingLayer(BudgetedLayerBase):
    """A full layer that also scores its prompt for several eviction methods while it attends to it."""

    def __init__(self, evictions: Sequence[Eviction]) -> None:
        super().__init__()
        self.evictions = tuple(evictions)
        self.scores: dict[Any, Tensor] = {}

    @override
    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states, value_states
        else:
            self.keys = torch.cat([self.keys, key_states], 2)
            self.values = torch.cat([self.values, value_states], 2)
        is_prompt = self.cumulative_length == 0
        self.cumulative_length += key_states.shape[2]
        key = attention.attach_layer(self.keys, self) if is_prompt and self.evictions else self.keys
        return key, self.values

    def attend(
        self, query: QueryStates, key: KVStates, value: KVStates, padding: Tensor | None, params: AttentionParams
    ) -> QueryStates:
        """Attend to the prompt and record its scores."""
        positions = torch.arange(key.shape[2], device=key.device)[None]
        queries = split_gqa_groups(query, query.shape[1] // key.shape[1])
        forward = AttentionInputs(queries, key, value, positions, positions[:, None], params)
        output = forward.attend(masked=False)
        for sample, keepers in accumulators_by_sample(self.evictions, key).items():
            update_scores(forward, sample, keepers)
            self.scores |= {keeper.eviction.observation: keeper.scores for keeper in keepers}
        return merge_gqa_groups(output)


def accumulators_by_sample(evictions: Sequence[Eviction], key: KVStates) -> dict[Sample, list[ScoreAccumulator]]:
    """A keeper of scores for each method, together with those that watch the same queries."""
    keepers: dict[Sample, list[ScoreAccumulator]] = {}
    for eviction in evictions:
        scores = torch.zeros(key.shape[:3], device=key.device)
        keepers.setdefault(eviction.sample, []).append(ScoreAccumulator(eviction, scores))
    return keepers


@dataclass(frozen=True)
class Recording:
    """A prompt's full cache, layer by layer: keys, values and the scores of each recorded observation."""

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    scores: tuple[dict[Any, Tensor], ...]

    def to_dynamic_cache(self) -> Cache:
        """Transformers' own cache with all of the prompt; what it takes in does not reach the recording."""
        cache = Cache(layers=[DynamicLayer() for _ in self.keys])
        for layer, key, value in zip(cache.layers, self.keys, self.values, strict=True):
            layer.lazy_initialization(key, value)
            layer.keys, layer.values = key, value
        return cache


class RecordingCache(Cache):
    """The full cache of a prompt, from which many budgeted caches are cut.

    Raises:
        UserError: the model has sliding layers, which are not recorded.
    """

    def __init__(self, geometry: CacheGeometry, evictions: Sequence[Eviction]) -> None:
        if sliding := geometry.layers - len(geometry.budgetable):
            raise UserError(
                f"{sliding} of the model's {geometry.layers} layers slide, and a prompt's full cache is recorded only "
                "where none does; choose another model, or generate with a method other than reconstruction"
            )
        attention.register()
        own = [eviction for eviction in evictions if eviction.scored and not eviction.sample.repeated]
        observed = {eviction.observation: eviction for eviction in own}
        super().__init__(layers=[RecordingLayer(tuple(observed.values())) for _ in range(geometry.layers)])

    def to_recording(self, tokens: int) -> Recording:
        """What the first `tokens` tokens left."""
        layers = [layer for layer in self.layers if isinstance(layer, RecordingLayer)]
        keys, values = ([getattr(layer, name)[:, :, :tokens] for layer in layers] for name in ("keys", "values"))
        return Recording(tuple(keys), tuple(values), tuple(layer.scores for layer in layers))
