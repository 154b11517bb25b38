"""Scoring a prompt while the model repeats it (KVzip, arXiv 2505.23416): for about one more prefill, once."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import Cache
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
from baklava.cache.recording_layer import Recording
from baklava.errors import UserError
from baklava.eviction import KVzip, QuerySample
from baklava.runtime.model_loader import LoadedModel

REPEAT_CHUNK_TOKENS = 512
"""Tokens that are repeated per forward."""

REPEAT_OVERHEAD_TOKENS = REPEAT_CHUNK_TOKENS + 64
"""Positions that repeating takes behind a prompt: a chunk, its lead and the request."""

LEAD_TOKENS = 8
"""Tokens before a chunk that tell the model where to go on."""


@torch.inference_mode()
def add_reconstruction_scores(loaded: LoadedModel, ids: Int[Tensor, "batch tokens"], recording: Recording) -> Recording:
    """The recording of a prompt, with its scores by context reconstruction beside those it has.

    Raises:
        UserError: the model's positions do not reach behind the prompt by one chunk.
    """
    if not can_repeat(loaded, ids):
        raise UserError(
            f"a prompt of {ids.shape[1]} tokens leaves no room to repeat {min(REPEAT_CHUNK_TOKENS, ids.shape[1])} of them within the "
            f"{loaded.max_length} positions of {loaded.identity.id}; shorten it or choose another eviction method"
        )
    cache = Cache(layers=[RepeatingLayer(*pair) for pair in zip(recording.keys, recording.values, strict=True)])
    for chunk in _chunks(loaded, ids):
        loaded.model(chunk, past_key_values=cache, logits_to_keep=1)
    made = [{KVzip().score_key: layer.scores} for layer in cache.layers]
    scores = tuple(known | new for known, new in zip(recording.scores, made, strict=True))
    return replace(recording, scores=scores)


def can_repeat(loaded: LoadedModel, ids: Int[Tensor, "batch tokens"]) -> bool:
    """Whether the model's positions reach behind a prompt by one chunk of it."""
    return ids.shape[1] + max(chunk.shape[1] for chunk in _chunks(loaded, ids)) <= loaded.max_length


def _chunks(loaded: LoadedModel, ids: Int[Tensor, "batch tokens"]) -> Iterator[Int[Tensor, "batch chunk"]]:
    """The prompt in chunks, each behind the request to repeat it."""
    for start in range(0, ids.shape[1], REPEAT_CHUNK_TOKENS):
        yield torch.cat([repeat_prompt(loaded, ids, start), ids[:, start : start + REPEAT_CHUNK_TOKENS]], 1)


def repeat_prompt(loaded: LoadedModel, ids: Int[Tensor, "batch tokens"], start: int) -> Int[Tensor, "batch request"]:
    """The request to repeat a prompt from here on, if there is a tokenizer to write it with, and what leads there."""
    ask = "\n\nRepeat the text above, word for word, from its beginning:\n\n"
    if start:
        ask = "\n\nRepeat the text above, word for word, going on after:\n\n"
    asked = loaded.tokenizer.encode(ask, add_special_tokens=False) if loaded.tokenizer else []
    written = torch.tensor(asked, dtype=ids.dtype, device=ids.device).expand(len(ids), -1)
    return torch.cat([written, ids[:, max(0, start - LEAD_TOKENS) : start]], 1)


class RepeatingLayer(BudgetedLayerBase):
    """A prompt's full cache that is attended to but takes nothing in, and keeps what its entries got at the most."""

    def __init__(self, keys: KVStates, values: KVStates) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        self.keys, self.values, self.cumulative_length = keys, values, keys.shape[2]
        self.scores: Float[Tensor, "batch heads entries"] = torch.zeros(keys.shape[:3], device=keys.device)

    @override
    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return attention.attach_layer(key_states, self), value_states

    def attend(self, query: QueryStates, key: KVStates, value: KVStates, padding: Tensor | None, kernel: AttentionParams) -> QueryStates:
        """Attend to the prompt and to the repetition so far, and note what the prompt gets."""
        held, new = self.keys.shape[2], key.shape[2]
        positions = torch.arange(held + new, device=key.device)[None]
        forward = AttentionInputs(
            split_gqa_groups(query, query.shape[1] // key.shape[1]),
            torch.cat([self.keys, key], 2),
            torch.cat([self.values, value], 2),
            positions[:, held:],
            positions[:, None],
            kernel,
        )
        scores = torch.cat([self.scores, self.scores.new_zeros(key.shape[:3])], 2)
        update_scores(forward, QuerySample(), [ScoreAccumulator(KVzip(), scores)])
        self.scores = scores[..., :held].clone()
        return merge_gqa_groups(forward.attend(masked=True))
