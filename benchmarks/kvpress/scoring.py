"""One window under one press: prefill, compress, and score the continuation against the full cache.

kvpress hides a head's entries by fake keys whose attention underflows. For a continuation in one forward, one such key
has to suit all of its queries, and none need exist. Here every layer gets a boolean mask instead, so that the hiding is
exact whatever the queries are (on the demo model both give the same bits). It also gives every layer its own length,
without which PyramidKV, whose layers keep unequally many entries, can only be decoded token by token.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.kvpress.loading import Window
from benchmarks.kvpress.presses import Masked, Press, applied


@dataclass(frozen=True)
class Reference:
    """The full cache on a window: log-probabilities (continuation, vocabulary) in float32, mean NLL in nats."""

    log_probs: Tensor
    nll: float


@dataclass(frozen=True)
class Prefilled:
    """A context under a press: its cache, the logits (1, vocabulary) behind it, and what attention must not see."""

    cache: Any
    logits: Tensor
    masked: Masked

    @property
    def lengths(self) -> list[int]:
        """Tokens that each layer's tensors hold."""
        return [layer.keys.shape[-2] for layer in self.cache.layers]

    @property
    def kept(self) -> int:
        """Entries of all layers and KV heads that attention sees."""
        held = sum(layer.keys.shape[-3] * layer.keys.shape[-2] for layer in self.cache.layers)
        return held - sum(len(hidden[0]) for hidden in self.masked if hidden)


@dataclass(frozen=True)
class Measured:
    """What a press costs on one window; NLL and KL in nats per continuation token, bytes in the model's type."""

    nll: float
    kl: float
    kept: int
    shortest: int
    longest: int
    held_bytes: int
    seconds: float


@torch.inference_mode()
def reference(model: Any, window: Window) -> Reference:
    """Score a window with all of its cache, by transformers' own masks."""
    ids, cache = torch.tensor([window.ids]), _cache()
    logits = model(ids[:, : window.context], past_key_values=cache, logits_to_keep=1).logits[0]
    if window.continuation > 1:
        logits = torch.cat([logits, model(ids[:, window.context : -1], past_key_values=cache).logits[0]])
    log_probs = torch.log_softmax(logits.float(), -1)
    return Reference(log_probs, _nll(log_probs, window))


@torch.inference_mode()
def measure(model: Any, window: Window, full: Reference, press: Press, entries: int) -> Measured:
    """Score a window under a press that keeps `entries` of its context, a mean per KV head.

    Raises:
        RuntimeError: kvpress kept another number of entries than asked for, so that the bytes would be wrong.
    """
    started = time.perf_counter()
    prefilled = prefill(model, window, press, entries)
    lengths, kept, held = prefilled.lengths, prefilled.kept, held_bytes(prefilled.cache)
    heads = len(lengths) * model.config.num_key_value_heads
    if abs(kept - entries * heads) > heads:
        raise RuntimeError(f"kvpress kept {kept} entries in {heads} heads where {entries} a head were asked for")
    log_probs = torch.log_softmax(continue_from(model, window, prefilled).float(), -1)
    return Measured(
        nll=_nll(log_probs, window),
        kl=float((full.log_probs.exp() * (full.log_probs - log_probs)).sum(-1).mean()),
        kept=kept,
        shortest=min(lengths),
        longest=max(lengths),
        held_bytes=max(held, held_bytes(prefilled.cache)),
        seconds=time.perf_counter() - started,
    )


def prefill(model: Any, window: Window, press: Press, entries: int) -> Prefilled:
    """Prefill the context; the press sees nothing of the continuation, and the whole context attends."""
    ids, cache = torch.tensor([window.ids[: window.context]]), _cache()
    with applied(press, model, entries, window.context) as masked:
        logits = model(ids, past_key_values=cache, logits_to_keep=1).logits[0]
    return Prefilled(cache, logits, masked)


def continue_from(model: Any, window: Window, prefilled: Prefilled) -> Tensor:
    """Logits (continuation, vocabulary) for every continuation token; adds all but the last to the cache."""
    if window.continuation == 1:
        return prefilled.logits
    # evicting entries moves no token: the continuation stands where it stood in the text
    positions = torch.arange(window.context, len(window.ids) - 1)[None]
    ids = torch.tensor([window.ids[window.context : -1]])
    with masked_by_layer(model, prefilled):
        rest = model(ids, past_key_values=prefilled.cache, position_ids=positions).logits[0]
    return torch.cat([prefilled.logits, rest])


@contextmanager
def masked_by_layer(model: Any, prefilled: Prefilled) -> Iterator[None]:
    """Within it, every layer attends by a mask of its own."""
    hooks = [
        layer.self_attn.register_forward_pre_hook(partial(_mask, prefilled, index), with_kwargs=True)
        for index, layer in enumerate(model.model.layers)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _mask(prefilled: Prefilled, layer: int, module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """Forward pre-hook: the mask of a layer whose new tokens are not yet in the cache."""
    queries = kwargs["hidden_states"].shape[1]
    held = prefilled.cache.layers[layer].keys.shape[-2]
    mask = visible(queries, held, prefilled.masked[layer], module.config)
    return args, kwargs | {"attention_mask": mask}


def visible(queries: int, held: int, hidden: tuple[Any, Any] | None, config: Any) -> Tensor:
    """What each query sees, True for visible: (1, 1 or query heads, queries, held + queries).

    Everything held that is not hidden from the query's KV head, itself, and those before it.
    """
    causal = torch.ones(queries, held + queries, dtype=torch.bool).tril(held)
    if hidden is None:
        return causal[None, None]
    seen = torch.ones(config.num_key_value_heads, held + queries, dtype=torch.bool)
    seen[hidden] = False
    groups = config.num_attention_heads // config.num_key_value_heads
    return (causal & seen.repeat_interleave(groups, 0)[:, None])[None]


def held_bytes(cache: Any) -> int:
    """Bytes of the storages behind a cache's tensors, each counted once, and whole even where a view shows a part."""
    storages = [each.untyped_storage() for layer in cache.layers for each in (layer.keys, layer.values)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _nll(log_probs: Tensor, window: Window) -> float:
    targets = torch.tensor(window.ids[window.context :])
    return float(-log_probs.gather(-1, targets[:, None]).mean())


def _cache() -> Any:
    from transformers import DynamicCache  # here, since offline mode is set before transformers is read

    return DynamicCache()
