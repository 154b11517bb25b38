"""Scores of a prompt from the attention of a repetition of it (KVzip, arXiv 2505.23416), for about one more prefill."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from typing_extensions import override

from baklava.cache.attention import (
    AttentionParams,
    BudgetedLayerBase,
    KVStates,
    QueryStates,
    merge_gqa_groups,
    split_gqa_groups,
)
from baklava.cache.head_groups import AttentionInputs, ScoreAccumulator, update_scores
from baklava.cache.recording_layer import Recording
from baklava.cache.storage import count_bytes
from baklava.errors import UserError
from baklava.eviction import KVzip, QuerySample
from baklava.runtime.model_loader import LoadedModel

REPEAT_CHUNK_TOKENS = 512
"""Tokens of the prompt that are repeated per forward."""

REPEAT_OVERHEAD_TOKENS = REPEAT_CHUNK_TOKENS + 64
"""Positions after the prompt that a repetition needs: a chunk, its lead and the request."""

LEAD_TOKENS = 8
"""Tokens before a chunk that show the model where to continue."""


@torch.inference_mode()
def add_reconstruction_scores(loaded: LoadedModel, ids: Int[Tensor, "batch tokens"], recording: Recording) -> Recording:
    """Return a recording with the scores of context reconstruction: the largest probability that an entry gets from it.

    If those of `KVzip` were recorded, they are put in this order, in place.

    Raises:
        UserError: the model's positions do not suffice for the prompt and one repeated chunk.
    """
    if not can_repeat(loaded, ids):
        raise UserError(
            f"a prompt of {ids.shape[1]} tokens and {min(REPEAT_CHUNK_TOKENS, ids.shape[1])} that repeat it exceed the "
            f"{loaded.max_length} positions of {loaded.identity.id}; shorten it or choose another eviction method"
        )
    layers = [RepeatingLayer(*pair) for pair in zip(recording.keys, recording.values, strict=True)]
    for chunk in _chunks(loaded, ids):
        # Sliding layers go on from the end of the prompt each time, as the others do.
        loaded.model(chunk, past_key_values=recording.to_cache(layers), logits_to_keep=1)
    key, reconstruction = KVzip().score_key, tuple(layer.scores for layer in layers)
    for own, repeated in zip(recording.scores, reconstruction, strict=True):
        if key in own:
            own[key].copy_(KVzip.reorder(own[key], repeated))
    return replace(recording, reconstruction=reconstruction)


def can_repeat(loaded: LoadedModel, ids: Int[Tensor, "batch tokens"]) -> bool:
    """Return whether the model's positions suffice for a prompt and one repeated chunk of it."""
    return ids.shape[1] + max(chunk.shape[1] for chunk in _chunks(loaded, ids)) <= loaded.max_length


def _chunks(loaded: LoadedModel, ids: Int[Tensor, "batch tokens"]) -> Iterator[Int[Tensor, "batch chunk"]]:
    """Yield the prompt in chunks, each after the request to repeat it."""
    for start in range(0, ids.shape[1], REPEAT_CHUNK_TOKENS):
        yield torch.cat([repeat_prompt(loaded, ids, start), ids[:, start : start + REPEAT_CHUNK_TOKENS]], 1)


def repeat_prompt(loaded: LoadedModel, ids: Int[Tensor, "batch tokens"], start: int) -> Int[Tensor, "batch request"]:
    """Return the request to repeat a prompt from `start` on, followed by the tokens that lead there.

    Without a tokenizer there is no text of a request, only the lead.
    """
    text = "\n\nRepeat the text above, word for word, from its beginning:\n\n"
    if start:
        text = "\n\nRepeat the text above, word for word, going on after:\n\n"
    encoded = loaded.tokenizer.encode(text, add_special_tokens=False) if loaded.tokenizer else []
    request = torch.tensor(encoded, dtype=ids.dtype, device=ids.device).expand(len(ids), -1)
    return torch.cat([request, ids[:, max(0, start - LEAD_TOKENS) : start]], 1)


class RepeatingLayer(BudgetedLayerBase):
    """A prompt's full cache that does not grow, and keeps the largest probability that each entry has got."""

    def __init__(self, keys: KVStates, values: KVStates) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        self.keys, self.values, self.cumulative_length = keys, values, keys.shape[2]
        self.scores: Float[Tensor, "batch heads entries"] = torch.zeros(keys.shape[:3], device=keys.device)
        count_bytes(self.scores, self.scores.nbytes)

    @override
    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return self.attach(key_states), value_states

    def attend(
        self, query: QueryStates, key: KVStates, value: KVStates, padding: Tensor | None, params: AttentionParams
    ) -> QueryStates:
        """Attend to the prompt and to the new tokens, and update the scores of the prompt.

        Layers that share the keys do the same, if only for the last tokens.
        """
        prompt, queries = self.keys.shape[2], query.shape[2]
        positions = torch.arange(prompt + key.shape[2], device=key.device)[None]
        forward = AttentionInputs(
            split_gqa_groups(query, query.shape[1] // key.shape[1]),
            torch.cat([self.keys, key], 2),
            torch.cat([self.values, value], 2),
            positions[:, -queries:],
            positions[:, None],
            params,
        )
        scores = torch.cat([self.scores, self.scores.new_zeros(key.shape[:3])], 2)
        update_scores(forward, QuerySample(), [ScoreAccumulator(KVzip(), scores, QuerySample())])
        self.scores.copy_(scores[..., :prompt])
        return merge_gqa_groups(forward.attend(masked=True))
