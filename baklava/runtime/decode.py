"""Decode: one token of many sequences in one forward, or one sequence with the options of generate()."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import Cache, GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation import BaseStreamer, GenerationMode

from baklava.cache import attention
from baklava.cache.attention import (
    AttentionParams,
    BudgetedLayerBase,
    KVStates,
    QueryStates,
    attend,
    merge_gqa_groups,
    split_gqa_groups,
)
from baklava.cache.budgeted_cache import BudgetedCache
from baklava.cache.budgeted_layer import BudgetedLayer, decode_rows
from baklava.errors import UserError
from baklava.plan.budget_plan import BudgetPlan
from baklava.runtime.model_loader import LoadedModel
from baklava.runtime.prefill import Logits, check_progress, prefill


class BatchedLayer(BudgetedLayerBase):
    """The same layer of several caches of one sequence each.

    Rows differ in their lengths, so `get_seq_length` is 0 and the positions must be passed to the model.

    Args:
        index: Number of the layer.
        caches: The caches, one for each row.
    """

    def __init__(self, index: int, caches: Sequence[BudgetedCache]) -> None:
        super().__init__()
        self.index, self.caches = index, caches

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Attach this layer to the new keys; every cache stores its own when it attends."""
        return attention.attach_layer(key_states, self), value_states

    def attend(
        self, query: QueryStates, key: KVStates, value: KVStates, padding: Tensor | None, params: AttentionParams
    ) -> QueryStates:
        """Return the output of the new token of each row, over the entries of the row's own cache."""
        layers = [cache.layers[self.index] for cache in self.caches]
        budgeted = [layer for layer in layers if isinstance(layer, BudgetedLayer)]
        if len(budgeted) == len(layers):
            return decode_rows(budgeted, query, key, value, params)
        rows = zip(self.caches, query.split(1), key.split(1), value.split(1), strict=True)
        return torch.cat([self._attend(*row, params) for row in rows])

    def _attend(
        self, cache: BudgetedCache, query: QueryStates, key: KVStates, value: KVStates, params: AttentionParams
    ) -> QueryStates:
        layer = cache.layers[self.index]
        key, value = cache.update(key, value, self.index)
        if isinstance(layer, BudgetedLayer):
            return layer.attend(query, key, value, None, params)
        # A sliding layer has cut its entries to the window already, and one new token attends to all of them.
        assert layer.is_sliding
        positions = torch.zeros(1, key.shape[2], dtype=torch.long, device=key.device)
        queries = split_gqa_groups(query, query.shape[1] // key.shape[1])
        return merge_gqa_groups(attend(queries, key, value, positions[:, :1], positions[:, None], params, masked=False))


class BatchedCache(Cache):
    """Caches of one sequence each, for one forward of one new token of every sequence.

    Nothing here refers to itself, so a cache is freed as soon as its sequence ends.
    """

    def __init__(self, caches: Sequence[BudgetedCache]) -> None:
        super().__init__(layers=[BatchedLayer(index, caches) for index in range(len(caches[0].layers))])


@torch.inference_mode()
def decode_step(loaded: LoadedModel, caches: Sequence[BudgetedCache], tokens: Sequence[int]) -> Logits:
    """Return the logits after one new token of each sequence, one row each.

    The caches may differ in plan and length. No row depends on the others, beyond rounding. After an error the caches
    are in an undefined state and must be dropped.

    Raises:
        UserError: there is no sequence, or not one token for each.
    """
    if not caches or len(caches) != len(tokens):
        raise UserError(f"{len(tokens)} tokens for {len(caches)} caches; give one new token for each of at least one")
    device = loaded.device
    lengths = [cache.get_seq_length() for cache in caches]
    output = loaded.model(
        input_ids=torch.tensor(tokens, device=device)[:, None],
        position_ids=torch.tensor(lengths, device=device)[:, None],
        past_key_values=BatchedCache(caches),
        use_cache=True,
        logits_to_keep=1,
    )
    for cache, length in zip(caches, lengths, strict=True):
        check_progress(cache, length + 1)
    return output.logits[:, -1]


Row = Int[Tensor, "rows _"]

SUPPORTED_MODES = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)


@torch.inference_mode()
def generate(loaded: LoadedModel, plan: BudgetPlan, prompt: Sequence[int], **options: Any) -> list[int]:
    """Return the tokens that follow a prompt, which is prefilled as its plan says.

    `options` are those of `model.generate`, which turns them into logits processors and stopping criteria. Without an
    `eos_token_id` or a `generation_config` among them, the model's and the tokenizer's end tokens end the text.

    Raises:
        UserError: the options need more than one sequence, as beams do.
        RuntimeError: the cache exceeded its plan, or did not see the tokens.
    """

    def sample_loop(
        model: Any,
        input_ids: Row,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        streamer: BaseStreamer | None = None,
        **unused: Any,
    ) -> Row:
        _check_single_sequence(generation_config)
        cache, logits = prefill(loaded, plan, input_ids)
        while True:
            scores = logits_processor(input_ids, logits.float())
            if generation_config.do_sample:
                token = torch.softmax(scores, -1).multinomial(1)
            else:
                token = scores.argmax(-1, keepdim=True)
            input_ids = torch.cat([input_ids, token], 1)
            if streamer is not None:
                streamer.put(token.cpu())
            if bool(stopping_criteria(input_ids, scores).all()):
                cache.check_integrity(input_ids.shape[1] - 1)
                if streamer is not None:
                    streamer.end()
                return input_ids
            logits = model(token, past_key_values=cache, logits_to_keep=1).logits[:, -1]

    if "generation_config" not in options and loaded.eos_token_ids:
        options.setdefault("eos_token_id", sorted(loaded.eos_token_ids))
    ids = loaded.as_batch(prompt)
    output = loaded.model.generate(ids, attention_mask=torch.ones_like(ids), custom_generate=sample_loop, **options)
    return output[0, len(prompt) :].tolist()


def _check_single_sequence(config: GenerationConfig) -> None:
    mode = config.get_generation_mode()
    if mode not in SUPPORTED_MODES or (config.num_return_sequences or 1) > 1:
        raise UserError(
            f"{mode.value} with {config.num_return_sequences or 1} sequences is not supported, since a plan "
            "budgets one sequence at a time; use greedy decoding or sampling"
        )
