"""One token of each of many sequences in one forward: the model's layers run once, every cache attends for itself."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import Cache, GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.cache_utils import CacheLayerMixin
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
from baklava.cache.budgeted_layer import BudgetedLayer, batched_attend
from baklava.errors import UserError
from baklava.plan.budget_plan import BudgetPlan
from baklava.runtime.logprobs import check_consumed
from baklava.runtime.model_loader import LoadedModel
from baklava.runtime.prefill import Logits, prefill


class BatchedLayer(BudgetedLayerBase):
    """The same layer of several caches of one sequence each.

    Rows differ in what they have seen, so it says 0 and positions must be given.
    """

    def __init__(self, index: int, batch: "BatchedCache") -> None:
        super().__init__()
        self.index, self.batch = index, batch

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Hand the new keys on, tagged with this layer; every cache takes its own in when it attends."""
        return attention.attach_layer(key_states, self), value_states

    def attend(self, query: QueryStates, key: KVStates, value: KVStates, padding: Tensor | None, kernel: AttentionParams) -> QueryStates:
        """What the new token of each row attends to in the row's own cache; zeros in a row that has failed."""
        output = torch.zeros_like(query)
        for rows in self.batch.teams:
            rows = [row for row in rows if row not in self.batch.failed]
            layers = [self.batch.caches[row].layers[self.index] for row in rows]
            if rows and all(map(_joins, layers)):
                self._together(rows, layers, query, key, value, kernel, output)
                continue
            for row in rows:
                own = slice(row, row + 1)
                try:
                    output[own] = self._attend(self.batch.caches[row], query[own], key[own], value[own], kernel)
                except Exception as error:
                    self.batch.failed[row] = error
        return output

    def _together(
        self,
        rows: list[int],
        layers: list[BudgetedLayer],
        query: QueryStates,
        key: KVStates,
        value: KVStates,
        kernel: AttentionParams,
        output: QueryStates,
    ) -> None:
        try:
            made, failed = batched_attend(layers, query[rows], key[rows], value[rows], kernel)
        except Exception as error:  # of what all of them share
            self.batch.failed |= dict.fromkeys(rows, error)
            return
        output[rows] = made
        self.batch.failed |= {rows[place]: error for place, error in failed.items()}

    def _attend(self, cache: BudgetedCache, query: QueryStates, key: KVStates, value: KVStates, kernel: AttentionParams) -> QueryStates:
        layer = cache.layers[self.index]
        key, value = cache.update(key, value, self.index)
        own = getattr(key, "budgeted_layer", None)
        if own is not None:
            return own.attend(query, key, value, None, kernel)
        # A layer that slides has cut its entries to the window already, and one new token sees all of them.
        assert layer.is_sliding
        positions = torch.zeros(1, key.shape[2], dtype=torch.long, device=key.device)
        queries = split_gqa_groups(query, query.shape[1] // key.shape[1])
        return merge_gqa_groups(attend(queries, key, value, positions[:, :1], positions[:, None], kernel, masked=False))


def _joins(layer: CacheLayerMixin) -> bool:
    return isinstance(layer, BudgetedLayer) and layer.can_batch


class BatchedCache(Cache):
    """Caches of one sequence each, behind one forward of one new token of every sequence.

    `teams` are rows of one plan each, which may work together. What fails in the cache of one row is in `failed`, and
    harms no other row; that row's output means nothing.
    """

    def __init__(self, caches: Sequence[BudgetedCache]) -> None:
        self.caches, self.failed = tuple(caches), dict[int, Exception]()
        plans: dict[int, list[int]] = {}
        for row, cache in enumerate(self.caches):
            plans.setdefault(id(cache.plan), []).append(row)
        self.teams = list(plans.values())
        super().__init__(layers=[BatchedLayer(index, self) for index in range(len(self.caches[0].layers))])


@torch.inference_mode()
def decode_step(
    loaded: LoadedModel, caches: Sequence[BudgetedCache], tokens: Sequence[int]
) -> tuple[Logits, dict[int, Exception]]:
    """Logits behind one new token of each sequence, a row each, and what failed in the caches of which rows.

    The caches may be of different plans and lengths. No result depends on the neighbours, beyond rounding.

    Raises:
        UserError: there is no sequence, or not one token for each.
    """
    if not caches or len(caches) != len(tokens):
        raise UserError(f"{len(tokens)} tokens for {len(caches)} caches; give one new token for each of at least one")
    batch, device = BatchedCache(caches), loaded.device
    output = loaded.model(
        input_ids=torch.tensor(tokens, device=device)[:, None],
        position_ids=torch.tensor([cache.get_seq_length() for cache in caches], device=device)[:, None],
        past_key_values=batch,
        use_cache=True,
        logits_to_keep=1,
    )
    return output.logits[:, -1], batch.failed


Row = Int[Tensor, "rows _"]

SUPPORTED_MODES = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)


@torch.inference_mode()
def generate(loaded: LoadedModel, plan: BudgetPlan, prompt: Sequence[int], **options: Any) -> list[int]:
    """The tokens behind a prompt that enters as its plan says, also chunk by chunk or repeated.

    `options` are those of `model.generate`, which makes the logits processors and stopping criteria of them.

    Raises:
        UserError: beams or another way to generate that needs more than one sequence.
        RuntimeError: the cache held more than its plan, or never saw the tokens.
    """

    def draw(
        model: Any,
        input_ids: Row,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        streamer: BaseStreamer | None = None,
        **unused: Any,
    ) -> Row:
        _check_one_by_one(generation_config)
        cache, logits = prefill(loaded, plan, input_ids)
        while True:
            scores = logits_processor(input_ids, logits.float())
            token = _sample(scores, sampled=bool(generation_config.do_sample))
            input_ids = torch.cat([input_ids, token], 1)
            if streamer is not None:
                streamer.put(token.cpu())
            if bool(stopping_criteria(input_ids, scores).all()):
                check_consumed(cache, input_ids.shape[1] - 1)
                if streamer is not None:
                    streamer.end()
                return input_ids
            logits = model(token, past_key_values=cache, logits_to_keep=1).logits[:, -1]

    ids = torch.tensor([list(prompt)], device=loaded.device)
    made = loaded.model.generate(ids, attention_mask=torch.ones_like(ids), custom_generate=draw, **options)
    return made[0, len(prompt) :].tolist()


def _check_one_by_one(config: GenerationConfig) -> None:
    mode = config.get_generation_mode()
    if mode not in SUPPORTED_MODES or (config.num_return_sequences or 1) > 1:
        raise UserError(
            f"{mode.value} with {config.num_return_sequences or 1} sequences was asked for, but a plan bounds one "
            "sequence at a time; leave it to greedy decoding or sampling"
        )


def _sample(scores: Tensor, sampled: bool) -> Row:
    return torch.softmax(scores, -1).multinomial(1) if sampled else scores.argmax(-1, keepdim=True)
