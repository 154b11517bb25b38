"""The bytes of all caches of an engine, at every moment of its steps, are within what is reserved."""

import random

import pytest
import torch
from byte_model import byte_model
from engine_client import ask, engine_of, idle, until
from plan_factory import make_plan, with_bits, with_chunked_prefill

from baklava.cache.storage import allocated_bytes, slab
from baklava.eviction import AttentionMatching, ExpectedAttention, HeavyHitter, SnapKV, StreamingLLM
from baklava.runtime.prefill import make_prefill_task, prefill_workspace_bytes

BUDGETS = [[12, 24], [16, 20]]
PREFIX = tuple(b"Every question starts with this sentence. ")


@pytest.fixture(scope="module")
def loaded(tiny):
    return byte_model(tiny, head_dim=32)


def plans(loaded):
    scored = make_plan(loaded, BUDGETS, HeavyHitter(eviction_interval=4, distance=0), bits=16, context_length=256)
    return [
        scored,
        with_bits(scored, [(4, 3), (6, 5)]),
        with_chunked_prefill(with_bits(scored, [(8, 8), (16, 6)]), 11),
        make_plan(loaded, BUDGETS, StreamingLLM(), bits=16, context_length=256),
    ]


@pytest.mark.parametrize("seed", range(3))
def test_every_allocation_is_within_what_is_reserved_at_that_moment(loaded, monkeypatch, seed):
    source, active = random.Random(seed), plans(loaded)
    longest = max(plan.bytes_for(256) + prefill_workspace_bytes(plan, 256, 4) for plan in active)
    allocate, looks = slab.allocate, []
    with engine_of(loaded, active[0], 3 * longest, max_batched_tokens=16, max_waiting=100) as engine:
        budget = engine._scheduler.budget

        def looked(nbytes, device):
            memory = allocate(nbytes, device)
            if nbytes and budget.reserved_bytes:  # not those of this thread
                looks.append((allocated_bytes().current + nbytes, budget.reserved_bytes))
            return memory

        monkeypatch.setattr(slab, "allocate", looked)
        engine.pin_prefix(PREFIX)
        answers = []
        for number in range(40):
            begin = PREFIX if source.random() < 0.3 else ()
            prompt = (*begin, *(source.randrange(32, 127) for _ in range(source.randrange(1, 120))))
            tokens = source.randrange(1, 40)
            answers.append(ask(engine, prompt, tokens, n=source.choice([1, 1, 3])))
            if source.random() < 0.3:
                source.choice(answers).cancel()
            if source.random() < 0.2:
                answers[-1].handle.stop_sequence(0)
            if number % 10 == 9:
                until(lambda: engine.state().waiting < 8)
                engine.swap_plan(source.choice(active))
        until(lambda: not (engine.state().running or engine.state().waiting))
        idle(engine)
        state = engine.state()
    assert len(looks) > 100
    excess = [look for look in looks if look[0] > look[1]]
    assert excess == []
    assert max(held for held, _ in looks) <= state.peak_bytes <= state.pool_bytes
    assert state.counts.failed == 0


@torch.inference_mode()
def test_a_slab_is_counted_until_its_end(loaded):
    from baklava.runtime.prefill import prefill

    plan, before = plans(loaded)[0], allocated_bytes().current
    cache, _ = prefill(loaded, plan, torch.tensor([PREFIX]))
    assert allocated_bytes().current - before == cache.nbytes == plan.bytes_per_sequence
    copied = cache.copy(64)
    assert allocated_bytes().current - before == cache.nbytes + copied.nbytes
    copied.batch_select_indices(torch.tensor([0, 0, 0]))
    assert copied.nbytes == 3 * plan.bytes_for(64)
    del cache
    assert allocated_bytes().current - before == copied.nbytes
    assert allocated_bytes().peak >= plan.bytes_per_sequence + copied.nbytes


@torch.inference_mode()
@pytest.mark.parametrize(
    "eviction",
    [
        HeavyHitter(eviction_interval=4, distance=0),
        AttentionMatching(eviction_interval=4, references=16, fit_references=24),
        SnapKV(eviction_interval=4, window=5, fit_references=12),
        ExpectedAttention(eviction_interval=4, window=20, fit_references=12),
    ],
    ids=str,
)
def test_a_recorded_prompt_is_counted_until_it_is_compressed(loaded, eviction):
    plan = make_plan(loaded, BUDGETS, eviction, bits=16, context_length=256)
    before = allocated_bytes().current
    task = make_prefill_task(loaded, plan, PREFIX, 64)
    counted = []
    while task.step(8) is None:
        counted.append(allocated_bytes().current - before)
        assert counted[-1] == task.nbytes
    queries_to_come = eviction.query_sample.single_block * (len(PREFIX) % 8)  # they wait for the last one
    workspace = prefill_workspace_bytes(plan, len(PREFIX), 4)
    assert max(counted) >= workspace - queries_to_come * 4 * plan.geometry.query_heads * 32 * plan.geometry.layers
    assert allocated_bytes().current - before == task.nbytes == plan.bytes_for(64)
