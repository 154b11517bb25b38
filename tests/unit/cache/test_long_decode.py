import resource
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from plan_factory import plan_of, random_ids

from baklava.cache.budgeted_cache import BudgetedCache
from baklava.eviction import Eviction, HeavyHitter, Streaming
from baklava.runtime.model_loader import LoadedModel

TOKENS = 6_000


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@torch.inference_mode()
@pytest.mark.parametrize("eviction", [Streaming(), HeavyHitter(interval=16, distance=0)], ids=str)
def test_thousands_of_tokens_later_every_head_holds_its_budget_and_the_process_has_not_grown(
    tiny: Callable[..., LoadedModel], eviction: Eviction
) -> None:
    loaded = tiny(layers=1, head_dim=64)
    plan = plan_of(loaded, [[200, 90]], eviction, bits=16)
    cache = BudgetedCache(plan)
    loaded.model(random_ids(4, 500), past_key_values=cache)
    before = 0
    for number, token in enumerate(random_ids(TOKENS, 4)):
        if number == TOKENS // 5:
            before = resident()
        loaded.model(token[:, None], past_key_values=cache)
    # Four rows that kept these 4,800 tokens would hold 9.6 MiB more.
    assert resident() - before < 5 << 20
    cache.check_integrity()
    assert cache.get_seq_length() == 500 + TOKENS
    assert cache.nbytes == 4 * cache.reserved_bytes
    for head, tokens in enumerate(plan.tokens[0]):
        held = cache.cached_positions(0, head)
        assert tokens - eviction.interval <= len(held) <= tokens
        assert held[: eviction.sinks].tolist() == list(range(eviction.sinks))
        assert held[-1] == 500 + TOKENS - 1


@torch.inference_mode()
def test_a_full_cache_copies_nothing_per_token(tiny: Callable[..., LoadedModel]) -> None:
    loaded = tiny(layers=1)
    for eviction in (Streaming(), HeavyHitter(interval=8, distance=0)):
        cache = BudgetedCache(plan_of(loaded, [[40, 30]], eviction))
        loaded.model(random_ids(1, 60), past_key_values=cache)
        for token in random_ids(20, 1):
            loaded.model(token[None], past_key_values=cache)
        groups = cache.budgeted_layers[0].groups
        places = [group.keys.encoded[0].data_ptr() for group in groups]
        for token in random_ids(100, 1):
            loaded.model(token[None], past_key_values=cache)
        assert [group.keys.encoded[0].data_ptr() for group in groups] == places
