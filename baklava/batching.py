"""One token of each of many sequences in one forward: the model's layers run once, every cache attends for itself."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin
from typing_extensions import override

from baklava import attention
from baklava.attending import AttendingLayer
from baklava.attention import Heads, Kernel, Queries, attend, grouped, ungrouped
from baklava.cache import BudgetedCache
from baklava.errors import UserError
from baklava.model import LoadedModel
from baklava.prefilling import Logits
from baklava.ragged import RaggedLayer, attend_together


class BatchedLayer(AttendingLayer):
    """The same layer of several caches of one sequence each.

    Rows differ in what they have seen, so it says 0 and positions must be given.
    """

    def __init__(self, index: int, batch: "BatchedCache") -> None:
        super().__init__()
        self.index, self.batch = index, batch

    @override
    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Hand the new keys on, tagged with this layer; every cache takes its own in when it attends."""
        return attention.tagged(key_states, self), value_states

    def attend(self, query: Queries, key: Heads, value: Heads, padding: Tensor | None, kernel: Kernel) -> Queries:
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
        layers: list[RaggedLayer],
        query: Queries,
        key: Heads,
        value: Heads,
        kernel: Kernel,
        output: Queries,
    ) -> None:
        try:
            made, failed = attend_together(layers, query[rows], key[rows], value[rows], kernel)
        except Exception as error:  # of what all of them share
            self.batch.failed |= dict.fromkeys(rows, error)
            return
        output[rows] = made
        self.batch.failed |= {rows[place]: error for place, error in failed.items()}

    def _attend(self, cache: BudgetedCache, query: Queries, key: Heads, value: Heads, kernel: Kernel) -> Queries:
        layer = cache.layers[self.index]
        key, value = cache.update(key, value, self.index)
        own = getattr(key, "budgeted_layer", None)
        if own is not None:
            return own.attend(query, key, value, None, kernel)
        # A layer that slides has cut its entries to the window already, and one new token sees all of them.
        assert layer.is_sliding
        positions = torch.zeros(1, key.shape[2], dtype=torch.long, device=key.device)
        queries = grouped(query, query.shape[1] // key.shape[1])
        return ungrouped(attend(queries, key, value, positions[:, :1], positions[:, None], kernel, masked=False))


def _joins(layer: CacheLayerMixin) -> bool:
    return isinstance(layer, RaggedLayer) and layer.joinable


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
