"""The shape of a model's KV cache, and the bytes that caches of this shape take."""

import copy
import hashlib
import json
from collections.abc import Iterable, Sequence
from typing import Any, Literal, TypeVar

from baklava.errors import UserError
from baklava.serialization import FrozenModel

Value = TypeVar("Value")

HeadShape = tuple[int, int]
"""Number of KV heads of a layer, and the channels of each."""

_SHAPING_FIELDS = (
    "model_type",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_size",
    "vocab_size",
    "rope_parameters",
    "sliding_window",
    "layer_types",
    "kv_sharing_modes",
)


class ModelIdentity(FrozenModel):
    """Which model a plan was made for.

    Attributes:
        revision: commit of the hub, or content hash of the demo model, if known.
        config_hash: hash of the config fields that shape the cache. A model of another shape rejects the plan even
            under the same name; a fine-tune accepts the plan of its base model.
    """

    id: str
    revision: str | None = None
    config_hash: str

    @classmethod
    def from_config(cls, config: Any, id: str, revision: str | None = None) -> "ModelIdentity":
        """Return the identity of a transformers config."""
        text_config = config.get_text_config(decoder=True)
        shaping = {field: _field(text_config, field) for field in _SHAPING_FIELDS}
        digest = hashlib.sha256(json.dumps(shaping, sort_keys=True, default=str).encode()).hexdigest()
        return cls(id=id, revision=revision, config_hash=digest[:16])


class CacheGeometry(FrozenModel):
    """The (layer, KV head) grid of a model.

    Attributes:
        query_group: number of query heads that share one KV head.
        windows: per layer, None for full attention, the tokens of a sliding window, or 0 for a layer without attention.
            Only layers with full attention get a budget; transformers bounds the others itself.
        states: per layer, the numbers of each of its states: those of a recurrence or a convolution, which do not grow
            with the text. Empty if no layer has one.
        sliding_heads: the KV heads of the layers with a sliding window, if they have others than those with full
            attention.
        kv_sharing_targets: per layer, the layer whose keys and values it reads instead of having its own. Empty if no
            layer does.
    """

    layers: int
    kv_heads: int
    query_group: int
    head_dim: int
    windows: tuple[int | None, ...]
    states: tuple[tuple[int, ...], ...] = ()
    sliding_heads: HeadShape | None = None
    kv_sharing_targets: tuple[int | None, ...] = ()

    @property
    def query_heads(self) -> int:
        """Query heads per layer."""
        return self.kv_heads * self.query_group

    @property
    def full_attention_layers(self) -> tuple[int, ...]:
        """Indices of the layers with full attention."""
        return tuple(layer for layer, window in enumerate(self.windows) if window is None)

    @property
    def num_attending_layers(self) -> int:
        """Layers that attend, to keys and values of their own or to those of others."""
        return sum(window != 0 for window in self.windows) + len(self.shared_layers)

    @property
    def shared_layers(self) -> tuple[int, ...]:
        """The layer whose keys and values it reads, for each layer that has none of its own."""
        return tuple(target for target in self.kv_sharing_targets if target is not None)

    def kv_layer(self, layer: int) -> int:
        """Return the layer whose keys and values this one reads: itself, or the one that it shares."""
        target = self.kv_sharing_targets[layer] if self.kv_sharing_targets else None
        return layer if target is None else target

    def head_shape(self, layer: int) -> HeadShape:
        """Return the KV heads of a layer that stores keys and values, and the channels of each."""
        own = self.kv_heads, self.head_dim
        return (self.sliding_heads or own) if self.windows[layer] else own

    @property
    def unbudgeted(self) -> str:
        """What the model keeps beside the layers with full attention, in words."""
        kinds = {"sliding windows": any(self.windows), "recurrent states": bool(self.states)}
        return " and ".join(kind for kind, exists in kinds.items() if exists)

    def spread(self, values: Iterable[Value], other: Value) -> tuple[Value, ...]:
        """Return a value per layer: those of the layers with full attention, in order, and `other` for the rest."""
        given = iter(values)
        return tuple(next(given) if window is None else other for window in self.windows)

    @classmethod
    def from_config(cls, config: Any) -> "CacheGeometry":
        """Return the geometry of a transformers config.

        Raises:
            UserError: no layer has full attention, layers of a kind differ in shape, or a layer has no KV cache to
                budget.
        """
        config = config.get_text_config(decoder=True)
        if _field(config, "kv_lora_rank"):
            raise UserError(
                f"{config.model_type} has a latent cache, from which it makes its keys anew, so there are no KV heads "
                "to budget; choose another model"
            )
        kinds, windows = _layer_kinds(config)
        if None not in windows:
            present = sorted({kind.replace("_", " ") for kind in kinds} - {"dummy"})
            raise UserError(
                f"{config.model_type} has {len(windows)} layers of {' and '.join(present)} and none with full "
                "attention, so there is nothing to budget; choose a model with full-attention layers"
            )
        if _STATEFUL & set(kinds):
            heads, shapes, states = _probe_states(config, windows)
        else:
            heads, shapes = _heads(config, windows)
            states = ()
        (kv_heads, head_dim), sliding_heads = _shapes_by_kind(config, shapes)
        return cls(
            layers=len(windows),
            kv_heads=kv_heads,
            query_group=heads // kv_heads,
            head_dim=head_dim,
            windows=windows,
            states=states,
            sliding_heads=sliding_heads,
            kv_sharing_targets=_kv_sharing_targets(config),
        )


ShapesByKind = dict[bool, set[HeadShape]]
"""The shapes of the layers with full attention, and of those with a sliding window (True)."""


def _heads(config: Any, windows: Sequence[int | None]) -> tuple[int, ShapesByKind]:
    """Return the query heads of a layer with full attention, and the shapes of the layers that store keys."""
    query_heads, shapes = set(), ShapesByKind()
    for layer, window in zip(config.per_layer_config, windows, strict=True):
        if window == 0:
            continue
        if (heads := _layer_heads(layer)) is None:
            raise UserError(
                f"{config.model_type} has no attention heads, so no KV cache to budget; choose another model"
            )
        shapes.setdefault(window is not None, set()).add(heads[1:])
        if window is None:
            query_heads.add(heads[0])
    if len(query_heads) > 1:
        raise UserError(
            f"{config.model_type} has layers of {sorted(query_heads)} query heads; baklava budgets models whose layers "
            "with full attention have the same; choose another model"
        )
    return query_heads.pop(), shapes


def _shapes_by_kind(config: Any, shapes: ShapesByKind) -> tuple[HeadShape, HeadShape | None]:
    """Return the shape of all layers with full attention, and that of the sliding ones if it is another."""
    for same_kind in shapes.values():
        if len(same_kind) > 1:
            raise UserError(
                f"{config.model_type} has KV heads of different shapes {sorted(same_kind)} in layers of one kind, or "
                "in keys and values; baklava budgets models whose layers with full attention share one (KV heads, "
                "head_dim), as do those with sliding windows; choose another model"
            )
    (full,), sliding = shapes[False], next(iter(shapes.get(True, ())), None)
    return full, None if sliding == full else sliding


def _kv_sharing_targets(config: Any) -> tuple[int | None, ...]:
    """Return the layer that each layer shares: the last one of its kind that stores keys for others."""
    modes = getattr(config, "kv_sharing_modes", None) or ()
    if "reuse" not in modes:
        return ()
    layers = list(zip(config.layer_types, modes, strict=True))
    stored = {kind: layer for layer, (kind, mode) in enumerate(layers) if mode == "store"}
    return tuple(stored[kind] if mode == "reuse" else None for kind, mode in layers)


def _layer_heads(config: Any) -> tuple[int, int, int] | None:
    """Return query heads, KV heads and head_dim of one layer's config."""
    heads = getattr(config, "num_attention_heads", None)
    if not heads:
        return None
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    return heads, kv_heads, getattr(config, "head_dim", None) or config.hidden_size // heads


def _field(config: Any, name: str) -> Any:
    """Return a field of a config, None if it is missing, or its values per layer if they differ."""
    try:
        return getattr(config, name, None)
    except RuntimeError:
        return [getattr(layer, name, None) for layer in config.per_layer_config]


_STATEFUL = {"linear_attention", "conv", "hybrid", "hybrid_sliding"}
"""Types of layers with a state; the hybrid ones attend as well."""

_LAYER_TYPES = {"full_attention", "sliding_attention", "dummy"} | _STATEFUL


def _layer_kinds(config: Any) -> tuple[list[str], tuple[int | None, ...]]:
    """Return what each layer is, as transformers calls it, and its window."""
    # transformers owns the rule for what a layer is; it is imported here so that light processes never load it.
    from transformers.cache_utils import get_layer_types_and_kwargs

    types, kwargs = get_layer_types_and_kwargs(config)
    if unknown := sorted(set(types) - _LAYER_TYPES):
        raise UserError(
            f"{config.model_type} has layers of type {', '.join(unknown)}, but baklava serves only full, sliding and "
            "linear attention and convolutions; choose another model"
        )
    without_attention = ("linear_attention", "conv", "dummy")
    windows = [
        0 if kind in without_attention else layer.get("sliding_window")
        for kind, layer in zip(types, kwargs, strict=True)
    ]
    return types, tuple(windows)


def _probe_states(config: Any, windows: Sequence[int | None]) -> tuple[int, ShapesByKind, tuple[tuple[int, ...], ...]]:
    """Return query heads, shapes of keys, and the sizes of the states: what a forward without weights caches."""
    import torch
    from transformers import AutoModelForCausalLM, DynamicCache

    config = copy.deepcopy(config)  # a model writes into its config
    try:
        with torch.device("meta"), torch.no_grad():
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="eager").eval()
            cache = DynamicCache(config=config)
            model(torch.zeros(1, 1, dtype=torch.long), past_key_values=cache, use_cache=True)
    except ValueError as error:
        raise UserError(
            f"{config.model_type} keeps its states in no cache that can be replaced ({error}); choose another model"
        ) from None
    except (RuntimeError, TypeError) as error:
        raise UserError(
            f"{config.model_type} does not run on shapes alone ({str(error).splitlines()[0]}), so the size of its "
            "states is unknown; choose another model"
        ) from None
    states, shapes = [], ShapesByKind()
    for index, (layer, window) in enumerate(zip(cache.layers, windows, strict=True)):
        conv, recurrent = (getattr(layer, name, {}) for name in ("conv_states", "recurrent_states"))
        sizes = [sum(part.numel() for part in (conv[number], recurrent[number]) if part is not None) for number in conv]
        if conv and not all(sizes):
            raise UserError(
                f"layer {index} of {config.model_type} keeps its state outside of the cache, where rows, copies and "
                "prefixes cannot take it along; choose another model"
            )
        states.append(tuple(sizes))
        if window != 0:
            for entries in (layer.keys, layer.values):
                shapes.setdefault(window is not None, set()).add((entries.shape[1], entries.shape[3]))
    return config.num_attention_heads, shapes, tuple(states)


BitSplit = tuple[tuple[int, int], ...]
"""How the channels of a key or value are stored: pairs of (number of channels, bits), the most important first."""

DenseBits = Literal[32, 16]

STATE_BYTES = 4
"""Bytes of a number of a state: models keep them in float32, whatever else they compute in."""

FULL_BITS = 16
"""Bits of an element of the full cache that a ratio refers to."""

SCALE_BYTES = 2
"""Bytes of the float16 scale of a quantized key or value, or of each part of it that has its own bits."""

MIXED_PRECISION_BELOW_BITS = 8
"""Keys in fewer bits than this are stored in mixed precision if the order of their channels is known."""


def supports_mixed_precision(head_dim: int) -> bool:
    """Return whether the channels of a key can be stored as two halves, and named in two hexadecimal digits.

    Halves that are rotated in blocks of fewer than 16 channels lose more than mixed precision gains (8, at 112
    channels: twice the error of one precision).
    """
    return head_dim % 32 == 0 and head_dim <= 256


def bit_split(head_dim: int, bits: int, mixed_precision: bool) -> BitSplit:
    """Return how a quantized key or value of `bits` per channel divides them among its channels.

    In mixed precision the more important half takes one bit more and the other one bit less, if half of the channels
    fill whole bytes and no channel needs more than 8 bits.
    """
    half = head_dim // 2
    if mixed_precision and bits < MIXED_PRECISION_BELOW_BITS and supports_mixed_precision(head_dim):
        return ((half, bits + 1), (half, bits - 1))
    return ((head_dim, bits),)


def tensor_bytes(tokens: int, split: BitSplit, dense: int) -> int:
    """Return the bytes of the keys, or of the values, of one KV head.

    Args:
        tokens: number of entries.
        split: bits of the channels of each entry.
        dense: number of entries among `tokens` that stay in 16 bits although the others are quantized.
    """
    head_dim = sum(channels for channels, _ in split)
    if split[0][1] >= FULL_BITS:
        return tokens * head_dim * split[0][1] // 8
    packed = sum(channels * bits // 8 + SCALE_BYTES for channels, bits in split)
    return dense * head_dim * FULL_BITS // 8 + (tokens - dense) * packed


def full_cache_bytes(geometry: CacheGeometry, context_length: int) -> int:
    """Return the bytes of transformers' own cache of one sequence in 16 bits; states count 32."""
    entries = len(geometry.full_attention_layers) * geometry.kv_heads * context_length
    payload = entries * 2 * geometry.head_dim * FULL_BITS // 8
    return payload + unbudgeted_bytes(geometry, FULL_BITS, context_length)


def unbudgeted_bytes(geometry: CacheGeometry, bits: int, max_tokens: int | None = None) -> int:
    """Return the bytes of all that has no budget: sliding windows with entries in `bits`, and states.

    Args:
        geometry: the model's cache.
        bits: bits of the entries of sliding layers.
        max_tokens: length that the sequence cannot exceed (None: any).
    """
    states = STATE_BYTES * sum(sum(sizes) for sizes in geometry.states)
    return sliding_window_bytes(geometry, bits, max_tokens) + states


def sliding_window_bytes(geometry: CacheGeometry, bits: int, max_tokens: int | None = None) -> int:
    """Return the bytes of the sliding layers of one sequence of at most `max_tokens` (None: of any length)."""
    kv_heads, head_dim = geometry.sliding_heads or (geometry.kv_heads, geometry.head_dim)
    windows = [window for window in geometry.windows if window is not None]
    entries = sum(window if max_tokens is None else min(window, max_tokens) for window in windows)
    return entries * kv_heads * 2 * head_dim * bits // 8
