"""The engine with many requests at a time."""

import gc
import logging
import threading
import time
import weakref

import pytest
import torch
from byte_model import byte_model
from engine_client import Answer, ask, engine_of, idle, until
from model_families import model_pair
from plan_factory import make_plan, random_ids, with_bits, with_chunked_prefill

from baklava.cache.budgeted_cache import BudgetedCache
from baklava.cache.budgeted_layer import BudgetedLayer
from baklava.cache.recording_layer import RecordingLayer
from baklava.cache.sliding_layer import SlidingLayer
from baklava.cache.storage import DequantizedView
from baklava.errors import UserError
from baklava.eviction import HeavyHitter, StreamingLLM
from baklava.plan.budget_plan import full_cache_plan
from baklava.runtime.logprobs import PromptLogprobsTask, prompt_logprobs_workspace_bytes, score_suffix
from baklava.runtime.prefill import CONTINUATION_CHUNK_TOKENS, prefill, prefill_workspace_bytes
from serve_app.engine import scheduler
from serve_app.engine.chunk_size import ChunkSizePolicy
from serve_app.engine.engine import Engine, EngineConfig
from serve_app.engine.memory import ReservationExceededError
from serve_app.engine.model_runner import PrefillJob
from serve_app.engine.types import DeadlineError, DrainingError, QueueFullError, TokenOutput, TooLargeError

PROMPT = tuple(b"A river is a line of water that goes down to the sea.")
GRID = [(0, 0), (0, 1), (1, 0), (1, 1)]
BUDGETS = [[12, 24], [16, 20]]


@pytest.fixture(scope="module")
def loaded(tiny):
    return byte_model(tiny, head_dim=16)


@pytest.fixture(scope="module")
def plan(loaded):
    return make_plan(loaded, BUDGETS, HeavyHitter(eviction_interval=4, distance=0), bits=16, context_length=256)


@pytest.fixture
def engine(loaded, plan):
    with engine_of(loaded, plan) as engine:
        yield engine


def prompts(count, length=53, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [tuple(torch.randint(32, 127, (length,), generator=generator).tolist()) for _ in range(count)]


@torch.inference_mode()
def alone(loaded, plan, prompt, tokens):
    """Greedy tokens of one sequence, without an engine."""
    cache, logits = prefill(loaded, plan, torch.tensor([prompt]))
    made = []
    for _ in range(tokens):
        made.append(int(logits.argmax()))
        logits = loaded.model(torch.tensor([made[-1:]]), past_key_values=cache).logits[:, -1]
    return made


def caches(engine):
    return [each.cache for each in engine._scheduler.running]


EVERY_PLAN = {
    "full": lambda loaded: full_cache_plan(loaded.identity, loaded.geometry, 256, bits=32),
    "ring": lambda loaded: make_plan(loaded, BUDGETS, StreamingLLM(), bits=32, context_length=256),
    "scored": lambda loaded: make_plan(loaded, BUDGETS, HeavyHitter(eviction_interval=4, distance=0), 32, 256),
    "chunked": lambda loaded: with_chunked_prefill(
        make_plan(loaded, BUDGETS, HeavyHitter(eviction_interval=4, distance=0), 32, 256), 11
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", EVERY_PLAN)
def test_requests_in_a_batch_get_the_tokens_that_they_get_alone(loaded, kind):
    plan = EVERY_PLAN[kind](loaded)
    wanted = [*prompts(4), *prompts(3, 20, seed=1), *prompts(2, 130, seed=2)]
    with engine_of(loaded, plan, max_batched_tokens=7) as engine:
        answers = [ask(engine, prompt, 16) for prompt in wanted]
        for prompt, answer in zip(wanted, answers, strict=True):
            assert answer.tokens() == alone(loaded, plan, prompt, 16)


def test_under_concurrency_every_cache_holds_what_the_plan_says_and_no_dense_cache_does(loaded, plan):
    seen = []

    def look(engine):
        for cache in caches(engine):
            kept = [len(cache.cached_positions(*place)) for place in GRID]
            budgets = [tokens for row in BUDGETS for tokens in row]
            assert all(budget - 4 <= count <= budget for count, budget in zip(kept, budgets, strict=True))
            assert cache.nbytes <= cache.reserved_bytes
            cache.check_integrity(cache.get_seq_length())
            seen.append(cache.get_seq_length())

    with engine_of(loaded, plan) as engine:
        answers = [ask(engine, prompt, 30, take=lambda _: look(engine)) for prompt in prompts(8)]
        for answer in answers:
            assert len(answer.tokens()) == 30
    assert len(seen) > 1000
    assert max(seen) > 80


def test_a_batch_path_that_keeps_everything_fails(loaded, plan, monkeypatch):
    """The check that the others rely on: a cache that grows beyond its plan is noticed, and its request fails."""
    dense = full_cache_plan(loaded.identity, loaded.geometry, 256, bits=32)
    with engine_of(loaded, plan) as engine:
        measure = engine._scheduler.measure

        def swap_in_dense():
            for sequence in engine._scheduler.running:
                if sequence.cache.plan is plan:
                    sequence.cache = prefill(loaded, dense, torch.tensor([PROMPT]))[0]
                    sequence.cache._reserved_bytes = plan.bytes_for(sequence.request.max_tokens)
            return measure()

        monkeypatch.setattr(engine._scheduler, "measure", swap_in_dense)
        assert isinstance(ask(engine, PROMPT).error, ReservationExceededError)


def test_state_counts_full_and_cached_entries_from_the_caches(loaded, plan):
    states = []
    with engine_of(loaded, plan) as engine:
        process_measurement = engine._scheduler.process_measurement

        def measured(measurement):
            process_measurement(measurement)
            state = engine.state()
            real = sum(len(cache.cached_positions(*place)) for cache in caches(engine) for place in GRID)
            states.append((state.full_entries, state.cached_entries, real, state.allocated_bytes, state.reserved_bytes))
            assert state.allocated_bytes >= sum(cache.nbytes for cache in caches(engine))

        engine._scheduler.process_measurement = measured
        for answer in [ask(engine, prompt, 30) for prompt in prompts(5)]:
            answer.wait()
        idle(engine)
    full = max(states)
    assert full[0] > 5 * 4 * 70 > 3 * full[1] > 0
    assert all(kept == real for _, kept, real, _, _ in states)
    assert all(held <= promised for *_, held, promised in states)


def pool_for(plan, loaded, sequences, tokens, prompt):
    return sequences * plan.bytes_for(tokens) + prefill_workspace_bytes(plan, prompt, loaded.model.dtype.itemsize)


def test_as_many_run_as_fit_and_bytes_never_exceed_the_pool(loaded):
    plan = make_plan(loaded, [[60, 60], [60, 60]], StreamingLLM(), bits=32, context_length=256)
    # The prompt of the last needs its transient beside the others' caches.
    pool = pool_for(plan, loaded, 3, 256, 53) + plan.bytes_for(256) // 2
    most, held = [], []
    with engine_of(loaded, plan, pool) as engine:

        def look(_):
            most.append(len(engine._scheduler.running))
            held.append(sum(cache.nbytes for cache in caches(engine)))
            assert engine._scheduler.budget.reserved_bytes <= pool

        answers = [ask(engine, prompt, 40, take=look) for prompt in prompts(9)]
        assert all(len(answer.tokens()) == 40 for answer in answers)
        idle(engine)
        state = engine.state()
    assert max(most) == 3
    assert max(held) <= state.peak_bytes <= pool
    assert (state.reserved_bytes, state.allocated_bytes) == (0, 0)
    assert state.counts.finished == 9


def test_short_requests_take_less_so_that_more_of_them_run(loaded):
    plan = make_plan(loaded, [[200, 200], [200, 200]], StreamingLLM(), bits=16, context_length=256)
    most = []
    with engine_of(loaded, plan, pool_for(plan, loaded, 1, 256, 10)) as engine:
        look = lambda _: most.append(len(engine._scheduler.running))  # noqa: E731
        for answer in [ask(engine, prompt, 20, take=look) for prompt in prompts(12, 10)]:
            answer.wait()
    assert max(most) >= 6


def test_first_come_first_served_and_nobody_overtakes(loaded):
    plan = make_plan(loaded, [[60, 60], [60, 60]], StreamingLLM(), bits=32, context_length=256)
    order = []
    with engine_of(loaded, plan, pool_for(plan, loaded, 2, 256, 100)) as engine:
        answers = []
        for place, prompt in enumerate([*prompts(1, 100), *prompts(1, 120), *prompts(4, 5), *prompts(2, 90)]):
            note = lambda event, place=place: order.append(place) if hasattr(event, "cached_tokens") else None  # noqa: E731
            answers.append(ask(engine, prompt, 15, take=note))
        for answer in answers:
            answer.wait()
    assert order == sorted(order)
    assert len(order) == 8


def test_the_memory_of_a_waiting_request_is_computed_once_per_plan(loaded, monkeypatch):
    plan, other = (make_plan(loaded, [[n, n]] * 2, StreamingLLM(), bits=32, context_length=256) for n in (60, 50))
    with engine_of(loaded, plan, pool_for(plan, loaded, 1, 256, 53)) as engine:
        first = ask(engine, PROMPT, 150)
        until(lambda: engine.state().running)
        computed = []
        original = scheduler.memory_required
        monkeypatch.setattr(
            scheduler, "memory_required", lambda *args, **more: computed.append(args[1]) or original(*args, **more)
        )
        second = ask(engine, PROMPT, 150)
        steps = engine.state().counts.steps
        until(lambda: engine.state().counts.steps > steps + 20)
        assert computed == [plan, plan]  # when it is submitted, and when it is first in the queue
        engine.swap_plan(other)
        assert len(first.tokens()) == len(second.tokens()) == 150
        assert computed == [plan, plan, other]


def test_a_full_queue_rejects_and_says_when_to_retry(loaded):
    plan = make_plan(loaded, [[60, 60], [60, 60]], StreamingLLM(), bits=32, context_length=256)
    with engine_of(loaded, plan, pool_for(plan, loaded, 1, 256, 53), max_waiting=3) as engine:
        first = ask(engine, PROMPT, 150)
        until(lambda: engine.state().running)
        others = [ask(engine, PROMPT, 5) for _ in range(3)]
        with pytest.raises(QueueFullError) as refused:
            ask(engine, PROMPT, 5)
        assert 1 <= refused.value.retry_after <= 120
        assert engine.state().waiting == 3
        assert len(first.tokens()) == 150
        assert [len(other.tokens()) for other in others] == [5, 5, 5]
        assert len(ask(engine, PROMPT, 5).tokens()) == 5
        assert engine.state().counts.rejected == 1


def test_a_request_that_can_never_fit_is_rejected_at_once(loaded):
    plan = make_plan(loaded, [[60, 60], [60, 60]], StreamingLLM(), bits=32, context_length=256)
    pool = pool_for(plan, loaded, 2, 256, 60)
    with engine_of(loaded, plan, pool) as engine:
        with pytest.raises(TooLargeError, match="shorten the prompt"):
            ask(engine, prompts(1, 200)[0], 50)
        with pytest.raises(TooLargeError):
            ask(engine, PROMPT, 180, n=3)
        assert len(ask(engine, PROMPT, 180, n=2).tokens(1)) == 180


def test_a_pool_smaller_than_one_sequence_and_another_models_plan_are_rejected(loaded, plan, tiny):
    with pytest.raises(UserError, match="does not hold one sequence of 256 tokens"):
        Engine(loaded, plan, EngineConfig(plan.bytes_per_sequence - 1))
    with pytest.raises(UserError, match="was made for"):
        Engine(tiny(layers=3), plan, EngineConfig(1 << 20))


def test_a_deadline_ends_waiting_and_running_requests(loaded):
    plan = make_plan(loaded, [[60, 60], [60, 60]], StreamingLLM(), bits=32, context_length=256)
    with engine_of(loaded, plan, pool_for(plan, loaded, 1, 256, 53)) as engine:
        now = time.monotonic()
        running = ask(engine, PROMPT, 200, deadline=now + 0.2)
        waiting = ask(engine, PROMPT, 5, deadline=now + 0.1)
        patient = ask(engine, PROMPT, 5)
        assert isinstance(waiting.error, DeadlineError)
        assert waiting.error.was_waiting
        assert isinstance(running.error, DeadlineError)
        assert not running.error.was_waiting
        assert len(patient.tokens()) == 5
        idle(engine)
        assert engine.state().reserved_bytes == 0


def test_a_cancelled_request_is_gone_within_a_step(engine):
    answer: Answer = ask(engine, PROMPT, 200)
    until(lambda: len(answer.events) > 5)
    answer.cancel()
    made = engine.state().counts.generation_tokens
    idle(engine)
    assert engine.state().counts.generation_tokens <= made + 2  # of a step whose count was not seen, and of the next
    assert engine.state().counts.cancelled == 1
    answer.cancel()


def test_sequences_that_exceed_their_reservation_together_fail_one_request(loaded, plan, monkeypatch):
    with engine_of(loaded, plan) as engine:
        monkeypatch.setattr(BudgetedCache, "reserved_bytes", 1)
        answer = ask(engine, PROMPT, n=2)
        assert isinstance(answer.error, ReservationExceededError)
        idle(engine)
        assert engine.state().counts.failed == 1
        assert sum(isinstance(event, Exception) for event in answer.events) == 1


def test_the_prompts_of_a_request_wait_together_or_not_at_all(loaded, plan):
    with engine_of(loaded, plan, max_waiting=4) as engine:
        answers = [Answer() for _ in range(5)]
        asked = [(work_of(PROMPT, 20), answer.take) for answer in answers]
        with pytest.raises(TooLargeError, match="5 prompts"):
            engine.submit(*asked)
        engine.submit(*asked[:4])
        assert [len(answer.tokens()) for answer in answers[:4]] == [20] * 4
        idle(engine)
        assert (engine.state().counts.cancelled, engine.state().counts.finished) == (0, 4)


def test_a_waiting_request_that_would_not_fit_under_a_new_plan_keeps_its_own(loaded):
    small, large = (make_plan(loaded, [[n, n], [n, n]], StreamingLLM(), bits=32, context_length=256) for n in (40, 200))
    with engine_of(loaded, small, pool_for(large, loaded, 1, 256, 53)) as engine:
        first = ask(engine, PROMPT, 150, n=4)
        until(lambda: engine.state().running)
        waiting, behind = ask(engine, PROMPT, 150, n=4), ask(engine, PROMPT, 20)
        engine.swap_plan(large)
        with pytest.raises(TooLargeError):
            ask(engine, PROMPT, 150, n=4)
        assert len(first.tokens(3)) == len(waiting.tokens(3)) == 150
        plans = [answer.prefill_done.plan_digest for answer in (first, waiting, behind)]
        assert plans == [small.digest, small.digest, large.digest]


def test_a_pinned_prefix_that_could_never_be_prefilled_is_rejected(loaded, plan):
    prompt = prompts(1, 100)[0]
    pool = plan.bytes_for(256) + plan.bytes_for(100)
    with engine_of(loaded, plan, pool) as engine, pytest.raises(UserError, match="does not hold"):
        engine.pin_prefix(prompt)


def test_a_stopped_sequence_ends_alone(engine):
    """For example at its stop string. Its reservation is released, and it does not count as cancelled."""
    answer = ask(engine, PROMPT, 400, n=2)
    until(lambda: len(answer.events) > 5)
    both = engine.state().reserved_bytes
    answer.handle.stop_sequence(0)
    until(lambda: engine.state().running == 1)
    until(lambda: engine.state().reserved_bytes < both)
    answer.handle.stop_sequence(1)
    idle(engine)
    counts = engine.state().counts
    assert (counts.finished, counts.cancelled, engine.state().reserved_bytes) == (1, 0, 0)
    assert max(len([e for e in answer.events if isinstance(e, TokenOutput) and e.index == one]) for one in (0, 1)) < 400


@pytest.mark.slow
def test_many_cancelled_requests_leave_nothing(loaded, plan):
    with engine_of(loaded, plan, max_waiting=1000, max_batched_tokens=16) as engine:
        answers = []
        for place, prompt in enumerate(prompts(30)):
            answers.append(ask(engine, prompt, 100, n=1 + place % 2))
            if place % 3 == 0:
                until(lambda own=answers[-1]: len(own.events) > 2 or engine.state().waiting > 10)
            for answer in answers[::2]:
                answer.cancel()
        for answer in answers:
            answer.cancel()
        idle(engine)
        state = engine.state()
        assert (state.running, state.waiting, state.reserved_bytes, state.allocated_bytes) == (0, 0, 0, 0)
        assert state.counts.cancelled + state.counts.finished == 30
        assert state.counts.cancelled > 13
        assert len(ask(engine, PROMPT, 5).tokens()) == 5


def boom(*args, **kwargs):
    raise MemoryError("no room")


@pytest.mark.slow
def test_a_request_whose_sampling_fails_harms_nobody(loaded, plan):
    with engine_of(loaded, plan) as engine:

        def at_the_tenth(_):
            if len(victim[0].events) == 10:
                for each in engine._scheduler.running:
                    if each.sampling.params.seed == 99:
                        each.sampling.build_logit_processors = boom

        victim = []
        others = [ask(engine, prompt, 24) for prompt in prompts(3)]
        victim.append(ask(engine, PROMPT, 100, temperature=1.0, seed=99, logit_bias={65: 1.0}, take=at_the_tenth))
        more = [ask(engine, prompt, 24) for prompt in prompts(3, seed=1)]
        assert isinstance(victim[0].error, MemoryError)
        wanted = [*prompts(3), *prompts(3, seed=1)]
        for prompt, answer in zip(wanted, [*others, *more], strict=True):
            assert answer.tokens() == alone(loaded, plan, prompt, 24)
        idle(engine)
        state = engine.state()
        assert (state.counts.failed, state.counts.finished, state.reserved_bytes, state.alive) == (1, 6, 0, True)


def test_a_prompt_that_fails_and_a_client_that_fails_harm_nobody(loaded, plan):
    with engine_of(loaded, plan) as engine:
        bad = ask(engine, (1, 2, 10**6), 5)
        other = ask(engine, PROMPT, 30)
        sulky = Answer()

        def deliver(event):
            sulky.take(event)
            if len(sulky.events) == 3:
                raise RuntimeError("the client cannot take it")

        engine.submit((work_of(PROMPT, 30), deliver))
        assert isinstance(bad.error, Exception)
        assert isinstance(sulky.error, RuntimeError)
        assert other.tokens() == alone(loaded, plan, PROMPT, 30)
        idle(engine)
        assert engine.state().counts.failed == 2


def work_of(prompt, tokens):
    from serve_app.engine.sampling_params import SamplingParams
    from serve_app.engine.types import EngineRequest

    return EngineRequest(tuple(prompt), SamplingParams(tokens, temperature=0))


def test_a_forward_that_fails_fails_its_batch_is_logged_once_and_the_engine_goes_on(loaded, plan, monkeypatch, caplog):
    with engine_of(loaded, plan) as engine:
        answers = [ask(engine, prompt, 100) for prompt in prompts(2)]
        until(lambda: all(len(answer.events) > 1 for answer in answers))  # both decode
        with monkeypatch.context() as broken:
            broken.setattr(loaded.model.lm_head, "forward", boom)
            assert [type(answer.error) for answer in answers] == [MemoryError, MemoryError]
        assert caplog.text.count("Traceback") == 1  # of the step, not of each request
        assert ask(engine, PROMPT, 30).tokens() == alone(loaded, plan, PROMPT, 30)


def test_a_failed_batch_leaves_no_cache(loaded, plan, monkeypatch):
    # Records of the log would refer to the traceback, whose frames refer to the caches.
    monkeypatch.setattr(logging.getLogger("ray.serve"), "disabled", True)
    with engine_of(loaded, plan) as engine:
        answers = [ask(engine, prompt, 100) for prompt in prompts(2)]
        until(lambda: engine.state().running == 2)
        until(lambda: len(engine._scheduler.running) == 2)
        alive = [weakref.ref(cache) for cache in caches(engine)]
        with monkeypatch.context() as broken:
            broken.setattr(loaded.model.lm_head, "forward", boom)
            assert [type(answer.error) for answer in answers] == [MemoryError, MemoryError]
        idle(engine)
        gc.collect()
        assert [cache() for cache in alive] == [None, None]


def test_a_slow_callback_delays_no_other_thread(loaded, plan):
    entered, release = threading.Event(), threading.Event()

    def wait(_):
        entered.set()
        assert release.wait(60)

    with engine_of(loaded, plan) as engine:
        slow = ask(engine, PROMPT, 3, take=wait)
        assert entered.wait(60)
        other = ask(engine, PROMPT, 3)  # the engine's thread is still in the callback
        assert engine.state().waiting == 1
        release.set()
        assert slow.tokens() == other.tokens()


def test_a_request_that_arrives_during_a_step_shares_the_forward_of_the_next(loaded, plan, monkeypatch):
    steps, forwards, late = [], [], []
    hook = loaded.model.register_forward_hook(lambda *args: forwards.append(len(steps)))
    try:
        with engine_of(loaded, plan) as engine:
            step = engine._runner.step

            def step_while_another_arrives(batch, job, tokens):
                steps.append((len(batch), job is not None))
                if len(steps) == 5:
                    late.append(ask(engine, PROMPT, 3))
                return step(batch, job, tokens)

            monkeypatch.setattr(engine._runner, "step", step_while_another_arrives)
            first = ask(engine, PROMPT, 40)
            assert first.tokens() == alone(loaded, plan, PROMPT, 40)
            assert late[0].tokens() == first.tokens()[:3]
    finally:
        hook.remove()
    assert steps[:6] == [(0, True), *[(1, False)] * 4, (1, True)]
    assert [forwards.count(number) for number in range(1, 7)] == [1] * 6


@pytest.mark.parametrize("broken", ["reserve", "_release_unused"])
def test_a_request_that_the_scheduler_cannot_admit_or_start_fails_alone(loaded, plan, monkeypatch, broken):
    with engine_of(loaded, plan) as engine:
        with monkeypatch.context() as patch:
            patch.setattr(engine._scheduler.budget if broken == "reserve" else engine._scheduler, broken, boom)
            assert isinstance(ask(engine, PROMPT).error, MemoryError)
        assert ask(engine, PROMPT, 30).tokens() == alone(loaded, plan, PROMPT, 30)
        idle(engine)
        assert (engine.state().counts.failed, engine.state().reserved_bytes) == (1, 0)


def test_an_engine_whose_thread_dies_says_so_and_aborts_its_requests(loaded, plan, monkeypatch):
    with engine_of(loaded, plan) as engine:
        answer = ask(engine, PROMPT, 150)
        until(lambda: engine.state().running)
        monkeypatch.setattr(engine._scheduler, "measure", boom)
        assert isinstance(answer.error, DrainingError)
        until(lambda: not engine.state().alive)
        with pytest.raises(DrainingError):
            ask(engine, PROMPT)


def test_a_draining_engine_finishes_its_requests_and_takes_no_more(loaded, plan):
    with engine_of(loaded, plan) as engine:
        answers = [ask(engine, prompt, 40) for prompt in prompts(4)]
        engine.drain()
        with pytest.raises(DrainingError):
            ask(engine, PROMPT)
        assert [len(answer.tokens()) for answer in answers] == [40] * 4
        assert engine.state().draining


def test_a_request_waits_or_runs_at_every_moment_until_its_end(loaded, plan):
    with engine_of(loaded, plan, max_batched_tokens=8) as engine:
        answer, looks = ask(engine, prompts(1, 200)[0], 20), 0
        while not answer.ended.is_set():
            state = engine.state()
            assert state.running + state.waiting >= 1 or answer.ended.wait(1)
            looks += 1
        assert looks > 20


def test_a_closed_engine_aborts_its_requests(loaded, plan):
    with engine_of(loaded, plan) as engine:
        answer = ask(engine, PROMPT, 200)
        engine.close()
        assert isinstance(answer.error, DrainingError)
        assert threading.active_count() < 50


def test_prompt_logprobs_are_those_of_the_budgeted_cache(loaded, plan):
    dense = full_cache_plan(loaded.identity, loaded.geometry, 256, bits=32)
    with engine_of(loaded, plan) as engine:
        prompt = prompts(1, 120)[0]
        others = [ask(engine, each, 60) for each in prompts(3, seed=4)]
        answer = ask(engine, prompt, 1, prompt_logprobs=2, logprobs=2)
        scored = answer.prefill_done.prompt_logprobs
        only = ask(engine, prompt, 0, prompt_logprobs=0)
        assert (only.prefill_done.finish_reason, only.events[1:]) == ("length", [])
        assert [len(each.tokens()) for each in others] == [60] * 3
    assert scored[0] is None
    assert [each.token_id for each in scored[1:]] == list(prompt[1:])
    total, expected = sum(each.logprob for each in scored[1:]), score_suffix(loaded, plan, prompt, 119)
    assert total == pytest.approx(expected.log_prob, abs=0.02)
    assert abs(total - score_suffix(loaded, dense, prompt, 119).log_prob) > 1
    assert all(len(each.top) == 2 for each in scored[1:])
    assert [each.logprob for each in only.prefill_done.prompt_logprobs[1:]] == pytest.approx(
        [each.logprob for each in scored[1:]], abs=1e-3
    )


@pytest.mark.parametrize("bits", [(16, 16), (5, 4)])
def test_prompt_logprobs_reserve_the_dequantized_cache(loaded, monkeypatch, bits):
    plan = make_plan(loaded, BUDGETS, HeavyHitter(eviction_interval=4, distance=0), context_length=256)
    plan, views = with_bits(plan, [bits, bits]), []
    original = DequantizedView.__init__
    monkeypatch.setattr(DequantizedView, "__init__", lambda view, *args: views.append(view) or original(view, *args))
    task = PromptLogprobsTask(loaded, plan, prompts(1, 100)[0], 120)
    task.run()
    allocated = sum(view.entries.numel() * view.entries.element_size() for view in views)
    assert 0 < allocated <= prompt_logprobs_workspace_bytes(plan, 120, loaded.model.dtype.itemsize)


SUFFIXES = [b"", b"x", b" And so it goes.", bytes(range(40, 120)) + bytes(range(32, 90)) * 2]


@pytest.mark.slow
@pytest.mark.parametrize("bits", [(16, 16), (5, 4)])
@pytest.mark.parametrize("chunk", [None, 11])
def test_warm_is_cold_token_for_token(tiny, bits, chunk):
    loaded = byte_model(tiny, head_dim=16, max_position_embeddings=512)
    plan = make_plan(loaded, BUDGETS, HeavyHitter(eviction_interval=4, distance=0, centroids=2), context_length=512)
    plan = with_bits(with_chunked_prefill(plan, chunk) if chunk else plan, [bits, bits])
    for suffix in SUFFIXES:
        prompt = (*PROMPT, *suffix)
        with engine_of(loaded, plan) as engine:
            engine._scheduler.prefix_cache.pin(PROMPT)  # it has no entry yet
            cold = ask(engine, prompt, 13, logprobs=0)
            warm = ask(engine, prompt, 13, logprobs=0)
            again = [ask(engine, prompt, 13) for _ in range(3)]
            assert cold.tokens() == warm.tokens() == again[2].tokens()
            assert warm.prefill_done.cached_tokens == again[0].prefill_done.cached_tokens == len(PROMPT)
            said = [[token.logprob.logprob for token in each.token_outputs()] for each in (cold, warm)]
            assert said[0] == pytest.approx(said[1], abs=1e-3)


def test_a_pinned_prefix_is_a_chunk_boundary_and_nothing_else(loaded, plan):
    prompt = (*PROMPT, *b" And so on.")
    with torch.inference_mode():
        cache, _ = prefill(loaded, plan, torch.tensor([PROMPT]))
        logits = loaded.model(torch.tensor([prompt[len(PROMPT) :]]), past_key_values=cache).logits[:, -1]
        expected = []
        for _ in range(20):
            expected.append(int(logits.argmax()))
            logits = loaded.model(torch.tensor([expected[-1:]]), past_key_values=cache).logits[:, -1]
    assert len(prompt) - len(PROMPT) <= CONTINUATION_CHUNK_TOKENS
    with engine_of(loaded, plan) as engine:
        engine.pin_prefix(PROMPT)
        assert ask(engine, prompt).tokens() == expected
        assert ask(engine, prompt).prefill_done.cached_tokens == len(PROMPT)
        assert ask(engine, prompts(1)[0]).prefill_done.cached_tokens == 0
        assert ask(engine, PROMPT[:-1]).prefill_done.cached_tokens == 0
        assert ask(engine, prompt, prompt_logprobs=0).prefill_done.cached_tokens == 0


def test_a_prefix_cache_entry_that_is_filled_alongside_others_keeps_no_logits_of_theirs(loaded, plan):
    with engine_of(loaded, plan) as engine:
        others = [ask(engine, prompt, 200) for prompt in prompts(3)]
        until(lambda: len(caches(engine)) == 3)
        engine.pin_prefix(PROMPT)
        until(lambda: engine.state().prefix_cache_bytes)
        logits = engine._scheduler.prefix_cache.get(PROMPT).logits
        assert logits.untyped_storage().nbytes() == logits.nbytes
        assert all(len(other.tokens()) == 200 for other in others)


def test_prefix_cache_entries_count_in_the_pool_and_the_longest_match_wins(loaded, plan):
    with engine_of(loaded, plan) as engine:
        engine.pin_prefix(PROMPT[:20])
        engine.pin_prefix(PROMPT)
        idle(engine)
        until(lambda: engine.state().prefix_cache_bytes)
        state = engine.state()
        promised = plan.bytes_for(20) + plan.bytes_for(len(PROMPT))
        until(lambda: engine.state().reserved_bytes == promised)
        assert 0 < engine.state().prefix_cache_bytes <= promised
        assert state.counts.prompt_tokens == state.counts.finished == 0
        assert ask(engine, (*PROMPT, 65)).prefill_done.cached_tokens == len(PROMPT)
        assert ask(engine, (*PROMPT[:30], 65)).prefill_done.cached_tokens == 20
        held = engine._scheduler.prefix_cache.get(PROMPT).cache
        assert held.get_seq_length() == len(PROMPT)
    small = plan.bytes_per_sequence + plan.bytes_for(30) - 1
    with engine_of(loaded, plan, small) as engine:
        with pytest.raises(UserError, match="does not hold one sequence"):
            engine.pin_prefix(PROMPT[:30])
        with pytest.raises(UserError, match="0 tokens"):
            engine.pin_prefix([])


def test_a_plan_swap_drops_no_request_and_fills_the_prefix_cache_again(loaded, plan):
    other = make_plan(loaded, [[40, 40], [40, 40]], StreamingLLM(), bits=32, context_length=256)
    prompt, tight = (*PROMPT, *b" And so on."), prompts(1, seed=3)[0]
    with engine_of(loaded, plan, max_batched_tokens=8) as engine:
        engine.pin_prefix(PROMPT)
        before = ask(engine, tight, 60)
        until(lambda: before.events)
        engine.swap_plan(other)
        assert engine.state().plan == engine.plan.digest == other.digest
        after, declared = ask(engine, tight, 60), ask(engine, prompt, 30)
        assert before.tokens() == alone(loaded, plan, tight, 60)
        assert after.tokens() == alone(loaded, other, tight, 60)
        assert declared.prefill_done.cached_tokens == len(PROMPT)
        assert engine._scheduler.prefix_cache.get(PROMPT).cache.plan is other
        idle(engine)
        until(lambda: engine.state().reserved_bytes == other.bytes_for(len(PROMPT)))
    with engine_of(loaded, plan, other.bytes_per_sequence - 1) as engine:
        with pytest.raises(UserError, match="does not hold one sequence"):
            engine.swap_plan(other)
        assert engine.plan is plan


def test_a_cache_that_allocates_more_than_it_reserved_fails_alone(loaded, plan, caplog):
    with engine_of(loaded, plan) as engine:

        def lower(_):
            if len(answers) == 2 and len(answers[1].events) == 5:
                each = next(one for one in engine._scheduler.running if one.request.params.prompt == PROMPT)
                each.cache._reserved_bytes = 100

        answers = []
        answers.append(ask(engine, prompts(1)[0], 60))
        answers.append(ask(engine, PROMPT, 60, take=lower))
        assert isinstance(answers[1].error, ReservationExceededError)
        assert len(answers[0].tokens()) == 60


@pytest.mark.parametrize("kind", EVERY_PLAN)
def test_a_prompt_of_one_token_begins_a_cache_alone_and_alongside_others(loaded, kind):
    plan = EVERY_PLAN[kind](loaded)
    with engine_of(loaded, plan) as engine:
        assert ask(engine, PROMPT[:1]).tokens() == alone(loaded, plan, PROMPT[:1], 20)
        first = ask(engine, PROMPT, 100)
        until(lambda: first.events)
        assert ask(engine, PROMPT[:1]).tokens() == alone(loaded, plan, PROMPT[:1], 20)
        assert first.tokens() == alone(loaded, plan, PROMPT, 100)


@pytest.mark.parametrize("chunked", [False, True])
def test_attention_to_a_prompt_that_fails_fails_the_prompt_alone(loaded, plan, monkeypatch, chunked):
    """The running sequences are in the same forward."""
    plan = with_chunked_prefill(plan, 48) if chunked else plan
    owner = BudgetedLayer if chunked else RecordingLayer
    attend, steps = owner.attend, []

    def fail_late(self, query, *args):
        if query.shape[2] > 8:
            steps.append(self)
            if len(steps) > 5:
                raise MemoryError("no room")
        return attend(self, query, *args)

    with engine_of(loaded, plan, max_batched_tokens=64) as engine:
        first = ask(engine, PROMPT, 200)
        until(lambda: first.events)
        monkeypatch.setattr(owner, "attend", fail_late)
        assert isinstance(ask(engine, prompts(1, 400)[0]).error, MemoryError)
        monkeypatch.undo()
        assert first.tokens() == alone(loaded, plan, PROMPT, 200)
        idle(engine)
        assert (engine.state().counts.failed, engine.state().reserved_bytes) == (1, 0)


def test_a_sequence_whose_sliding_layer_fails_while_it_decodes_fails_alone(monkeypatch):
    loaded, _ = model_pair("gemma2")
    plan = full_cache_plan(loaded.identity, loaded.geometry, 256, bits=32)
    wanted = [tuple(ids) for ids in random_ids(2, 20).tolist()]
    update, failing = SlidingLayer.update, []

    def fail(self, *args, **kwargs):
        if any(self is layer for layer in failing):
            raise MemoryError("no room")
        return update(self, *args, **kwargs)

    monkeypatch.setattr(SlidingLayer, "update", fail)
    with engine_of(loaded, plan) as engine:
        victim, other = [ask(engine, prompt, 200) for prompt in wanted]
        until(lambda: len(caches(engine)) == 2)
        failing += caches(engine)[0].layers
        assert isinstance(victim.error, MemoryError)
        assert other.tokens() == alone(loaded, plan, wanted[1], 200)
        idle(engine)
        assert (engine.state().counts.failed, engine.state().reserved_bytes) == (1, 0)


@pytest.mark.parametrize("family", ["gemma3", "qwen3_next", "lfm2", "falcon_h1"])
def test_models_with_windows_and_states_answer_several_requests_and_prefixes_as_alone(family):
    loaded, _ = model_pair(family)
    plan = full_cache_plan(loaded.identity, loaded.geometry, 200, bits=32)
    wanted = [tuple(ids) for ids in random_ids(3, 40).tolist()]
    with engine_of(loaded, plan, max_batched_tokens=16) as engine:
        engine.pin_prefix(wanted[0])
        answers = [ask(engine, prompt, 60) for prompt in wanted]
        pinned = [ask(engine, wanted[0] + wanted[1][:length], 20) for length in (5, 9)]
        for prompt, answer in zip(wanted, answers, strict=True):
            assert answer.tokens() == alone(loaded, plan, prompt, 60)
        assert [len(answer.tokens()) for answer in pinned] == [20, 20]
        assert pinned[0].tokens() == alone(loaded, plan, wanted[0] + wanted[1][:5], 20)
        idle(engine)
        assert engine.state().counts.failed == 0


def test_a_chunk_of_a_plan_that_is_longer_than_a_step_is_processed_layer_by_layer(loaded, plan, monkeypatch):
    observed, observe_step = [], ChunkSizePolicy.observe_step

    def noted(self, batch_size, prompt_tokens, *seconds):
        observed.append(prompt_tokens)
        observe_step(self, batch_size, prompt_tokens, *seconds)

    with engine_of(loaded, with_chunked_prefill(plan, 48), max_batched_tokens=16) as engine:
        first = ask(engine, PROMPT, 200)
        until(lambda: first.events)
        monkeypatch.setattr(ChunkSizePolicy, "observe_step", noted)
        second = ask(engine, prompts(1, 3 * 48)[0], 5)
        second.wait()
        assert not first.ended.is_set()
        assert second.tokens() == alone(loaded, with_chunked_prefill(plan, 48), prompts(1, 3 * 48)[0], 5)
    assert [tokens for tokens in observed if tokens] == [24] * 6  # a layer of two
    assert observed[observed.index(24) - 1 :][:9] == [0, 24, 24] * 3


def test_a_prompt_that_is_cancelled_between_two_layers_harms_nobody(loaded, plan):
    chunked = with_chunked_prefill(plan, 48)
    with engine_of(loaded, chunked, max_batched_tokens=1) as engine:
        first = ask(engine, PROMPT, 200)
        until(lambda: first.events)
        second = ask(engine, prompts(1, 3 * 48)[0], 5)
        until(lambda: (job := engine._scheduler.prefilling) is not None and job.is_paused and job.num_processed)
        second.cancel()
        assert first.tokens() == alone(loaded, chunked, PROMPT, 200)
        idle(engine)
        state = engine.state()
        assert (state.counts.cancelled, state.reserved_bytes) == (1, 0)
        assert state.allocated_bytes == state.cached_prompt_bytes  # of the first prompt


def test_while_others_decode_a_prompt_is_prefilled_in_small_chunks(loaded, plan, monkeypatch):
    asked, next_chunk = [], PrefillJob.next_chunk

    def noted(self, loaded, tokens):
        asked.append(tokens)
        return next_chunk(self, loaded, tokens)

    monkeypatch.setattr(PrefillJob, "next_chunk", noted)
    with engine_of(loaded, plan, max_batched_tokens=24) as engine:
        first = ask(engine, PROMPT, 200)
        until(lambda: first.events)
        ask(engine, prompts(1, 200)[0], 5).wait()
        first.wait()
    assert asked[0] > 200
    assert all(8 <= tokens <= 24 for tokens in asked[1:])
    assert len(asked) > 8
