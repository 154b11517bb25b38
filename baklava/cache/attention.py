"""Attention over the entries of a budgeted cache, and its registration with transformers.

The query heads of one KV head are rows of one product, `[batch, heads, group, queries, head_dim]`, so keys and values
are never repeated. Positions decide what is visible: an entry is visible to the queries at or after its position.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import CacheLayerMixin
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask
from typing_extensions import override

from baklava.cache.rotary_shift import RotaryShift
from baklava.errors import UserError

ATTN_IMPLEMENTATION = "baklava"
QUERY_BLOCK_SIZE = 64
"""Queries per block if probabilities are materialised, which take group x block x entries numbers per KV head."""

MASKED_QUERY_BLOCK_SIZE = 256
"""Queries per block of fused attention with a mask, which is as large as their probabilities."""

TENSOR_OPTIONS = {"s_aux", "position_ids", "cache_position"}
"""Tensors that models give their attention in addition to a mask: learned sinks, and positions, which caches count."""

QueryStates = Float[Tensor, "batch query_heads queries head_dim"]
KVStates = Float[Tensor, "batch heads tokens head_dim"]
GroupedQueries = Float[Tensor, "batch heads group queries head_dim"]
Positions = Int[Tensor, "#batch #heads entries"]
AttentionProbs = Float[Tensor, "batch heads group queries entries"]

UNKNOWN_ROTATION = (
    "an attention layer of the model gives queries their positions in a way that baklava does not know, so they cannot "
    "be moved to the end of a prompt; load the model with baklava.load if something else loaded it, or choose a plan "
    "with another eviction method and without a fit"
)

_attention_hooks: list[Callable[..., None]] = []
_rotary_shifts: WeakKeyDictionary[torch.nn.Module, RotaryShift | None] = WeakKeyDictionary()


@dataclass(frozen=True)
class AttentionParams:
    """What a model's attention has in addition to the softmax of q·k: scale, logit softcap, learned sink logits.

    `fp32_precision` "bf16" rounds the factors of products in 32 bits if there are many tokens, as PyTorch calls it.
    `rotary_shift` moves queries to other positions; None if the layer's RoPE is not known.
    """

    scaling: float
    softcap: float | None = None
    sink_logits: Float[Tensor, " query_heads"] | None = None
    fp32_precision: str | None = None
    rotary_shift: RotaryShift | None = None

    @property
    def is_plain_softmax(self) -> bool:
        """Whether a fused kernel can compute it."""
        return self.softcap is None and self.sink_logits is None

    def apply_softcap(self, logits: Tensor) -> Tensor:
        """Return the logits within the softcap, if there is one."""
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap

    def for_heads(self, heads: slice | Int[Tensor, " heads"], group: int) -> "AttentionParams":
        """Return the parameters for some KV heads, each with `group` query heads."""
        if self.sink_logits is None:
            return self
        return replace(self, sink_logits=self.sink_logits.view(-1, group)[heads].flatten())


class BudgetedLayerBase(CacheLayerMixin):
    """A cache layer that computes its own attention: `update` attaches it to the keys that it returns.

    `pending_attend` says that the new tokens of a layer have yet to attend. After that, layers that share the keys may.
    """

    is_compileable = False
    is_croppable = False
    is_sliding = False
    supports_early_init = False

    def __init__(self) -> None:
        super().__init__()
        self.cumulative_length = 0
        self.pending_attend = False

    def attach(self, key: KVStates) -> KVStates:
        """Return the new keys with this layer as an attribute, which `attend` is due to store.

        A hack: transformers passes nothing but keys and values from a cache to the attention function.
        """
        key = key.view(key.shape)
        key.budgeted_layer = self  # type: ignore[attr-defined]
        self.pending_attend = True
        return key

    @abstractmethod
    def attend(
        self, query: QueryStates, key: KVStates, value: KVStates, padding: Tensor | None, params: AttentionParams
    ) -> QueryStates:
        """Return the output of new tokens per query head, and store them."""

    @override
    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def get_seq_length(self) -> int:
        """Return the tokens seen, not the entries cached: positions and masks are counted from it."""
        return self.cumulative_length

    @override
    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cumulative_length + query_length, 0

    @override
    def get_max_length(self) -> int:
        return -1


def register() -> None:
    """Make attn_implementation="baklava" known to transformers; safe to call again."""
    AttentionInterface.register(ATTN_IMPLEMENTATION, _forward)
    AttentionMaskInterface.register(ATTN_IMPLEMENTATION, _make_mask)


def register_rotary_shift(module: torch.nn.Module, shift: RotaryShift | None) -> None:
    """Let the attention of a layer know its RoPE; None if it is not understood."""
    _rotary_shifts[module] = shift


def rotary_shift_of(module: torch.nn.Module) -> RotaryShift | None:
    """Return the RoPE of an attention layer, or None if it is not known."""
    return _rotary_shifts.get(module)


def moves_all_queries(model: torch.nn.Module) -> bool:
    """Return whether the RoPE of every layer that was looked at is known, and some were."""
    shifts = [_rotary_shifts[module] for module in model.modules() if module in _rotary_shifts]
    return bool(shifts) and None not in shifts


@contextmanager
def attention_hook(hook: Callable[..., None]) -> Iterator[None]:
    """Call `hook(module, query, key, value, output, params)` after every attention of models run in this context."""
    _attention_hooks.append(hook)
    try:
        yield
    finally:
        _attention_hooks.remove(hook)


def _forward(
    module: torch.nn.Module,
    query: QueryStates,
    key: KVStates,
    value: KVStates,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    layer: BudgetedLayerBase | None = getattr(key, "budgeted_layer", None)
    _check_options(module, options)
    params = AttentionParams(
        options["scaling"],
        options.get("softcap"),
        options.get("s_aux"),
        _fp32_precision(module, query),
        rotary_shift_of(module),
    )
    if layer is None:
        output = _attend_dense(module, query, key, value, attention_mask, params, options)
    else:
        position_ids = options.get("position_ids") if attention_mask is None else None
        _check_continues(layer, query, options.get("use_cache"), position_ids)
        output = layer.attend(query, key, value, attention_mask, params).transpose(1, 2).contiguous()
    for hook in _attention_hooks:
        hook(module, query, key, value, output, params)
    return output, None


def _check_options(module: torch.nn.Module, options: dict[str, Any]) -> None:
    """Raise UserError if a model gives its attention a tensor that would be ignored, such as a bias by position."""
    unknown = [name for name, value in options.items() if isinstance(value, Tensor) and name not in TENSOR_OPTIONS]
    if unknown:
        raise UserError(
            f"{type(module).__name__} changes its attention by {' and '.join(unknown)}, which a budgeted cache does "
            "not support; choose another model"
        )


def _fp32_precision(module: torch.nn.Module, query: QueryStates) -> str | None:
    """Return "bf16" if this is a prompt and the weights of the projections have that precision."""
    if query.dtype != torch.float32 or query.shape[2] == 1:
        return None
    dtypes = (child.weight.dtype for child in module.children() if isinstance(child, torch.nn.Linear))
    return "bf16" if next(dtypes, None) == torch.bfloat16 else None


def _check_continues(
    layer: BudgetedLayerBase, query: QueryStates, use_cache: bool | None, position_ids: Tensor | None
) -> None:
    """Raise UserError if the model feeds its text again from the start, as generate() does without a cache.

    A look at the positions waits for a GPU. So it is left out for one token, and if the model says that it uses the
    cache. If it says that it does not, that may be the default of a layer (Cwm).
    """
    is_next = layer.pending_attend and layer.cumulative_length > 0
    if use_cache or position_ids is None or not is_next or query.shape[2] == 1:
        return
    if int(position_ids.flatten()[0]) == 0:
        raise UserError(
            f"a text is fed from its start to a cache that has seen {layer.cumulative_length} tokens, as it is without "
            "use_cache; set use_cache to True in the call and in the model's config, or reset the cache"
        )


def _attend_dense(
    module: torch.nn.Module,
    query: QueryStates,
    key: KVStates,
    value: KVStates,
    mask: Tensor | None,
    params: AttentionParams,
    options: dict[str, Any],
) -> Float[Tensor, "batch queries query_heads head_dim"]:
    """Return attention without a budgeted cache: transformers' own, with causality added to our padding mask."""
    if mask is not None and mask.dtype != torch.bool:
        raise UserError(
            "the model makes attention masks of its own, which a budgeted cache does not support; choose another model"
        )
    queries, entries = query.shape[2], key.shape[2]
    # Only a fused kernel over an unpadded prompt is causal by itself.
    if queries > 1 and not (params.is_plain_softmax and mask is None and queries == entries):
        rows = torch.arange(entries - queries, entries, device=query.device)[:, None]
        causal = torch.arange(entries, device=query.device) <= rows
        mask = causal[None, None] if mask is None else mask & causal
    if params.is_plain_softmax:
        return sdpa_attention_forward(module, query, key, value, mask, **options)[0]
    visible = None if mask is None else mask.expand(query.shape[0], 1, queries, entries)
    probs = attention_probs(split_gqa_groups(query, query.shape[1] // key.shape[1]), key, visible, params)
    return merge_gqa_groups(attend_values(probs, value)).transpose(1, 2)


def _make_mask(*args: Any, attention_mask: Tensor | None = None, local_size: int | None = None, **options: Any) -> Any:
    """Return transformers' own mask for sliding layers, and a view of the padding for others: they know positions."""
    if local_size is not None:
        options["allow_is_causal_skip"] = False
        return sdpa_mask(*args, attention_mask=attention_mask, local_size=local_size, **options)
    if options.get("mask_function", causal_mask_function) is not causal_mask_function:
        raise UserError(
            "the model asks for attention that is not causal (packed sequences or bidirectional prefixes), which a "
            "budgeted cache does not support; pass one sequence per row with its 2D attention mask"
        )
    if attention_mask is None or bool(attention_mask.all()):
        return None
    return attention_mask.bool()[:, None, None, :].expand(-1, 1, options["q_length"], -1)


def split_gqa_groups(query: QueryStates, group: int) -> GroupedQueries:
    """Return the query heads as rows of their KV head, of which each has `group`."""
    return query.unflatten(1, (query.shape[1] // group, group))


def merge_gqa_groups(output: GroupedQueries) -> QueryStates:
    """Return the inverse of `split_gqa_groups`."""
    return output.flatten(1, 2)


@dataclass(frozen=True)
class RingWindow:
    """Entries that a ring buffer has for a query: the first `sinks` tokens and the last `length`."""

    sinks: int
    length: int

    def slot(self, position: int) -> int:
        """Return the slot of the token at this position."""
        return position if position < self.sinks else self.sinks + (position - self.sinks) % self.length


@dataclass(frozen=True)
class CentroidEntries:
    """Entries that stand for evicted ones and are visible to every query; `bias` is added to their logits."""

    key: Float[Tensor, "batch heads centroids head_dim"]
    value: Float[Tensor, "batch heads centroids head_dim"]
    bias: Float[Tensor, "batch heads centroids"]

    def copy(self) -> "CentroidEntries":
        """Return the same in memory of their own."""
        return CentroidEntries(self.key.clone(), self.value.clone(), self.bias.clone())


def visibility_mask(
    query_positions: Int[Tensor, "#batch queries"], key_positions: Positions, window: RingWindow | None = None
) -> Bool[Tensor, "#batch #heads queries entries"]:
    """Return which entries each query attends to: no padding, nothing later, nothing outside its ring window."""
    rows, entries = query_positions[:, None, :, None], key_positions[:, :, None, :]
    visible = (entries >= 0) & (entries <= rows)
    if window is not None:
        visible &= (entries < window.sinks) | (entries > rows - window.length)
    return visible


def attention_probs(
    query: GroupedQueries,
    key: KVStates,
    visible: Bool[Tensor, "#batch #heads queries last"] | None,
    params: AttentionParams,
    centroids: CentroidEntries | None = None,
) -> AttentionProbs:
    """Return the probabilities that each query gives to each entry, centroids first.

    Args:
        query: Grouped queries.
        key: Keys of the entries, in the order of their slots.
        visible: Mask of the last entries; those before them are visible to every query. None hides nothing.
        params: What the model's attention has in addition.
        centroids: Entries that stand for evicted ones.
    """
    logits = _attention_logits(query, key, params)
    if centroids is not None:
        centroid_logits = _attention_logits(query, centroids.key, params)
        centroid_logits = centroid_logits + centroids.bias[:, :, None, None].to(logits.dtype)
        logits = torch.cat([centroid_logits, logits], -1)
    return masked_softmax(logits, visible, params)


def attend_blockwise(
    query: GroupedQueries,
    keys: Iterable[KVStates],
    values: Iterable[KVStates],
    visible: Bool[Tensor, "#batch #heads queries entries"] | None,
    params: AttentionParams,
) -> GroupedQueries:
    """Return the output over entries that come in blocks, such as stored ones that are dequantized on the way.

    Logits and sums are in 32 bits, as in a fused kernel: 16 bits would lose more precision than quantization does.
    """
    logits = torch.cat([_attention_logits(query.float(), key.float(), params) for key in keys], -1)
    probs, output, start = masked_softmax(logits, visible, params), torch.zeros_like(query, dtype=torch.float32), 0
    for value in values:
        stop = start + value.shape[2]
        output += attend_values(probs[..., start:stop], value.float())
        start = stop
    return output.to(query.dtype)


def _attention_logits(query: GroupedQueries, key: KVStates, params: AttentionParams) -> AttentionProbs:
    rows, columns = query.flatten(0, 1).flatten(1, 2), key.flatten(0, 1).transpose(1, 2)
    # The scale is part of the product: one pass less over the logits, and half-precision queries are not rounded.
    logits = torch.baddbmm(rows.new_empty(1, 1, 1), rows, columns, beta=0, alpha=params.scaling)
    return params.apply_softcap(logits).view(*query.shape[:4], -1)


def masked_softmax(logits: AttentionProbs, visible: Tensor | None, params: AttentionParams) -> AttentionProbs:
    """Return probabilities, with `visible` as in `attention_probs`. Changes the logits."""
    if visible is not None:
        # The lowest finite number, not -inf: a padding query sees nothing, and must not spread NaN.
        maskable = logits[..., logits.shape[-1] - visible.shape[-1] :]
        maskable.masked_fill_(~visible[:, :, None], torch.finfo(logits.dtype).min)
    if params.sink_logits is None:
        return torch.softmax(logits, -1)
    sinks = params.sink_logits.view(1, *logits.shape[1:3], 1, 1).expand(*logits.shape[:4], 1).to(logits.dtype)
    return torch.softmax(torch.cat([logits, sinks], -1), -1)[..., :-1].contiguous()


def attend_values(probs: AttentionProbs, value: KVStates, centroids: CentroidEntries | None = None) -> GroupedQueries:
    """Return the sums of values weighted by probabilities, those of the centroids first."""
    if centroids is not None:
        first = centroids.value.shape[2]
        return attend_values(probs[..., :first], centroids.value) + attend_values(probs[..., first:], value)
    return (probs.flatten(2, 3) @ value).unflatten(2, probs.shape[2:4])


def attend(
    query: GroupedQueries,
    key: KVStates,
    value: KVStates,
    query_positions: Int[Tensor, "#batch queries"],
    key_positions: Positions,
    params: AttentionParams,
    *,
    masked: bool = True,
    window: RingWindow | None = None,
    centroids: CentroidEntries | None = None,
) -> GroupedQueries:
    """Return the output of all queries over all entries, of which the last are the queries' own.

    Probabilities are never materialised for more than a block of queries.

    Args:
        query: Grouped queries.
        key: Keys of the entries.
        value: Values of the entries.
        query_positions: Position of each query.
        key_positions: Position of each entry; negative for padding and empty slots.
        params: What the model's attention has in addition.
        masked: False if positions hide nothing beyond causality: one query to which every entry is visible, or an
            unpadded prompt that attends to itself.
        window: What the ring buffer of each query would have.
        centroids: Entries that stand for evicted ones.
    """
    queries, entries = query.shape[3], key.shape[2]
    fused = params.is_plain_softmax and centroids is None
    if fused and not masked:
        return _attend_fused(query, key, value, None, params)
    block = MASKED_QUERY_BLOCK_SIZE if fused else QUERY_BLOCK_SIZE
    outputs = []
    for start in range(0, queries, block):
        stop = min(start + block, queries)
        reach = entries - queries + stop
        block_query, block_key, block_value = query[:, :, :, start:stop], key[:, :, :reach], value[:, :, :reach]
        visible = None
        if masked or queries > 1:
            visible = visibility_mask(query_positions[:, start:stop], key_positions[..., :reach], window)
        if fused:
            outputs.append(_attend_fused(block_query, block_key, block_value, visible, params))
        else:
            probs = attention_probs(block_query, block_key, visible, params, centroids)
            outputs.append(attend_values(probs, block_value, centroids))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 3)


def _attend_fused(
    query: GroupedQueries, key: KVStates, value: KVStates, visible: Tensor | None, params: AttentionParams
) -> GroupedQueries:
    group, queries = query.shape[2:4]
    if visible is None and queries > 1:
        if group > 1 and query.dtype.itemsize > 2:
            # In 32 bits no fused GPU kernel supports groups; the fallback materialises all probabilities. These are
            # views.
            key, value = (states.flatten(0, 1)[:, None].expand(-1, group, -1, -1) for states in (key, value))
            return sdpa(query.flatten(0, 1), key, value, is_causal=True, scale=params.scaling).view(query.shape)
        output = sdpa(merge_gqa_groups(query), key, value, is_causal=True, scale=params.scaling, enable_gqa=group > 1)
        return split_gqa_groups(output, group)
    mask = None if visible is None else visible[:, :, None].expand(-1, -1, group, -1, -1).flatten(2, 3)
    return sdpa(query.flatten(2, 3), key, value, attn_mask=mask, scale=params.scaling).view(query.shape)
