"""The plan: a budget for every (layer, KV head), and all that is needed to reproduce the cache that lives inside it."""

import hashlib
import json
import os
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, PositiveInt, ValidationError, model_validator

from baklava.errors import UserError
from baklava.plan.byte_accounting import FULL_BITS, DenseBits, full_cache_bytes, bit_split, tensor_bytes, sliding_window_bytes
from baklava.plan.geometry import CacheGeometry, ModelIdentity
from baklava.serialization import FrozenModel, atomic_write_text

Bits = Literal[32, 16, 8, 6, 5, 4, 3, 2]
ParamValue = bool | int | float | str

ENTRY_STATE_BYTES = 8
"""Bytes beside the payload of an entry that is scored: its position (int32) and its score (float32)."""

CENTROID_STATE_BYTES = 8
"""Bytes beside the key and the value of a centroid: what its members weigh, and their entropy (both float32)."""


class LayerBudget(FrozenModel):
    """Budgets of one layer, a number per KV head: `tokens` is the capacity in entries, bits are per stored element.

    Fewer than 16 bits are packed, but for the sinks, which stay in 16, and the entries that are staged.
    """

    tokens: tuple[PositiveInt, ...]
    key_bits: tuple[Bits, ...]
    value_bits: tuple[Bits, ...]

    @model_validator(mode="after")
    def _same_heads(self) -> "LayerBudget":
        if not len(self.tokens) == len(self.key_bits) == len(self.value_bits):
            raise ValueError("tokens, key_bits and value_bits must have one number per KV head")
        return self


class EvictionChoice(FrozenModel):
    """Which entries stay: a method of `baklava.eviction` with its knobs.

    `sinks` first tokens and a share `recent` of the remaining capacity for the newest tokens are never evicted.
    Eviction runs every `interval` tokens, so a head falls to capacity - interval entries and grows back. Scores are
    averaged over the `pooling` entries around each before they compete. `scored` methods keep a position and a score
    beside each entry; the others are rings. Where entries are packed, `staged` keeps the tokens since the last
    eviction in 16 bits, once a head is full; a ring packs each as it comes. What a head evicts is merged into so many
    `centroids` per head, in 16 bits; 0 forgets it.
    """

    method: str
    sinks: Annotated[int, Field(ge=0)] = 4
    recent: Annotated[float, Field(ge=0, le=1)] = 1.0
    interval: PositiveInt = 1
    pooling: PositiveInt = 1
    staged: bool = False
    centroids: Annotated[int, Field(ge=0)] = 0
    scored: bool = False
    knobs: dict[str, ParamValue] = Field(default_factory=dict)

    @property
    def minimum_tokens(self) -> int:
        """Fewest entries that a head can live with: the sinks, the slack of one interval, and one more."""
        return self.sinks + self.interval + 1

    def dense_slots(self, tokens: int, slots: int) -> int:
        """Of the first slots of a packed head of this capacity, those in 16 bits: the sinks, and what is staged."""
        staged = slots - (tokens - self.interval) if self.staged else 0
        return min(slots, self.sinks) + max(0, staged)


class AllocationChoice(FrozenModel):
    """How the budget was spread: a method of `baklava.allocation`, its knobs, and the ratio of bytes asked for."""

    method: str
    budget: float
    knobs: dict[str, ParamValue] = Field(default_factory=dict)


class Prefill(FrozenModel):
    """How prompts enter the cache.

    "dense": each layer attends to the whole prompt, then is cut to its budget; memory peaks at the plan plus one layer.
    "chunked": `chunk` tokens at a time attend to what is kept and to themselves. Fed chunk by chunk, as
    `baklava.runtime.prefill` does, memory peaks at the plan plus one chunk; a forward that brings the whole prompt
    attends chunk by chunk as well, but has made the keys of a whole layer. A last chunk no longer than the interval
    is decoded.
    """

    mode: Literal["dense", "chunked"] = "dense"
    chunk: PositiveInt | None = None

    @model_validator(mode="after")
    def _chunk_belongs_to_chunked(self) -> "Prefill":
        if (self.mode == "chunked") != (self.chunk is not None):
            raise ValueError("a chunked prefill needs its chunk in tokens, a dense one has none")
        return self


class Provenance(FrozenModel):
    """Where a plan comes from; nothing here changes what the cache does."""

    profile: str | None = None
    corpora: dict[str, str] = Field(default_factory=dict)
    seed: int | None = None
    scores: dict[str, float] = Field(default_factory=dict)
    versions: dict[str, str] = Field(default_factory=dict)
    created: str | None = None


class BudgetPlan(FrozenModel):
    """A byte budget for every KV head of one model.

    The ratio is stated at `context_length` tokens: everything that a sequence keeps between two forward passes, over
    the bytes of the full cache in 16 bits. `layers[i]` is None where layer i slides: it keeps its window of tokens in
    `sliding_bits`. `key_channels[i][h]` has the channels of KV head h of layer i as two hexadecimal digits each, those
    first that matter most to its attention: they get more of the bits of a packed key (see `grades`).
    """

    schema_version: Literal[1] = 1
    model: ModelIdentity
    geometry: CacheGeometry
    context_length: PositiveInt
    eviction: EvictionChoice
    allocation: AllocationChoice
    prefill: Prefill = Prefill()
    provenance: Provenance = Provenance()
    layers: tuple[LayerBudget | None, ...]
    key_channels: tuple[tuple[str, ...] | None, ...] | None = None
    sliding_bits: DenseBits = 16

    @model_validator(mode="after")
    def _covers_the_grid(self) -> "BudgetPlan":
        geometry, chunk = self.geometry, self.prefill.chunk
        if chunk is not None and self.eviction.scored and chunk <= self.eviction.interval:
            raise ValueError(
                f"chunks of {chunk} tokens, but up to {self.eviction.interval} tokens at a time count as decoding; "
                "make the chunk longer than the interval"
            )
        if len(self.layers) != geometry.layers:
            raise ValueError(f"{len(self.layers)} layers for a model of {geometry.layers}")
        for index, (layer, window) in enumerate(zip(self.layers, geometry.windows, strict=True)):
            if (layer is None) != (window is not None):
                raise ValueError(f"layer {index}: a budget belongs to full-attention layers, and to each of them")
            if layer is not None and len(layer.tokens) != geometry.kv_heads:
                raise ValueError(f"layer {index}: {len(layer.tokens)} budgets for {geometry.kv_heads} KV heads")
            if layer is not None and min(layer.tokens) < self.eviction.minimum_tokens:
                raise ValueError(
                    f"layer {index}: {min(layer.tokens)} entries, but {self.eviction.sinks} sinks and an eviction "
                    f"every {self.eviction.interval} tokens need {self.eviction.minimum_tokens}"
                )
        _check_channels(self)
        return self

    @property
    def tokens(self) -> list[list[int]]:
        """Capacity in entries per (layer, KV head); an empty row where a layer slides."""
        return [list(layer.tokens) if layer else [] for layer in self.layers]

    @property
    def bytes_per_sequence(self) -> int:
        """Most bytes that one sequence keeps between two forward passes."""
        return self.bytes_for(None)

    def bytes_for(self, max_tokens: int | None) -> int:
        """Most bytes that a sequence of at most so many tokens keeps; from the largest budget on the same for all."""
        budgeted = sum(self._layer_bytes(layer, max_tokens) for layer in self.layers if layer)
        return budgeted + sliding_window_bytes(self.geometry, self.sliding_bits, max_tokens)

    @property
    def full_bytes_per_sequence(self) -> int:
        """Bytes of the full cache in 16 bits at `context_length`."""
        return full_cache_bytes(self.geometry, self.context_length)

    @property
    def ratio(self) -> float:
        """`bytes_per_sequence` over `full_bytes_per_sequence`; lower is smaller."""
        return self.bytes_per_sequence / self.full_bytes_per_sequence

    @property
    def lossless_tokens(self) -> int:
        """Tokens up to which no head loses an entry; where methods score, an eviction goes below the capacity."""
        smallest = min(tokens for row in self.tokens for tokens in row)
        return smallest - self.eviction.interval if self.eviction.scored else smallest

    @property
    def digest(self) -> str:
        """Hash of everything that changes what the cache does; equal plans have equal digests."""
        content = self.model_dump(mode="json", exclude={"provenance", "allocation"})
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]

    def _layer_bytes(self, layer: LayerBudget, room: int | None) -> int:
        heads = zip(layer.tokens, layer.key_bits, layer.value_bits, strict=True)
        graded = self.key_channels is not None
        return sum(head_bytes(self.geometry, tokens, k, v, self.eviction, graded, room) for tokens, k, v in heads)

    def check_fits(self, identity: ModelIdentity, geometry: CacheGeometry) -> None:
        """Raise UserError when this plan was made for another model."""
        if (self.model.config_hash, self.geometry) != (identity.config_hash, geometry):
            raise UserError(
                f"the plan was made for {self.model.id} (config {self.model.config_hash}), not for {identity.id} "
                f"(config {identity.config_hash}); make a plan with jobs/search.py --model {identity.id}"
            )

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as JSON, whole or not at all."""
        atomic_write_text(Path(path), self.model_dump_json(indent=1) + "\n")

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> "BudgetPlan":
        """Read a plan file; raises UserError when it is missing or is not a plan."""
        try:
            return cls.model_validate_json(Path(path).read_text())
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "not a text file"
            raise UserError(f"cannot read plan {path}: {reason}; give the plan.json of a search") from None
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "file"
            remedy = "give the unchanged plan.json of a search"
            if first["type"] == "extra_forbidden":
                remedy = "it was changed, or another version of baklava wrote it: search again with this one"
            raise UserError(f"{path} is not a valid plan ({where}: {first['msg']}); {remedy}") from None


def full_plan(
    identity: ModelIdentity, geometry: CacheGeometry, context_length: int, bits: DenseBits = 16
) -> BudgetPlan:
    """The plan that keeps every entry of a sequence of `context_length` tokens."""
    same, sinks = (bits,) * geometry.kv_heads, min(4, max(0, context_length - 2))
    layer = LayerBudget(tokens=(context_length,) * geometry.kv_heads, key_bits=same, value_bits=same)
    return BudgetPlan(
        model=identity,
        geometry=geometry,
        context_length=context_length,
        eviction=EvictionChoice(method="streaming", sinks=sinks),
        allocation=AllocationChoice(method="full", budget=bits / FULL_BITS),
        layers=tuple(layer if window is None else None for window in geometry.windows),
        sliding_bits=bits,
    )


def _check_channels(plan: BudgetPlan) -> None:
    if plan.key_channels is None:
        return
    head_dim = plan.geometry.head_dim
    if len(plan.key_channels) != plan.geometry.layers:
        raise ValueError(f"key_channels of {len(plan.key_channels)} layers for a model of {plan.geometry.layers}")
    for index in plan.geometry.budgetable:
        named = [sorted(order[i : i + 2] for i in range(0, len(order), 2)) for order in plan.key_channels[index] or ()]
        if named != [[f"{channel:02x}" for channel in range(head_dim)]] * plan.geometry.kv_heads:
            raise ValueError(f"layer {index}: key_channels must order all {head_dim} channels of every KV head")


def head_bytes(
    geometry: CacheGeometry,
    tokens: int,
    key_bits: int,
    value_bits: int,
    eviction: EvictionChoice,
    mixed_precision: bool = False,
    room: int | None = None,
) -> int:
    """Most bytes that one KV head of this capacity holds, with positions, scores and centroids where they are kept.

    `room` is the most tokens that the sequence will have: slots behind them are never held.
    """
    slots, head_dim = tokens if room is None else min(tokens, room), geometry.head_dim
    dense = eviction.dense_slots(tokens, slots)
    keys, values = bit_split(head_dim, key_bits, mixed_precision), bit_split(head_dim, value_bits, False)
    payload = tensor_bytes(slots, keys, dense) + tensor_bytes(slots, values, dense)
    mean = head_dim * FULL_BITS // 8 if key_bits < FULL_BITS else 0
    centroids = eviction.centroids * (2 * head_dim * FULL_BITS // 8 + CENTROID_STATE_BYTES)
    return payload + mean + centroids + (slots * ENTRY_STATE_BYTES if eviction.scored else 0)
