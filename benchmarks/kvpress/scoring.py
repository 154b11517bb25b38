"""Score a press on a window: prefill, compress, and score the continuation against the full cache.

kvpress hides a head's entries with fake keys whose attention underflows. If the continuation is one forward, one such
key must suit all of its queries, and may not exist. So every layer gets a boolean mask instead, which is exact for any
queries (on the demo model both give identical results). It also lets every layer have its own length: without that,
PyramidKV, whose layers keep different numbers of entries, could only be decoded token by token.
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
from benchmarks.kvpress.presses import Masked, Press, applied_press


@dataclass(frozen=True)
class Reference:
    """The full cache's log-probabilities (continuation, vocabulary) in float32, and its mean NLL in nats."""

    log_probs: Tensor
    nll: float


@dataclass(frozen=True)
class Prefilled:
    """A compressed context: its cache, the logits (1, vocabulary) after it, and the entries hidden from attention."""

    cache: Any
    logits: Tensor
    masked: Masked

    @property
    def lengths(self) -> list[int]:
        """Number of tokens in each layer's tensors."""
        return [layer.keys.shape[-2] for layer in self.cache.layers]

    @property
    def kept(self) -> int:
        """Number of entries that attention sees, over all layers and KV heads."""
        stored = sum(layer.keys.shape[-3] * layer.keys.shape[-2] for layer in self.cache.layers)
        return stored - sum(len(hidden[0]) for hidden in self.masked if hidden)


@dataclass(frozen=True)
class PressScores:
    """The scores of a press on a window; NLL and KL in nats per continuation token, bytes in the model's dtype."""

    nll: float
    kl: float
    kept: int
    shortest: int
    longest: int
    storage_bytes: int
    seconds: float


@torch.inference_mode()
def reference(model: Any, window: Window) -> Reference:
    """Score a window with the full cache and transformers' own masks."""
    ids, cache = torch.tensor([window.ids]), _cache()
    logits = model(ids[:, : window.context], past_key_values=cache, logits_to_keep=1).logits[0]
    if window.continuation > 1:
        logits = torch.cat([logits, model(ids[:, window.context : -1], past_key_values=cache).logits[0]])
    log_probs = torch.log_softmax(logits.float(), -1)
    return Reference(log_probs, _nll(log_probs, window))


@torch.inference_mode()
def score_press(model: Any, window: Window, full: Reference, press: Press, entries: int) -> PressScores:
    """Score a window under a press that keeps `entries` of its context, as a mean per KV head.

    Raises:
        RuntimeError: kvpress kept another number of entries, so that the bytes would be wrong.
    """
    started = time.perf_counter()
    prefilled = prefill(model, window, press, entries)
    lengths, kept = prefilled.lengths, prefilled.kept
    prefill_bytes = storage_bytes(prefilled.cache)
    heads = len(lengths) * model.config.num_key_value_heads
    if abs(kept - entries * heads) > heads:
        raise RuntimeError(f"kvpress kept {kept} entries in {heads} heads instead of {entries} per head")
    log_probs = torch.log_softmax(continue_from(model, window, prefilled).float(), -1)
    return PressScores(
        nll=_nll(log_probs, window),
        kl=float((full.log_probs.exp() * (full.log_probs - log_probs)).sum(-1).mean()),
        kept=kept,
        shortest=min(lengths),
        longest=max(lengths),
        storage_bytes=max(prefill_bytes, storage_bytes(prefilled.cache)),
        seconds=time.perf_counter() - started,
    )


def prefill(model: Any, window: Window, press: Press, entries: int) -> Prefilled:
    """Prefill the context under a press, which sees nothing of the continuation; the whole context attends."""
    ids, cache = torch.tensor([window.ids[: window.context]]), _cache()
    with applied_press(press, model, entries, window.context) as masked:
        logits = model(ids, past_key_values=cache, logits_to_keep=1).logits[0]
    return Prefilled(cache, logits, masked)


def continue_from(model: Any, window: Window, prefilled: Prefilled) -> Tensor:
    """Return the logits (continuation, vocabulary) of the continuation; its last token is not fed to the cache."""
    if window.continuation == 1:
        return prefilled.logits
    # eviction moves no token: the continuation has the positions that it has in the text
    positions = torch.arange(window.context, len(window.ids) - 1)[None]
    ids = torch.tensor([window.ids[window.context : -1]])
    with masks_per_layer(model, prefilled):
        rest = model(ids, past_key_values=prefilled.cache, position_ids=positions).logits[0]
    return torch.cat([prefilled.logits, rest])


@contextmanager
def masks_per_layer(model: Any, prefilled: Prefilled) -> Iterator[None]:
    """Give every layer its own attention mask until the block ends."""
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
    """Add a layer's mask to its arguments, as a forward pre-hook; new tokens are not in the cache yet."""
    queries = kwargs["hidden_states"].shape[1]
    num_cached = prefilled.cache.layers[layer].keys.shape[-2]
    mask = attention_mask(queries, num_cached, prefilled.masked[layer], module.config)
    return args, kwargs | {"attention_mask": mask}


def attention_mask(queries: int, num_cached: int, hidden: tuple[Any, Any] | None, config: Any) -> Tensor:
    """Return what each query attends to, as booleans (1, 1 or query heads, queries, num_cached + queries).

    A query attends to the cached entries that its KV head does not hide, to itself and to the queries before it.
    """
    causal = torch.ones(queries, num_cached + queries, dtype=torch.bool).tril(num_cached)
    if hidden is None:
        return causal[None, None]
    seen = torch.ones(config.num_key_value_heads, num_cached + queries, dtype=torch.bool)
    seen[hidden] = False
    groups = config.num_attention_heads // config.num_key_value_heads
    return (causal & seen.repeat_interleave(groups, 0)[:, None])[None]


def storage_bytes(cache: Any) -> int:
    """Return the bytes of the storages of a cache's tensors; each counts once, in full even if a view is smaller."""
    storages = [each.untyped_storage() for layer in cache.layers for each in (layer.keys, layer.values)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _nll(log_probs: Tensor, window: Window) -> float:
    targets = torch.tensor(window.ids[window.context :])
    return float(-log_probs.gather(-1, targets[:, None]).mean())


def _cache() -> Any:
    from transformers import DynamicCache  # imported here, since offline mode must be set before

    return DynamicCache()
