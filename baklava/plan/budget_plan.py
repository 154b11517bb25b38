"""The plan: a budget for every (layer, KV head), and everything needed to reproduce the cache that it describes."""

import hashlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import Field, JsonValue, PositiveInt, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from baklava.errors import UserError
from baklava.plan.geometry import (
    FULL_BITS,
    CacheGeometry,
    DenseBits,
    ModelIdentity,
    bit_split,
    full_cache_bytes,
    sliding_window_bytes,
    tensor_bytes,
    unbudgeted_bytes,
)
from baklava.serialization import FrozenModel, atomic_write_text

SCHEMA_VERSION: Final = 2
"""Version of the plan file; raised whenever a field changes its name or meaning."""

Bits = Literal[32, 16, 8, 6, 5, 4, 3, 2]
ParamValue = bool | int | float | str

ENTRY_STATE_BYTES = 8
"""Bytes of a scored entry in addition to its key and value: its position (int32) and its score (float32)."""

CENTROID_STATE_BYTES = 8
"""Bytes of a centroid in addition to its key and value: its weight and the entropy of its members (both float32)."""

LENGTH_MISMATCH = 4
"""A plan is not made for texts that are so many times as long, or as short."""


class LayerBudget(FrozenModel):
    """Budgets of one layer, one number per KV head.

    Keys and values in fewer than 16 bits are quantized, except for the sinks and the residual (`residual_length`).

    Attributes:
        tokens: capacity in entries.
        key_bits: bits per element of a key.
        value_bits: bits per element of a value.
    """

    tokens: tuple[PositiveInt, ...]
    key_bits: tuple[Bits, ...]
    value_bits: tuple[Bits, ...]

    @model_validator(mode="after")
    def _require_equal_lengths(self) -> "LayerBudget":
        if not len(self.tokens) == len(self.key_bits) == len(self.value_bits):
            raise ValueError("tokens, key_bits and value_bits must have one number per KV head")
        return self


FINITE_FLOAT16 = re.compile("([0-9a-f]{2}(?![7f][c-f])[0-9a-f]{2})+")
"""Little-endian float16 numbers, none of which is infinite or no number: then all bits of the exponent are set."""


class EvictionConfig(FrozenModel):
    """Which entries of a head stay.

    Attributes:
        method: name of a method of `baklava.eviction`.
        sinks: first tokens of a sequence, which are never evicted.
        recent_ratio: ratio of the capacity left by sinks and interval that goes to the newest tokens, which are never
            evicted.
        eviction_interval: tokens between two evictions. A head falls to its capacity minus the interval, then grows
            back.
        pooling: number of neighbouring entries over which scores are averaged before entries compete; 1 is none.
        residual_length: number of entries of a full head, its newest, that stay in 16 bits if it is quantized; 0
            for none. An eviction quantizes the oldest of them, so fewer by one interval remain after it. A ring buffer
            has none.
        centroids: per head, the number of 16-bit centroids that evicted entries are merged into; 0 drops them.
        fit_references: number of reference queries of a prompt to which the values that stay are fitted; 0 for none.
        fit_ridge: strength of the ridge that holds fitted values where they were.
        scored: whether the method keeps a position and a score per entry. The other methods are ring buffers.
        params: the method's own parameters.
    """

    method: str
    sinks: Annotated[int, Field(ge=0)] = 4
    recent_ratio: Annotated[float, Field(ge=0, le=1)] = 1.0
    eviction_interval: PositiveInt = 1
    pooling: PositiveInt = 1
    residual_length: Annotated[int, Field(ge=0)] = 0
    centroids: Annotated[int, Field(ge=0)] = 0
    fit_references: Annotated[int, Field(ge=0)] = 0
    fit_ridge: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 10.0
    scored: bool = False
    params: dict[str, ParamValue] = Field(default_factory=dict)

    def __hash__(self) -> int:
        params = frozenset(self.params.items())  # equal params may differ in their order
        return hash((self.method, self.sinks, self.recent_ratio, self.eviction_interval, params))

    @property
    def min_tokens(self) -> int:
        """Smallest capacity of a head: the sinks, the tokens of one interval or of the residual, and one more entry."""
        return self.sinks + max(self.eviction_interval, self.residual_length) + 1

    def full_precision_slots(self, tokens: int, slots: int) -> int:
        """Return how many of the first `slots` of a quantized head of capacity `tokens` stay in 16 bits."""
        return min(slots, self.sinks) + max(0, slots - (tokens - self.residual_length))


class AllocationConfig(FrozenModel):
    """How the budget was spread over the heads.

    Attributes:
        method: name of a method of `baklava.allocation`, or "full".
        budget: requested ratio of the bytes of the full cache.
        params: the method's parameters as plain data. A parameter that is itself a method is {"method", "params"}.
    """

    method: str
    budget: float
    params: dict[str, JsonValue] = Field(default_factory=dict)


class PrefillConfig(FrozenModel):
    """How prompts are processed.

    "dense": each layer attends to the whole prompt and is then compressed to its budget. Memory peaks at the plan plus
    one layer.
    "chunked": chunks of `chunk_size` tokens attend to the cached entries and to themselves. If the prompt is fed chunk
    by chunk, as `baklava.runtime.prefill` does, memory peaks at the plan plus one chunk. A forward over the whole
    prompt attends chunk by chunk as well, but computes the keys of a whole layer first. A last chunk no longer than
    the eviction interval is decoded.
    """

    mode: Literal["dense", "chunked"] = "dense"
    chunk_size: PositiveInt | None = None

    @model_validator(mode="after")
    def _require_chunk_size_iff_chunked(self) -> "PrefillConfig":
        if (self.mode == "chunked") != (self.chunk_size is not None):
            raise ValueError("chunked prefill needs a chunk_size in tokens; dense prefill takes none")
        return self

    @classmethod
    def in_chunks(cls, tokens: int | None) -> "PrefillConfig":
        """Return prefill in chunks of this many tokens, or dense prefill if None."""
        return cls() if tokens is None else cls(mode="chunked", chunk_size=tokens)


class Provenance(FrozenModel):
    """Where a plan comes from. Nothing in it changes what the cache does."""

    profile: str | None = None
    corpora: dict[str, str] = Field(default_factory=dict)
    seed: int | None = None
    scores: dict[str, float] = Field(default_factory=dict)
    versions: dict[str, str] = Field(default_factory=dict)
    created: str | None = None
    dtype: str | None = None
    """Precision of the model's products while the plan was scored."""


class BudgetPlan(FrozenModel):
    """A byte budget for every KV head of one model.

    Attributes:
        context_length: tokens at which `ratio` is stated.
        layers: budgets of each layer with full attention; None for the others.
        key_channels: per layer and KV head, its channels in descending order of importance to the attention, as two
            hexadecimal digits each. The first half takes more of the bits of a quantized key (see `bit_split`).
        sliding_bits: bits of the entries of sliding layers.
        score_predictors: per layer and KV head, float16 weights in hexadecimal digits, for eviction methods that
            predict scores (`baklava.cache.score_predictor`).
    """

    schema_version: Literal[2] = SCHEMA_VERSION
    model: ModelIdentity
    geometry: CacheGeometry
    context_length: PositiveInt
    eviction: EvictionConfig
    allocation: AllocationConfig
    prefill: PrefillConfig = PrefillConfig()
    provenance: Provenance = Provenance()
    layers: tuple[LayerBudget | None, ...]
    key_channels: tuple[tuple[str, ...] | None, ...] | None = None
    sliding_bits: DenseBits = 16
    score_predictors: tuple[tuple[str, ...] | None, ...] | None = None

    @model_validator(mode="before")
    @classmethod
    def _require_schema_version(cls, content: Any) -> Any:
        version = content.get("schema_version", SCHEMA_VERSION) if isinstance(content, dict) else SCHEMA_VERSION
        if version != SCHEMA_VERSION:
            raise PydanticCustomError(
                "schema_version",
                "schema_version is {found}, but this version of baklava reads version {expected}",
                {"found": repr(version), "expected": SCHEMA_VERSION},
            )
        return content

    @model_validator(mode="after")
    def _require_consistency(self) -> "BudgetPlan":
        geometry, chunk_size = self.geometry, self.prefill.chunk_size
        if chunk_size is not None and self.eviction.scored and chunk_size <= self.eviction.eviction_interval:
            raise ValueError(
                f"chunk_size is {chunk_size} tokens, but up to {self.eviction.eviction_interval} tokens at a time "
                "count as decoding; make chunks longer than the eviction interval"
            )
        if len(self.layers) != geometry.layers:
            raise ValueError(f"{len(self.layers)} layers for a model of {geometry.layers}")
        for index, (layer, window) in enumerate(zip(self.layers, geometry.windows, strict=True)):
            if (layer is None) != (window is not None):
                raise ValueError(f"layer {index}: every full-attention layer needs a budget, and no other layer")
            if layer is not None and len(layer.tokens) != geometry.kv_heads:
                raise ValueError(f"layer {index}: {len(layer.tokens)} budgets for {geometry.kv_heads} KV heads")
            if layer is not None and min(layer.tokens) < self.eviction.min_tokens:
                raise ValueError(
                    f"layer {index}: {min(layer.tokens)} entries, but {self.eviction.sinks} sinks, an eviction every "
                    f"{self.eviction.eviction_interval} tokens and a residual of {self.eviction.residual_length} need "
                    f"{self.eviction.min_tokens}"
                )
        _check_key_channels(self)
        _check_score_predictors(self)
        return self

    def with_prefill_chunk(self, tokens: int | None) -> "BudgetPlan":
        """Return this plan with prompts in chunks of this many tokens; as it is if None.

        Raises:
            UserError: the chunk is no longer than the eviction interval.
        """
        if tokens is None:
            return self
        try:
            return BudgetPlan.model_validate(self.model_dump() | {"prefill": PrefillConfig.in_chunks(tokens)})
        except ValidationError as error:
            raise UserError(error.errors()[0]["msg"].removeprefix("Value error, ")) from None

    @property
    def tokens(self) -> list[list[int]]:
        """Capacity in entries per layer and KV head; an empty row for a layer without a budget."""
        return [list(layer.tokens) if layer else [] for layer in self.layers]

    @property
    def bytes_per_sequence(self) -> int:
        """Bytes that one sequence keeps at most, at any length and at any moment."""
        return self.bytes_for(None)

    def bytes_for(self, max_tokens: int | None) -> int:
        """Return the bytes that a sequence of `max_tokens` reserves; they stop growing at the largest budget."""
        mixed_precision = self.key_channels is not None
        budgeted = sum(
            head_bytes(self.geometry, *head, self.eviction, mixed_precision, max_tokens)
            for layer in self.layers
            if layer
            for head in zip(layer.tokens, layer.key_bits, layer.value_bits, strict=True)
        )
        return budgeted + unbudgeted_bytes(self.geometry, self.sliding_bits, max_tokens)

    @property
    def full_bytes_per_sequence(self) -> int:
        """Bytes of the full cache in 16 bits at `context_length`."""
        return full_cache_bytes(self.geometry, self.context_length)

    @property
    def ratio(self) -> float:
        """Bytes over `full_bytes_per_sequence`, with sliding windows as full as they are at `context_length`."""
        windows, at_context = (
            sliding_window_bytes(self.geometry, self.sliding_bits, tokens) for tokens in (None, self.context_length)
        )
        return (self.bytes_per_sequence - windows + at_context) / self.full_bytes_per_sequence

    @property
    def max_lossless_tokens(self) -> int:
        """Length up to which no head evicts an entry. A scored head evicts below its capacity, by one interval."""
        smallest = min(tokens for row in self.tokens for tokens in row)
        return smallest - self.eviction.eviction_interval if self.eviction.scored else smallest

    @property
    def digest(self) -> str:
        """Hash of everything that changes what the cache does; equal plans have equal digests."""
        content = self.model_dump(mode="json", exclude={"provenance", "allocation"})
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]

    def length_warning(self, tokens: int) -> str | None:
        """Return what users should know if texts have this many tokens and the plan was made for far fewer or more."""
        made_for = f"the plan was made for texts of {self.context_length:,} tokens, and these may have {tokens:,}"
        if tokens >= LENGTH_MISMATCH * self.context_length:
            return f"{made_for}: heads keep no more entries there, so it loses more than on those"
        if self.context_length >= LENGTH_MISMATCH * tokens:
            return f"{made_for}: most heads keep all of their entries there, so it saves and loses little"
        return None

    def validate_for(self, identity: ModelIdentity, geometry: CacheGeometry) -> None:
        """Raise UserError if this plan was made for another model."""
        if (self.model.config_hash, self.geometry) != (identity.config_hash, geometry):
            raise UserError(
                f"the plan was made for {self.model.id} (config {self.model.config_hash}), not for {identity.id} "
                f"(config {identity.config_hash}); make a plan with baklava-search --model {identity.id}"
            )

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as JSON, atomically."""
        atomic_write_text(Path(path), self.model_dump_json(indent=1) + "\n")

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> "BudgetPlan":
        """Read a plan file.

        Raises:
            UserError: the file is missing, is not a plan, or has another schema version.
        """
        try:
            return cls.model_validate_json(Path(path).read_text())
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "not a text file"
            raise UserError(
                f"cannot read plan {path}: {reason}; give the plan.json of a search (commands also take a name: full, "
                "uniform:0.25)"
            ) from None
        except ValidationError as error:
            first = error.errors()[0]
            location = ".".join(map(str, first["loc"])) or "file"
            remedy = "give the unchanged plan.json of a search"
            if first["type"] == "extra_forbidden":
                remedy = "it was changed, or another version of baklava wrote it: search again with this one"
            elif first["type"] == "schema_version":
                remedy = "search again with this version, or use the version that wrote the plan"
            raise UserError(f"{path} is not a valid plan ({location}: {first['msg']}); {remedy}") from None


def full_cache_plan(
    identity: ModelIdentity, geometry: CacheGeometry, context_length: int, bits: DenseBits = 16
) -> BudgetPlan:
    """Return the plan that keeps every entry of a sequence of `context_length` tokens."""
    head_bits, sinks = (bits,) * geometry.kv_heads, min(4, max(0, context_length - 2))
    layer = LayerBudget(tokens=(context_length,) * geometry.kv_heads, key_bits=head_bits, value_bits=head_bits)
    return BudgetPlan(
        model=identity,
        geometry=geometry,
        context_length=context_length,
        eviction=EvictionConfig(method="streaming_llm", sinks=sinks),
        allocation=AllocationConfig(method="full", budget=bits / FULL_BITS),
        layers=geometry.spread([layer] * len(geometry.full_attention_layers), None),
        sliding_bits=bits,
    )


def head_bytes(
    geometry: CacheGeometry,
    tokens: int,
    key_bits: int,
    value_bits: int,
    eviction: EvictionConfig,
    mixed_precision: bool = False,
    max_tokens: int | None = None,
) -> int:
    """Return the maximum bytes of one KV head, including positions, scores and centroids if the method keeps them.

    Args:
        geometry: the model's KV cache.
        tokens: capacity of the head in entries.
        key_bits: bits per element of a key.
        value_bits: bits per element of a value.
        eviction: what the head keeps.
        mixed_precision: whether quantized keys give their important channels more bits.
        max_tokens: length that the sequence cannot exceed (None: any). Slots beyond it are never allocated.
    """
    slots, head_dim = tokens if max_tokens is None else min(tokens, max_tokens), geometry.head_dim
    dense = eviction.full_precision_slots(tokens, slots)
    keys, values = bit_split(head_dim, key_bits, mixed_precision), bit_split(head_dim, value_bits, False)
    payload = tensor_bytes(slots, keys, dense) + tensor_bytes(slots, values, dense)
    key_mean = head_dim * FULL_BITS // 8 if key_bits < FULL_BITS else 0
    centroids = eviction.centroids * (2 * head_dim * FULL_BITS // 8 + CENTROID_STATE_BYTES)
    return payload + key_mean + centroids + (slots * ENTRY_STATE_BYTES if eviction.scored else 0)


def _check_key_channels(plan: BudgetPlan) -> None:
    head_dim = plan.geometry.head_dim
    for index, orders in _rows_of_heads(plan, "key_channels", plan.key_channels):
        channels = [sorted(order[i : i + 2] for i in range(0, len(order), 2)) for order in orders]
        if channels != [[f"{channel:02x}" for channel in range(head_dim)]] * plan.geometry.kv_heads:
            raise ValueError(f"layer {index}: key_channels must order all {head_dim} channels of every KV head")


def _check_score_predictors(plan: BudgetPlan) -> None:
    kv_heads = plan.geometry.kv_heads
    for index, heads in _rows_of_heads(plan, "score_predictors", plan.score_predictors):
        is_equal = len(heads) == kv_heads and len({len(head) for head in heads}) == 1
        if not is_equal or any(FINITE_FLOAT16.fullmatch(head) is None for head in heads):
            raise ValueError(
                f"layer {index}: score_predictors must have the same number of hexadecimal digits, four a weight and "
                f"each weight finite, for each of {kv_heads} KV heads"
            )


def _rows_of_heads(
    plan: BudgetPlan, name: str, rows: tuple[tuple[str, ...] | None, ...] | None
) -> Iterator[tuple[int, tuple[str, ...]]]:
    """Yield the index and the strings of the heads of each layer with full attention, if the plan has such rows."""
    if rows is None:
        return
    if len(rows) != plan.geometry.layers:
        raise ValueError(f"{name} of {len(rows)} layers for a model of {plan.geometry.layers}")
    budgeted = plan.geometry.full_attention_layers
    if other := [index for index, row in enumerate(rows) if row is not None and index not in budgeted]:
        raise ValueError(f"{name} of layer {other[0]}, which has no budget")
    for index in budgeted:
        yield index, rows[index] or ()
