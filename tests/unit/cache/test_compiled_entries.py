"""Chunks of a prompt leave the same entries whether compiled loops or PyTorch's operations read and replace them."""

import pytest
import torch
from plan_factory import make_plan, random_ids, with_bits, with_chunked_prefill

from baklava.cache.budgeted_cache import BudgetedCache
from baklava.cache.head_groups import base, scored
from baklava.cache.kernels import compiled_entries
from baklava.eviction import HeavyHitter, SnapKV, StreamingLLM
from baklava.runtime.prefill import prefill

BITS = [[(4, 4), (3, 2)], [(8, 5), (6, 16)], [(16, 4), (5, 3)]]
METHODS = [
    StreamingLLM(sinks=3),
    HeavyHitter(sinks=2, eviction_interval=5, distance=8, residual_length=8, centroids=3),
    SnapKV(sinks=0, eviction_interval=5),
]


def entries_of(cache: BudgetedCache) -> torch.Tensor:
    return torch.cat(
        [states.flatten() for layer in cache.budgeted_layers for group in layer.groups for states in group.read()]
    )


def centroids_of(cache: BudgetedCache) -> list[torch.Tensor]:
    """Return the keys, values, weights and entropies of all centroids."""
    groups = [group for layer in cache.budgeted_layers for group in layer.groups]
    found = [group.centroids.tensors for group in groups if getattr(group, "centroids", None)]
    return [torch.cat([part.float().flatten() for part in parts]) for parts in zip(*found, strict=True)]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("eviction", METHODS)
@torch.inference_mode()
def test_chunks_leave_the_entries_that_pytorch_leaves(tiny, monkeypatch, eviction, bits):
    loaded = tiny(head_dim=32)
    plan = with_chunked_prefill(with_bits(make_plan(loaded, [[20, 40], [28, 64]], eviction), bits), 30)
    ids, calls = random_ids(2, 130), []
    prepare = compiled_entries.prepare
    monkeypatch.setattr(compiled_entries, "prepare", lambda: calls.append(1) or prepare())
    compiled, logits = prefill(loaded, plan, ids)
    assert calls
    entries = entries_of(compiled)
    monkeypatch.setattr(base, "can_compile_entries", lambda states: False)
    plain, expected = prefill(loaded, plan, ids)
    for layer, head, row in [(layer, head, row) for layer in (0, 1) for head in (0, 1) for row in (0, 1)]:
        assert compiled.cached_positions(layer, head, row).tolist() == plain.cached_positions(layer, head, row).tolist()
    # A number between two codes may be rounded to either.
    assert ((entries - entries_of(plain)).abs() > 1e-3).float().mean() < 0.01
    torch.testing.assert_close(logits, expected, atol=0.05, rtol=0.05)
    assert len(centroids_of(compiled)) == (4 if eviction.centroids else 0)
    for own, others in zip(centroids_of(compiled), centroids_of(plain), strict=True):
        assert ((own - others).abs() > 1e-2).float().mean() < 0.01
    compiled.check_integrity(130)


@pytest.mark.parametrize("tokens", [30, 200])
@pytest.mark.parametrize("bits", [(16, 16), (4, 3)])
@torch.inference_mode()
def test_prompts_leave_the_centroids_that_pytorch_leaves(tiny, monkeypatch, tokens, bits):
    """A whole prompt, and then chunks after it that are merged with old entries."""
    loaded = tiny(head_dim=32)
    eviction = HeavyHitter(sinks=2, eviction_interval=5, distance=8, centroids=3)
    plan = with_bits(make_plan(loaded, [[20, 40], [28, 64]], eviction), [bits, bits])
    caches, calls, merge = [], [], scored.merge_entries
    monkeypatch.setattr(scored, "merge_entries", lambda *arguments: calls.append(1) or merge(*arguments))
    for is_compiled in (True, False):
        if not is_compiled:
            assert calls
            calls.clear()
            monkeypatch.setattr(base, "can_compile_entries", lambda states: False)
        cache = BudgetedCache(plan)
        for turn, size in enumerate((tokens, 25)):
            loaded.model(random_ids(1, size, seed=turn), past_key_values=cache)
        caches.append(cache)
    assert not calls
    weights = centroids_of(caches[0])[2]
    assert (weights > 0).float().mean() > 0.5
    for own, others in zip(*map(centroids_of, caches), strict=True):
        torch.testing.assert_close(own, others, atol=2e-2, rtol=2e-2)


def test_weights_that_are_no_numbers_take_no_part(tiny):
    """A model whose states overflow must not write where nothing is."""
    loaded = tiny(head_dim=32)
    cache = BudgetedCache(
        make_plan(loaded, [[20, 40], [28, 64]], HeavyHitter(sinks=2, eviction_interval=5, centroids=3))
    )
    with torch.inference_mode():
        loaded.model(random_ids(1, 100), past_key_values=cache)
    group = cache.layers[0].groups[0]
    before = [part.clone() for part in group.centroids.tensors]
    rows = len(group.addresses)
    entries, weights = torch.ones(1, rows, 5000, 32), torch.full((1, rows, 5000), torch.nan)
    compiled_entries.merge_entries(group.addresses, weights, 0, entries, entries, 4)
    for part, own in zip(before, group.centroids.tensors, strict=True):
        torch.testing.assert_close(own, part, atol=1e-2, rtol=1e-2)


@torch.inference_mode()
def test_rows_with_padding_keep_their_own_entries(tiny):
    loaded = tiny(head_dim=32)
    plan = make_plan(loaded, [[20, 40], [28, 64]], HeavyHitter(sinks=2, eviction_interval=5, distance=0))
    plan = with_chunked_prefill(with_bits(plan, [(4, 4), (8, 6)]), 30)
    ids, mask = random_ids(2, 100), torch.ones(2, 100, dtype=torch.long)
    mask[0, :37] = 0
    together, logits = prefill(loaded, plan, ids, mask)
    alone, expected = prefill(loaded, plan, ids[1:])
    torch.testing.assert_close(logits[1:], expected, atol=0.05, rtol=0.05)
    for layer, head in [(0, 0), (0, 1), (1, 0), (1, 1)]:
        assert together.cached_positions(layer, head, 1).tolist() == alone.cached_positions(layer, head).tolist()


def test_other_devices_dtypes_and_dimensions_are_left_to_pytorch() -> None:
    assert compiled_entries.can_compile_entries(torch.zeros(1, 2, 4, 32))
    assert not compiled_entries.can_compile_entries(torch.zeros(1, 2, 4, 32, dtype=torch.bfloat16))
    assert not compiled_entries.can_compile_entries(torch.zeros(1, 2, 4, 24))
    assert not compiled_entries.can_compile_entries(torch.zeros(1, 2, 4, 32, device="meta"))


@torch.inference_mode()
def test_chunks_under_autocast_are_stored(tiny):
    """Values have 16 bits there."""
    loaded = tiny(head_dim=32)
    plan = make_plan(loaded, [[20, 40], [28, 64]], HeavyHitter(sinks=2, eviction_interval=5))
    cache = BudgetedCache(with_bits(plan, [(4, 4), (4, 4)]))
    with torch.autocast("cpu", torch.bfloat16):
        for turn in range(3):
            loaded.model(random_ids(1, 30, seed=turn), past_key_values=cache)
    cache.check_integrity(90)
