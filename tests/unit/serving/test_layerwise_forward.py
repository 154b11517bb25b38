"""A chunk whose forward pauses between layers leaves what it leaves in one go."""

import weakref

import pytest
import torch
from model_families import model_pair
from plan_factory import make_plan, random_ids, with_chunked_prefill

from baklava.cache.budgeted_cache import BudgetedCache
from baklava.eviction import HeavyHitter
from baklava.plan.budget_plan import full_cache_plan
from baklava.runtime.batched_forward import decode_step
from baklava.runtime.prefill import TokenChunk, prefill
from serve_app.engine.layerwise_forward import LayerwiseForward

GRID = [(layer, head) for layer in range(4) for head in range(2)]


@pytest.fixture
def loaded(tiny):
    return tiny(num_hidden_layers=4)


@pytest.fixture
def plan(loaded):
    return make_plan(
        loaded, [[20, 40], [28, 64]] * 2, HeavyHitter(sinks=2, eviction_interval=5, distance=3, centroids=2)
    )


@pytest.mark.parametrize(
    ("tokens", "processed"),
    [(100, [100]), (50, [50, 100]), (25, [25, 50, 75, 100]), (10, [0, 0, 25, 25, 50, 50, 50, 75, 75, 100])],
)
@torch.inference_mode()
def test_layers_run_as_the_tokens_allow_while_others_decode(loaded, plan, tokens, processed):
    ids, other = random_ids(1, 100), prefill(loaded, plan, random_ids(1, 50, seed=1))[0]
    whole, paused = BudgetedCache(plan), BudgetedCache(plan)
    expected = loaded.model(ids, past_key_values=whole).logits[:, -1]
    forward, seen = LayerwiseForward(loaded, TokenChunk(paused, ids[0])), []
    while (logits := forward.run(tokens)) is None:
        seen.append(forward.num_processed)
        decode_step(loaded, [other], [3])
    assert [*seen, forward.num_processed] == processed
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    assert all(paused.cached_positions(*place).tolist() == whole.cached_positions(*place).tolist() for place in GRID)
    assert paused.get_seq_length() == 100


def test_what_is_dropped_between_two_layers_is_freed(loaded, plan):
    cache = BudgetedCache(plan)
    with torch.inference_mode():
        forward = LayerwiseForward(loaded, TokenChunk(cache, random_ids(1, 100)[0]))
        assert forward.run(50) is None
    assert cache.nbytes > 0
    freed = weakref.ref(cache)
    del cache
    assert freed() is not None
    del forward
    assert freed() is None
    assert not torch.is_inference_mode_enabled()


@torch.inference_mode()
def test_an_error_in_a_later_layer_reaches_the_step_that_runs_it(loaded, plan, monkeypatch):
    cache = BudgetedCache(plan)

    def explode(*args):
        raise MemoryError("no memory")

    monkeypatch.setattr(cache.layers[2], "attend", explode)
    forward = LayerwiseForward(loaded, TokenChunk(cache, random_ids(1, 100)[0]))
    assert forward.run(50) is None
    with pytest.raises(MemoryError, match="no memory"):
        forward.run(25)  # the third layer of four


@pytest.mark.parametrize("family", ["qwen3_next", "gemma3", "gemma4 shared"])
@torch.inference_mode()
def test_layers_that_do_not_attend_do_not_count(family):
    loaded, _ = model_pair(family)
    plan = with_chunked_prefill(full_cache_plan(loaded.identity, loaded.geometry, 200, bits=32), 60)
    attending = loaded.geometry.num_attending_layers
    paused, ids = BudgetedCache(plan), random_ids(1, 60)[0]
    expected = prefill(loaded, plan, ids[None])[1]
    forward = LayerwiseForward(loaded, TokenChunk(paused, ids))
    for _ in range(attending - 1):
        assert forward.run(-(-60 // attending)) is None
    torch.testing.assert_close(forward.run(60), expected, atol=1e-4, rtol=1e-4)
