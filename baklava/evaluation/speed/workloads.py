"""The prefills and decode steps that are timed, and the baseline: transformers' own cache and attention."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import DynamicCache

from baklava.cache import attention
from baklava.cache.budgeted_cache import BudgetedCache
from baklava.runtime.model_loader import LoadedModel

BASELINE = "DynamicCache, sdpa"

WARMUP_STEPS = 2
"""Decode steps that are run before any is timed."""


@contextmanager
def transformers_attention(loaded: LoadedModel) -> Iterator[None]:
    """Switch the model to transformers' own SDPA; it reads this setting at every forward."""
    loaded.model.config._attn_implementation = "sdpa"
    try:
        yield
    finally:
        loaded.model.config._attn_implementation = attention.ATTN_IMPLEMENTATION


def random_prompt(loaded: LoadedModel, batch: int, tokens: int) -> Int[Tensor, "batch tokens"]:
    """Return prompts of random tokens, the same ones at every call."""
    generator = torch.Generator().manual_seed(0)
    vocab_size = loaded.model.config.vocab_size
    return torch.randint(5, vocab_size, (batch, tokens), generator=generator).to(loaded.device)


@torch.inference_mode()
def baseline_prefill(loaded: LoadedModel, ids: Int[Tensor, "batch tokens"]) -> None:
    """Prefill with transformers' own cache and attention."""
    with transformers_attention(loaded):
        loaded.model(ids, past_key_values=DynamicCache(), logits_to_keep=1)


@torch.inference_mode()
def fill_cache(loaded: LoadedModel, cache: Any, batch: int, context: int) -> Any:
    """Fill a cache with random entries, as after a prompt of `context` tokens, and return it.

    The speed of a cache does not depend on the values in it, and this is faster than a prefill.
    """
    geometry, generator = loaded.geometry, torch.Generator(device=loaded.device).manual_seed(0)
    shape = (batch, geometry.kv_heads, context, geometry.head_dim)
    entries = torch.randn(shape, generator=generator, device=loaded.device, dtype=loaded.model.dtype)
    scores = torch.rand(shape[:3], generator=generator, device=loaded.device)
    for index in range(geometry.layers):
        if isinstance(cache, DynamicCache):
            cache.update(entries.clone(), entries.clone(), index)
        elif isinstance(cache, BudgetedCache):
            cache.budgeted_layers[index].load_prompt(entries, entries, scores)
    return cache


def make_decode_step(loaded: LoadedModel, cache: Any, batch: int) -> Callable[[], Any]:
    """Return a function that runs one decode step on a cache, or without one if `cache` is None.

    A budgeted cache is used with baklava's attention, anything else with transformers' own.
    """
    ids = torch.ones(batch, 1, dtype=torch.long, device=loaded.device)

    def step() -> Any:
        with nullcontext() if isinstance(cache, BudgetedCache) else transformers_attention(loaded):
            return loaded.model(ids, past_key_values=cache, use_cache=cache is not None, logits_to_keep=1)

    return step
