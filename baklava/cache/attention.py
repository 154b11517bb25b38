"""Attention over budgeted entries, and its registration with transformers.

Query heads of one KV head are rows of one product, `[batch, heads, group, queries, head_dim]`, so that no key or value
is ever repeated. Everything is decided by positions: an entry is seen by the queries at or after its position.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import CacheLayerMixin
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask
from typing_extensions import override

from baklava.errors import UserError

ATTN_IMPLEMENTATION = "baklava"
QUERY_BLOCK_SIZE = 64
"""Queries per block where probabilities are materialised: per KV head they take group x block x entries."""

MASKED_QUERY_BLOCK_SIZE = 256
"""Queries per block of fused attention with a mask, which is as large as their probabilities."""

QueryStates = Float[Tensor, "batch query_heads queries head_dim"]
KVStates = Float[Tensor, "batch heads tokens head_dim"]
GroupedQueries = Float[Tensor, "batch heads group queries head_dim"]
Positions = Int[Tensor, "#batch #heads entries"]
AttentionProbs = Float[Tensor, "batch heads group queries entries"]

_attention_hooks: list[Callable[..., None]] = []
"""Who watches now. A plain list, because compilers follow lists and not context variables."""


@dataclass(frozen=True)
class AttentionParams:
    """What a model's attention does beside the softmax of q·k: scale, logit softcap, learned sink logits."""

    scaling: float
    softcap: float | None = None
    sink_logits: Float[Tensor, " query_heads"] | None = None

    @property
    def is_plain_softmax(self) -> bool:
        """Whether a fused kernel computes it."""
        return self.softcap is None and self.sink_logits is None

    def apply_softcap(self, logits: Tensor) -> Tensor:
        """Logits inside the softcap, if there is one."""
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap

    def for_heads(self, heads: slice | Int[Tensor, " heads"], group: int) -> "AttentionParams":
        """The kernel of some KV heads of the layer."""
        if self.sink_logits is None:
            return self
        return AttentionParams(self.scaling, self.softcap, self.sink_logits.view(-1, group)[heads].flatten())


class BudgetedLayerBase(CacheLayerMixin):
    """A cache layer that computes its own attention: `update` attaches it to the keys that it returns."""

    is_compileable = False
    is_croppable = False
    is_sliding = False
    supports_early_init = False

    def __init__(self) -> None:
        super().__init__()
        self.cumulative_length = 0

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
    AttentionMaskInterface.register(ATTN_IMPLEMENTATION, _mask)


def attach_layer(key: KVStates, layer: BudgetedLayerBase) -> KVStates:
    """The keys with their layer on them: the only way from a cache to the attention function that transformers has."""
    key = key.view(key.shape)
    key.budgeted_layer = layer  # type: ignore[attr-defined]
    return key


@contextmanager
def attention_hook(hook: Callable[..., None]) -> Iterator[None]:
    """Call `watcher(module, query, key, value, output, kernel)` after every attention of models run in this context."""
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
    if layer is None:
        output = _dense(module, query, key, value, attention_mask, **options)
    else:
        output = layer.attend(query, key, value, attention_mask, _attention_params(options)).transpose(1, 2)
    for hook in _attention_hooks:
        hook(module, query, key, value, output, _attention_params(options))
    return output, None


def _dense(
    module: torch.nn.Module, query: QueryStates, key: KVStates, value: KVStates, mask: Tensor | None, **options: Any
) -> Float[Tensor, "batch queries query_heads head_dim"]:
    """Attention without a budgeted cache: transformers' own, with causality put back into our padding mask."""
    params, queries, entries = _attention_params(options), query.shape[2], key.shape[2]
    # Only a fused kernel over an unpadded prompt takes causality for granted.
    if queries > 1 and not (params.is_plain_softmax and mask is None and queries == entries):
        rows = torch.arange(entries - queries, entries, device=query.device)[:, None]
        causal = torch.arange(entries, device=query.device) <= rows
        mask = causal[None, None] if mask is None else mask & causal
    if params.is_plain_softmax:
        return sdpa_attention_forward(module, query, key, value, mask, **options)[0]
    visible = None if mask is None else mask.expand(query.shape[0], 1, queries, entries)
    attention = attention_probs(split_gqa_groups(query, query.shape[1] // key.shape[1]), key, visible, params)
    return merge_gqa_groups(attend_values(attention, value)).transpose(1, 2)


def _attention_params(options: dict[str, Any]) -> AttentionParams:
    return AttentionParams(options["scaling"], options.get("softcap"), options.get("s_aux"))


def _mask(*args: Any, attention_mask: Tensor | None = None, local_size: int | None = None, **options: Any) -> Any:
    """Sliding layers get transformers' own mask; full layers the padding alone, as a view: they know positions."""
    if local_size is not None:
        options["allow_is_causal_skip"] = False
        return sdpa_mask(*args, attention_mask=attention_mask, local_size=local_size, **options)
    if options.get("mask_function", causal_mask_function) is not causal_mask_function:
        raise UserError(
            "the model asks for attention that is not causal (packed sequences or prefixes that see each other), which "
            "a budgeted cache cannot keep; pass one sequence per row with its 2D attention mask"
        )
    if attention_mask is None or bool(attention_mask.all()):
        return None
    return attention_mask.bool()[:, None, None, :].expand(-1, 1, options["q_length"], -1)


def split_gqa_groups(query: QueryStates, group: int) -> GroupedQueries:
    """Query heads as rows of their KV head."""
    return query.unflatten(1, (query.shape[1] // group, group))


def merge_gqa_groups(output: GroupedQueries) -> QueryStates:
    """The inverse of `grouped`."""
    return output.flatten(1, 2)


@dataclass(frozen=True)
class RingWindow:
    """Entries that a ring holds for a query: the first `sinks` tokens and the newest `length`."""

    sinks: int
    length: int

    def slot(self, position: int) -> int:
        """Where the ring keeps the token at this position."""
        return position if position < self.sinks else self.sinks + (position - self.sinks) % self.length


@dataclass(frozen=True)
class CentroidEntries:
    """Entries that stand for others and are seen by every query; `bias` is added to their logits."""

    key: Float[Tensor, "batch heads summaries head_dim"]
    value: Float[Tensor, "batch heads summaries head_dim"]
    bias: Float[Tensor, "batch heads summaries"]


def visibility_mask(
    query_positions: Int[Tensor, "#batch queries"], key_positions: Positions, window: RingWindow | None = None
) -> Bool[Tensor, "#batch #heads queries entries"]:
    """Which queries see which entries: no padding, nothing later than the query, nothing that its ring has dropped."""
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
    """What each query gives to each entry, those of the summary first.

    `visible` may be of the last entries only: every query sees those before them, and with None it sees all.
    """
    logits = _logits(query, key, params)
    if centroids is not None:
        centroid_logits = _logits(query, centroids.key, params) + centroids.bias[:, :, None, None].to(logits.dtype)
        logits = torch.cat([centroid_logits, logits], -1)
    return masked_softmax(logits, visible, params)


def attend_blockwise(
    query: GroupedQueries,
    keys: Iterable[KVStates],
    values: Iterable[KVStates],
    visible: Bool[Tensor, "#batch #heads queries entries"] | None,
    params: AttentionParams,
) -> GroupedQueries:
    """Output over entries that come in parts, such as stored ones that are converted on the way.

    Logits and sums are in 32 bits, as a fused kernel has them: half of that would cost more than packing does.
    """
    logits = torch.cat([_logits(query.float(), key.float(), params) for key in keys], -1)
    attention, output, start = masked_softmax(logits, visible, params), torch.zeros_like(query, dtype=torch.float32), 0
    for value in values:
        stop = start + value.shape[2]
        output += attend_values(attention[..., start:stop], value.float())
        start = stop
    return output.to(query.dtype)


def _logits(
    query: GroupedQueries, key: KVStates, params: AttentionParams
) -> Float[Tensor, "batch heads group queries entries"]:
    rows, columns = query.flatten(0, 1).flatten(1, 2), key.flatten(0, 1).transpose(1, 2)
    # The scale goes into the product: one pass less over the logits, and no rounding of scaled half-precision queries.
    logits = torch.baddbmm(rows.new_empty(1, 1, 1), rows, columns, beta=0, alpha=params.scaling)
    return params.apply_softcap(logits).view(*query.shape[:4], -1)


def masked_softmax(logits: AttentionProbs, visible: Tensor | None, params: AttentionParams) -> AttentionProbs:
    """Probabilities; `visible` may be of the last entries only, and with None every query sees all. Logits change."""
    if visible is not None:
        # The lowest finite number, not -inf: a padding query sees nothing, and must not spread NaN.
        unsure = logits[..., logits.shape[-1] - visible.shape[-1] :]
        unsure.masked_fill_(~visible[:, :, None], torch.finfo(logits.dtype).min)
    return _softmax(logits, params.sink_logits)


def attend_values(
    attention: AttentionProbs, value: KVStates, centroids: CentroidEntries | None = None
) -> GroupedQueries:
    """The values, those of the summary first, weighted by the attention they get."""
    if centroids is not None:
        first = centroids.value.shape[2]
        return attend_values(attention[..., :first], centroids.value) + attend_values(attention[..., first:], value)
    return (attention.flatten(2, 3) @ value).unflatten(2, attention.shape[2:4])


def _softmax(logits: Tensor, sink_logits: Tensor | None) -> Tensor:
    if sink_logits is None:
        return torch.softmax(logits, -1)
    sinks = sink_logits.view(1, *logits.shape[1:3], 1, 1).expand(*logits.shape[:4], 1).to(logits.dtype)
    return torch.softmax(torch.cat([logits, sinks], -1), -1)[..., :-1].contiguous()


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
    """Output of all queries over all entries, and over a summary of others; the last entries are the queries' own.

    `masked` False promises that positions hide nothing beyond causality: one query that sees every entry, or an
    unpadded prompt that attends to itself. Probabilities are never held for more than a block of queries.
    """
    queries, entries = query.shape[3], key.shape[2]
    fused = params.is_plain_softmax and centroids is None
    if fused and not masked:
        return _fused(query, key, value, None, params)
    block = MASKED_QUERY_BLOCK_SIZE if fused else QUERY_BLOCK_SIZE
    outputs = []
    for start in range(0, queries, block):
        stop = min(start + block, queries)
        reach = entries - queries + stop
        part, held, given = query[:, :, :, start:stop], key[:, :, :reach], value[:, :, :reach]
        visible = None
        if masked or queries > 1:
            visible = visibility_mask(query_positions[:, start:stop], key_positions[..., :reach], window)
        if fused:
            outputs.append(_fused(part, held, given, visible, params))
        else:
            outputs.append(attend_values(attention_probs(part, held, visible, params, centroids), given, centroids))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 3)


def _fused(
    query: GroupedQueries, key: KVStates, value: KVStates, visible: Tensor | None, params: AttentionParams
) -> GroupedQueries:
    group, queries = query.shape[2:4]
    if visible is None and queries > 1:
        if group > 1 and query.dtype.itemsize > 2:
            # In 32 bits no fused kernel of a GPU knows groups; what does holds all probabilities. These are views.
            key, value = (each.flatten(0, 1)[:, None].expand(-1, group, -1, -1) for each in (key, value))
            return sdpa(query.flatten(0, 1), key, value, is_causal=True, scale=params.scaling).view(query.shape)
        prompt = sdpa(merge_gqa_groups(query), key, value, is_causal=True, scale=params.scaling, enable_gqa=group > 1)
        return split_gqa_groups(prompt, group)
    mask = None if visible is None else visible[:, :, None].expand(-1, -1, group, -1, -1).flatten(2, 3)
    return sdpa(query.flatten(2, 3), key, value, attn_mask=mask, scale=params.scaling).view(query.shape)
