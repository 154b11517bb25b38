"""KV heads of one layer that share a budget: their entries, and how they attend, store tokens and evict."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from baklava.cache import table_columns as columns
from baklava.cache.attention import AttentionParams, GroupedQueries, KVStates
from baklava.cache.head_groups.references import ReferenceQueries, References
from baklava.cache.head_groups.score_updates import AttentionInputs
from baklava.cache.head_groups.table import Rows, describe_storage, new_rows, row_addresses
from baklava.cache.kernels.compiled_entries import can_compile_entries, read_entries, select_entries
from baklava.cache.storage import DequantizedView, Storage, StorageLayout, TensorSpec, storage_for
from baklava.cache.storage.hadamard import HadamardRotation
from baklava.eviction import Eviction
from baklava.plan.geometry import FULL_BITS, BitSplit, bit_split


@dataclass(frozen=True)
class GroupBudget:
    """What the heads of a group share: their indices, their capacity in entries, the bits of a stored number.

    `channels` has the order of each head's key channels, as in a plan, if the bits of its channels differ.
    """

    heads: tuple[int, ...]
    tokens: int
    key_bits: int
    value_bits: int
    channels: tuple[str, ...] | None = None

    def key_bit_split(self, head_dim: int) -> BitSplit:
        """Return the numbers of a key's channels and their bits, in the order of the channels."""
        return bit_split(head_dim, self.key_bits, self.channels is not None)

    def value_bit_split(self, head_dim: int) -> BitSplit:
        """Return the number of a value's channels and their bits."""
        return bit_split(head_dim, self.value_bits, False)

    def channel_order(self, device: torch.device) -> Int[Tensor, "heads head_dim"] | None:
        """Return the order of each head's key channels, or None if all of them have the same bits."""
        if self.channels is None:
            return None
        return torch.tensor([list(bytes.fromhex(order)) for order in self.channels], device=device)


@dataclass(frozen=True)
class NewTokens:
    """New tokens of a forward, for the heads of one group. Positions are negative for padding.

    `num_before` counts the tokens before them in a row, padding included. `padded` says that some row has padding,
    `teacher_forced` that the tokens attend to exactly what they would attend to one by one. `references` are the
    reference queries of a prompt, if its entries are scored or fitted by such, and `predicted` their predicted scores.
    """

    num_before: int
    query: GroupedQueries
    key: KVStates
    value: KVStates
    positions: Int[Tensor, "#batch tokens"]
    padded: bool
    teacher_forced: bool
    references: ReferenceQueries | None = None
    predicted: Float[Tensor, "batch heads tokens"] | None = None

    @property
    def num_tokens(self) -> int:
        """Number of new tokens per row."""
        return self.key.shape[2]

    def for_heads(self, heads: slice | Int[Tensor, " heads"]) -> "NewTokens":
        """Return the tokens for some of the KV heads."""
        references = self.references and self.references.for_heads(heads)
        states = {name: getattr(self, name)[:, heads] for name in ("query", "key", "value")}
        predicted = None if self.predicted is None else self.predicted[:, heads]
        return replace(self, references=references, predicted=predicted, **states)

    def narrow(self, start: int, stop: int) -> "NewTokens":
        """Return the tokens from `start` to `stop`."""
        rows = slice(start, stop)
        return NewTokens(
            self.num_before + start,
            self.query[:, :, :, rows],
            self.key[:, :, rows],
            self.value[:, :, rows],
            self.positions[:, rows].clone(),  # a view would keep the positions of the whole prompt alive
            self.padded,
            self.teacher_forced,
        )


class HeadGroup(ABC):
    """Entries of KV heads with equal budgets; between two forwards at most `budget.tokens` per head.

    `max_tokens` is the largest number of tokens that a row will have: there are no slots beyond it, and nothing else
    changes. A group says which tensors it needs (`specs`), and is used once it has them (`bind`). It counts its entries
    in the rows that its heads have in the table of the layer, where kernels count too.

    The keys of a quantized budget are rotated, those in 16 bits included, and so are the values: new tokens and their
    queries are rotated first, outputs are rotated back. Eviction methods score rotated entries.
    """

    def __init__(
        self, budget: GroupBudget, eviction: Eviction, template: KVStates, max_tokens: int | None = None
    ) -> None:
        self.budget, self.eviction = budget, eviction
        self.set_max_tokens(max_tokens)
        self.index = _index(budget.heads, template.device)
        template = template[:, : len(budget.heads)]
        keys, values = (of(template.shape[3]) for of in (budget.key_bit_split, budget.value_bit_split))
        self.key_rotation = _rotation(keys, template, budget.channel_order(template.device) if len(keys) > 1 else None)
        self.value_rotation = _rotation(values, template)
        self.layout = layout = StorageLayout(budget.tokens, eviction.sinks, eviction.residual_length)
        self.keys = storage_for(keys, template, layout, centred=True)
        self.values = storage_for(values, template, layout)
        self.head_dim = template.shape[3]
        self.is_dequantized = False
        self.shared: list[tuple[AttentionInputs, bool]] | None = None
        """What the tokens of a forward attended to, part by part, and whether it was masked; None if nobody asks."""
        self.rows = new_rows(1, budget.heads[-1] + 1)
        self.addresses: Int[np.ndarray, " rows"] = np.empty(0, np.int64)
        """Addresses of the rows of its heads."""
        self._can_compile = can_compile_entries(template)

    def __deepcopy__(self, memo: dict[int, Any]) -> "HeadGroup":
        """Return a copy that no kernel may touch until it is bound: the table's addresses are those of the original."""
        copied = memo[id(self)] = copy.copy(self)
        copied.__dict__ = {name: copy.deepcopy(value, memo) for name, value in self.__dict__.items()}
        copied.addresses = np.empty(0, np.int64)
        return copied

    def set_max_tokens(self, max_tokens: int | None) -> None:
        """Need no more slots than a sequence of `max_tokens` tokens can fill; `bind` must follow."""
        self.num_slots = self.budget.tokens if max_tokens is None else min(self.budget.tokens, max_tokens)

    def specs(self) -> list[TensorSpec]:
        """Return the tensors that the entries need."""
        return [*self.keys.specs(self.num_slots), *self.values.specs(self.num_slots), *self._state_specs()]

    def bind(self, tensors: Iterator[Tensor], rows: Rows) -> None:
        """Take the tensors of the specs, in their order, and describe them in the rows of a table."""
        counters = self.rows[0, self.budget.heads[0], columns.COUNTERS].copy()
        self.keys.bind(tensors)
        self.values.bind(tensors)
        self._bind_state(tensors)
        self.rows = rows
        self.addresses = row_addresses(rows)[:, list(self.budget.heads)].ravel()
        described = self.describe()
        described[..., columns.COUNTERS] = counters
        rows[:, list(self.budget.heads)] = described

    def describe(self) -> Rows:
        """Return the rows of this group's heads, apart from their counters."""
        shape, head_dim = (len(self.keys.tensors[0]), len(self.budget.heads)), self.head_dim
        rows = np.zeros((*shape, columns.NUM_COLUMNS), np.int64)
        rows[..., columns.CAPACITY], rows[..., columns.SLOTS] = self.budget.tokens, self.num_slots
        rows[..., columns.SINK_TOKENS] = self.eviction.sinks
        if self.key_rotation is not None:
            channels = self.budget.key_bit_split(head_dim)[0][0]
            rows[..., columns.KEY_BLOCK] = channels & -channels
            if (order := self.key_rotation.order) is not None:
                rows[..., columns.CHANNEL_ORDER] = order.data_ptr() + np.arange(shape[1]) * head_dim * order.itemsize
        if self.value_rotation is not None:
            rows[..., columns.VALUE_BLOCK] = head_dim & -head_dim
        describe_storage(rows[..., columns.KEY : columns.VALUE], self.keys)
        describe_storage(rows[..., columns.VALUE :], self.values)
        self._describe_state(rows)
        return rows

    @property
    def num_filled(self) -> int:
        """Entries per head, in the first slots."""
        return self._counter(columns.FILLED)

    @num_filled.setter
    def num_filled(self, entries: int) -> None:
        self._count(columns.FILLED, entries)

    @property
    def counters(self) -> list[int]:
        """What it has counted, in the order of the table's columns."""
        counters: list[int] = self.rows[0, self.budget.heads[0], columns.COUNTERS].tolist()
        return counters

    def restore(self, counters: Sequence[int], pad_lengths: Int[Tensor, " batch"] | None) -> None:
        """Go on from tensors that hold what a group of the same budget held when it had counted this.

        Args:
            counters: As the property returned them.
            pad_lengths: Padding tokens of each row, if some row has any.
        """
        for column, number in enumerate(counters):
            self._count(column, int(number))

    def _counter(self, column: int) -> int:
        return int(self.rows[0, self.budget.heads[0], column])

    def _count(self, column: int, number: int) -> None:
        self.rows[:, list(self.budget.heads), column] = number

    def attend(self, tokens: NewTokens, params: AttentionParams) -> GroupedQueries:
        """Return the output of new tokens, and store them within the budget."""
        if tokens.teacher_forced and not self.num_filled:
            # One by one, the first token would be a prompt of its own.
            parts = [replace(tokens.narrow(0, 1), teacher_forced=False), tokens.narrow(1, tokens.num_tokens)]
            return torch.cat([self.attend(part, params) for part in parts if part.num_tokens], 3)
        return self.rotate_back(self._attend(self.rotate(tokens), params))

    def _share(self, inputs: AttentionInputs, masked: bool, stored: bool) -> None:
        """Keep what the next tokens attend to, for other layers; `stored` entries may change before these read them."""
        if self.shared is not None:
            self.shared.append((inputs.copy() if stored else inputs, masked))

    def attend_shared(self, query: GroupedQueries, params: AttentionParams) -> GroupedQueries:
        """Return the output of another layer's queries over what this layer's tokens attended to in this forward.

        They may be those of the last tokens only, since models need no more of a prompt if later layers have no keys.
        """
        assert self.shared is not None
        outputs, left = [], _rotate(self.key_rotation, query)
        for inputs, masked in reversed(self.shared):
            tokens = min(inputs.query.shape[3], left.shape[3])
            if tokens:
                own, masked = inputs.of_last(left[:, :, :, -tokens:], params), masked or tokens < inputs.query.shape[3]
                outputs.append(own.attend(masked))
                left = left[:, :, :, :-tokens]
        return self.rotate_back(torch.cat(outputs[::-1], 3))

    def is_prompt(self, tokens: NewTokens) -> bool:
        """Return whether these tokens attend together and are compressed then, and not one by one."""
        is_long = not self.num_filled or tokens.num_tokens > self.eviction.eviction_interval
        return is_long and not tokens.teacher_forced

    def rotate(self, tokens: NewTokens) -> NewTokens:
        """Return the tokens with their channels as entries are stored."""
        query, key = (_rotate(self.key_rotation, states) for states in (tokens.query, tokens.key))
        references = tokens.references
        if references is not None:
            queries = references.query, references.shifted
            standing, shifted = (_rotate(self.key_rotation, each).float() for each in queries)
            references = ReferenceQueries(standing, shifted, references.samples)
        value = _rotate(self.value_rotation, tokens.value)
        return replace(tokens, query=query, key=key, value=value, references=references)

    def rotate_back(self, output: GroupedQueries) -> GroupedQueries:
        """Return outputs of stored values in the model's own channels."""
        return output if self.value_rotation is None else self.value_rotation.inverse_rotate(output)

    def load_prompt(
        self,
        key: KVStates,
        value: KVStates,
        score: Tensor | None,
        positions: Int[Tensor, "#batch tokens"],
        references: References | None = None,
    ) -> None:
        """Compress the keys and values of a prompt, which a full cache has attended to, to the budget."""
        if references is not None:
            outputs = (references.output, references.own_output)
            output, own_output = (_rotate(self.value_rotation, states).float() for states in outputs)
            query = _rotate(self.key_rotation, references.query).float()
            references = replace(references, query=query, output=output, own_output=own_output)
        key, value = _rotate(self.key_rotation, key), _rotate(self.value_rotation, value)
        self._load_prompt(key, value, score, positions, references)

    def dequantize(self) -> None:
        """Read entries from a copy, until `drop_dequantized`, if reading converts them."""
        if not self.is_dequantized:
            self.keys, self.values = (
                DequantizedView(storage, self.num_slots) if storage.reads_copy else storage
                for storage in (self.keys, self.values)
            )
            self.is_dequantized = True

    def drop_dequantized(self) -> None:
        """Read entries as they are stored again."""
        self.keys, self.values = (
            storage.storage if isinstance(storage, DequantizedView) else storage for storage in (self.keys, self.values)
        )
        self.is_dequantized = False

    def read(self) -> tuple[KVStates, KVStates]:
        """Return the keys and values of all entries, in the channels of the storage."""
        keys, values = (self._read(part, storage) for part, storage in enumerate((self.keys, self.values)))
        return keys, values

    def _read(self, part: int, storage: Storage) -> KVStates:
        if not self._is_compiled(part):
            return storage.read(self.num_filled)
        return read_entries(
            self.addresses, part, (len(self.rows), len(self.budget.heads), self.num_filled, self.head_dim)
        )

    def _is_compiled(self, part: int) -> bool:
        """Whether the keys (0) or values (1) are read and replaced in compiled loops; dense ones gain nothing."""
        return (self.budget.key_bits, self.budget.value_bits)[part] < FULL_BITS and self._runs_compiled

    @property
    def _runs_compiled(self) -> bool:
        """Whether compiled loops may work on the entries."""
        has_table = len(self.addresses) > 0
        return self._can_compile and has_table and not (self.is_dequantized or torch.is_grad_enabled())

    @abstractmethod
    def _attend(self, tokens: NewTokens, params: AttentionParams) -> GroupedQueries:
        """Do what `attend` does, with tokens in the channels of the storage."""

    @abstractmethod
    def _load_prompt(
        self,
        key: KVStates,
        value: KVStates,
        score: Tensor | None,
        positions: Int[Tensor, "#batch tokens"],
        references: References | None,
    ) -> None:
        """Do what `load_prompt` does, with a prompt in the channels of the storage."""

    @abstractmethod
    def cached_positions(self) -> Int[Tensor, "#batch #heads entries"]:
        """Return the positions of the entries; negative if a slot is empty."""

    @abstractmethod
    def select_rows(self, rows: Int[Tensor, " rows"]) -> None:
        """Keep what is not among the tensors for these rows of the batch, in this order."""

    @abstractmethod
    def _state_specs(self) -> list[TensorSpec]:
        """Return the tensors that the entries need in addition to keys and values."""

    @abstractmethod
    def _bind_state(self, tensors: Iterator[Tensor]) -> None:
        """Take the tensors of `_state_specs`, in their order."""

    @abstractmethod
    def _describe_state(self, rows: Rows) -> None:
        """Write what is not common to all kinds of groups into their rows."""

    def _replace(self, key: KVStates, value: KVStates, slots: Int[Tensor, "#batch #heads retained"]) -> None:
        """Retain the entries at `slots`, which index the old entries followed by the new ones."""
        num_old, self.num_filled = self.num_filled, slots.shape[2]
        for part, (storage, new) in enumerate(((self.keys, key), (self.values, value))):
            if num_old and self._is_compiled(part):  # the first entries fit the codec
                heads = slots.expand(len(self.rows), len(self.budget.heads), -1)
                select_entries(self.addresses, part, heads, num_old, new)
            else:
                storage.select(slots, num_old, new)


def _rotation(
    split: BitSplit, template: KVStates, order: Int[Tensor, "heads head_dim"] | None = None
) -> HadamardRotation | None:
    """Return the rotation that makes channels of the same bits alike, or None if entries are not quantized."""
    if split[0][1] >= FULL_BITS:
        return None
    return HadamardRotation.of(tuple(channels for channels, _ in split), template, order)


def _rotate(rotation: HadamardRotation | None, entries: Tensor) -> Tensor:
    return entries if rotation is None else rotation.rotate(entries)


def _index(heads: tuple[int, ...], device: torch.device) -> slice | Int[Tensor, " heads"]:
    """Return a slice for adjacent heads, which copies nothing, else a tensor."""
    if heads == tuple(range(heads[0], heads[-1] + 1)):
        return slice(heads[0], heads[-1] + 1)
    return torch.tensor(heads, device=device)
