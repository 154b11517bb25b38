import resource
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from plan_factory import make_plan, random_ids

from baklava.cache.budgeted_cache import BudgetedCache
from baklava.eviction import Eviction, HeavyHitter, StreamingLLM
from baklava.runtime.model_loader import LoadedModel

TOKENS = 6_000


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@pytest.mark.slow
@torch.inference_mode()
@pytest.mark.parametrize("eviction", [StreamingLLM(), HeavyHitter(eviction_interval=16, distance=0)], ids=str)
def test_after_thousands_of_tokens_heads_are_within_budget_and_the_process_has_not_grown(
    tiny: Callable[..., LoadedModel], eviction: Eviction
) -> None:
    loaded = tiny(layers=1, head_dim=64, group=3)
    plan = make_plan(loaded, [[200, 90]], eviction, bits=16)
    cache = BudgetedCache(plan)
    loaded.model(random_ids(4, 500), past_key_values=cache)
    before = 0
    for number, token in enumerate(random_ids(TOKENS, 4)):
        if number == TOKENS // 5:
            before = resident()
        loaded.model(token[:, None], past_key_values=cache)
    # Four rows with all of these 4,800 tokens would take 9.6 MiB more.
    assert resident() - before < 5 << 20
    cache.check_integrity(500 + TOKENS)
    assert cache.get_seq_length() == 500 + TOKENS
    assert cache.nbytes == 4 * cache.reserved_bytes
    for head, tokens in enumerate(plan.tokens[0]):
        held = cache.cached_positions(0, head)
        assert tokens - eviction.eviction_interval <= len(held) <= tokens
        assert held[: eviction.sinks].tolist() == list(range(eviction.sinks))
        assert held[-1] == 500 + TOKENS - 1


@torch.inference_mode()
def test_a_full_cache_copies_nothing_per_token(tiny: Callable[..., LoadedModel]) -> None:
    loaded = tiny(layers=1)
    for eviction in (StreamingLLM(), HeavyHitter(eviction_interval=8, distance=0)):
        cache = BudgetedCache(make_plan(loaded, [[40, 30]], eviction))
        loaded.model(random_ids(1, 60), past_key_values=cache)
        for token in random_ids(20, 1):
            loaded.model(token[None], past_key_values=cache)
        groups = cache.budgeted_layers[0].groups
        places = [group.keys.encoded[0].data_ptr() for group in groups]
        for token in random_ids(100, 1):
            loaded.model(token[None], past_key_values=cache)
        assert [group.keys.encoded[0].data_ptr() for group in groups] == places
