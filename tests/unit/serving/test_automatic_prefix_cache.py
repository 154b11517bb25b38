"""Prompts continue the caches of earlier ones, and nothing but time tells."""

import random

import pytest
import torch
from byte_model import byte_model
from engine_client import ask, engine_of, idle, until
from inprocess_replica import ask as post
from inprocess_replica import make_replica
from model_families import model_pair
from plan_factory import make_plan, with_bits, with_chunked_prefill

from baklava.cache.storage import allocated_bytes, slab
from baklava.eviction import AttentionMatching, ExpectedAttention, HeavyHitter, StreamingLLM
from baklava.plan.budget_plan import full_cache_plan
from serve_app.api.network import ApiKeys
from serve_app.api.routes import create_app
from serve_app.engine.automatic_prefix_cache import AutomaticPrefixCache, chunk_ends

BUDGETS = [[12, 24], [16, 20]]
CHUNK = 16
DOCUMENT = tuple(b"A river is a line of water that goes down to the sea. It is never the same twice. ")
QUESTIONS = [tuple(text) for text in (b"Is it long?", b"Where does it go to, and why?", b"Who says so?")]


@pytest.fixture(scope="module")
def loaded(tiny):
    return byte_model(tiny, head_dim=32)


def chunked(loaded, eviction=None, bits=None):
    eviction = eviction or HeavyHitter(eviction_interval=4, distance=0)
    plan = make_plan(loaded, BUDGETS, eviction, bits=16, context_length=256)
    return with_chunked_prefill(with_bits(plan, bits) if bits else plan, CHUNK)


@pytest.fixture
def plan(loaded):
    return chunked(loaded)


def answers_without(loaded, plan, prompts, tokens=12):
    with engine_of(loaded, plan, prefix_caching=False) as engine:
        return [ask(engine, prompt, tokens).tokens() for prompt in prompts]


def cached(engine, prompt, **options):
    return ask(engine, prompt, 4, **options).prefill_done.cached_tokens


def test_a_prompt_continues_the_last_whole_chunk_of_one_that_begins_as_it_does(loaded, plan):
    with engine_of(loaded, plan) as engine:
        # The first prompt ends within the sixth chunk, and five chunks are of the document alone.
        assert [cached(engine, DOCUMENT + question) for question in QUESTIONS] == [0, 80, 80]
        assert cached(engine, DOCUMENT[:60]) == 0  # the middle of the document was not kept
        assert cached(engine, DOCUMENT[:60]) == 48
        assert cached(engine, DOCUMENT[1:60]) == 0
        idle(engine)
        state = engine.state()
    assert state.counts.cached_tokens == 80 + 80 + 48
    assert state.reserved_bytes == 0
    assert state.cached_prompt_bytes == state.allocated_bytes > 0


def test_what_two_prompts_share_is_kept_when_the_second_one_shows_it(loaded, plan):
    first, second, third = (DOCUMENT[:40] + tuple(bytes([65 + number]) * 60) for number in range(3))
    with engine_of(loaded, plan) as engine:
        assert [cached(engine, prompt) for prompt in (first, second, third)] == [0, 0, 32]


def test_the_next_turn_of_a_chat_continues_the_prompt_of_the_last(loaded, plan):
    with engine_of(loaded, plan) as engine:
        history = DOCUMENT
        for turn, question in enumerate(QUESTIONS):
            prompt = history + question
            answer = ask(engine, prompt, 8)
            expected = 0 if turn == 0 else (len(history) - 8) // CHUNK * CHUNK
            assert answer.prefill_done.cached_tokens == expected
            history = prompt + tuple(answer.tokens())


EVICTIONS = [
    HeavyHitter(eviction_interval=4, distance=0, centroids=2),
    AttentionMatching(eviction_interval=4, references=8, fit_references=12),
    ExpectedAttention(eviction_interval=4, window=20),
    StreamingLLM(),
]


@pytest.mark.parametrize("eviction", EVICTIONS, ids=lambda eviction: eviction.name)
@pytest.mark.parametrize("bits", [None, [(4, 3), (6, 5)]], ids=["16 bits", "packed"])
def test_answers_do_not_depend_on_what_was_asked_before(loaded, eviction, bits):
    plan, source = chunked(loaded, eviction, bits), random.Random(1)
    documents = [DOCUMENT, DOCUMENT[:50], tuple(reversed(DOCUMENT))]
    prompts = [source.choice(documents)[: source.randrange(20, 90)] + source.choice(QUESTIONS) for _ in range(24)]
    expected = answers_without(loaded, plan, prompts)
    with engine_of(loaded, plan) as engine:
        together = [ask(engine, prompt, 12) for prompt in prompts]
        assert [answer.tokens() for answer in together] == expected
        assert sum(answer.prefill_done.cached_tokens for answer in together) > 400


@pytest.mark.parametrize("family", ["gemma3", "gemma4 shared", "qwen3_next"])
def test_other_layers_are_copied_along(family):
    loaded, _ = model_pair(family)
    plan = with_chunked_prefill(full_cache_plan(loaded.identity, loaded.geometry, 200, bits=32), CHUNK)
    prompts = [tuple(3 + (7 * place + place // 9) % 60 for place in range(70)) + (number,) * 9 for number in (5, 6, 7)]
    expected = answers_without(loaded, plan, prompts)
    with engine_of(loaded, plan) as engine:
        found = [ask(engine, prompt, 12) for prompt in prompts]
        assert [answer.tokens() for answer in found] == expected
        assert [answer.prefill_done.cached_tokens for answer in found] == [0, 64, 64]


def test_earlier_prompts_make_way_for_requests(loaded, plan):
    pool = plan.bytes_for(256) * 2
    prompts = [tuple(bytes([40 + number]) * 90) for number in range(12)]
    with engine_of(loaded, plan, pool) as engine:
        for prompt in prompts:
            assert cached(engine, prompt) == 0
        idle(engine)
        held = engine.state().cached_prompt_bytes
        assert 0 < held <= pool
        assert cached(engine, prompts[-1]) == 80
        assert cached(engine, prompts[0]) == 0  # the least recently used went first
        many = [ask(engine, prompt, 150) for prompt in prompts[:2]]
        until(lambda: engine.state().running == 2)  # each needs half of the pool
        until(lambda: engine.state().cached_prompt_bytes == 0)
        assert [len(answer.tokens()) for answer in many] == [150, 150]


def test_a_prompt_that_does_not_fit_beside_running_ones_costs_no_earlier_prompt(loaded, plan):
    pool = plan.bytes_for(256) * 2
    with engine_of(loaded, plan, pool) as engine:
        cached(engine, DOCUMENT)
        idle(engine)
        long = ask(engine, DOCUMENT[::-1], 170)
        until(lambda: engine.state().running == 1)
        waiting = ask(engine, DOCUMENT[:40], 200, n=2)  # both need more than is left
        until(lambda: engine.state().waiting == 1)
        assert engine.state().cached_prompt_bytes > 0
        long.cancel()
        assert len(waiting.tokens(1)) == 200


def test_salts_keep_prompts_apart(loaded, plan):
    with engine_of(loaded, plan) as engine:
        assert cached(engine, DOCUMENT, cache_salt="a") == 0
        assert cached(engine, DOCUMENT, cache_salt="b") == 0
        assert cached(engine, DOCUMENT, cache_salt="a") == 80


def test_another_plan_uses_nothing_of_the_one_before(loaded, plan):
    other = chunked(loaded, StreamingLLM())
    with engine_of(loaded, plan) as engine:
        cached(engine, DOCUMENT)
        engine.swap_plan(other)
        assert engine.state().cached_prompt_bytes == 0 or engine.state().running == 0
        answer = ask(engine, DOCUMENT, 12)
        assert answer.prefill_done.cached_tokens == 0
        assert answer.tokens() == answers_without(loaded, other, [DOCUMENT])[0]
        assert cached(engine, DOCUMENT) == 80
        engine.swap_plan(plan)
        assert cached(engine, DOCUMENT) == 0


def test_plans_that_prefill_densely_and_engines_that_are_told_not_to_keep_nothing(loaded, plan):
    dense = make_plan(loaded, BUDGETS, HeavyHitter(eviction_interval=4, distance=0), bits=16, context_length=256)
    for active, caching in ((dense, True), (plan, False)):
        with engine_of(loaded, active, prefix_caching=caching) as engine:
            assert [cached(engine, DOCUMENT) for _ in range(2)] == [0, 0]
            assert engine.state().cached_prompt_bytes == 0


def test_prompts_that_are_scored_or_begin_with_a_pinned_prefix_continue_no_other(loaded, plan):
    with engine_of(loaded, plan) as engine:
        cached(engine, DOCUMENT)
        assert cached(engine, DOCUMENT, prompt_logprobs=1) == 0
        engine.pin_prefix(DOCUMENT[:30])
        idle(engine)
        assert cached(engine, DOCUMENT) == 30


@pytest.mark.parametrize("seed", range(3))
def test_every_allocation_is_within_what_is_reserved_at_that_moment(loaded, monkeypatch, seed):
    source = random.Random(seed)
    active = [chunked(loaded), chunked(loaded, bits=[(4, 3), (6, 5)]), chunked(loaded, StreamingLLM())]
    allocate, looks = slab.allocate, []
    with engine_of(loaded, active[0], 3 * active[0].bytes_for(256), max_waiting=100) as engine:
        budget = engine._scheduler.budget

        def looked(nbytes, device):
            memory = allocate(nbytes, device)
            if nbytes and budget.reserved_bytes:
                looks.append((allocated_bytes().current + nbytes, budget.reserved_bytes))
            return memory

        monkeypatch.setattr(slab, "allocate", looked)
        answers = []
        for number in range(40):
            begin = source.choice([DOCUMENT, DOCUMENT[:50], ()])
            prompt = (*begin, *(source.randrange(32, 127) for _ in range(source.randrange(1, 60))))
            answers.append(ask(engine, prompt, source.randrange(1, 40), n=source.choice([1, 1, 3])))
            if source.random() < 0.3:
                source.choice(answers).cancel()
            if number % 10 == 9:
                until(lambda: engine.state().waiting < 8)
                engine.swap_plan(source.choice(active))
        idle(engine)
        state = engine.state()
        kept = engine._scheduler.earlier_prompts
        assert budget.reserved_bytes == sum(budget.reserved_by(key) for key in kept.keys)
    assert len(looks) > 100
    assert [look for look in looks if look[0] > look[1]] == []
    assert state.peak_bytes <= state.pool_bytes
    assert state.counts.failed == 0
    assert state.counts.cached_tokens > 0


def test_keys_depend_on_all_tokens_before_and_on_the_salt():
    ends = chunk_ends(range(40), 8, "")
    assert [end.num_tokens for end in ends] == [8, 16, 24, 32]
    assert [end.num_tokens for end in chunk_ends(range(41), 8, "")] == [8, 16, 24, 32, 40]
    assert chunk_ends((0, 1), 8, "") == []
    changed = chunk_ends([99, *range(1, 40)], 8, "")
    assert {end.key for end in ends}.isdisjoint(end.key for end in (*changed, *chunk_ends(range(40), 8, "s")))
    assert chunk_ends([*range(39), 99], 8, "") == ends


def test_the_memory_of_what_was_seen_is_bounded(monkeypatch):
    monkeypatch.setattr("serve_app.engine.automatic_prefix_cache.MAX_SEEN", 10)
    cache = AutomaticPrefixCache()
    for number in range(5):
        assert len(cache.worth_keeping(chunk_ends([number] * 33, 8, ""))) == 1
    assert len(cache._seen) == 10


@torch.inference_mode()
def test_what_a_copy_holds_is_what_the_reservation_says(loaded, plan):
    with engine_of(loaded, plan) as engine:
        cached(engine, DOCUMENT)
        idle(engine)
        assert engine.state().cached_prompt_bytes == plan.bytes_for(80)


def test_clients_with_other_keys_or_salts_share_nothing(loaded, plan):
    replica = make_replica(loaded, plan)
    app = create_app(replica, ApiKeys.from_keys(["first", "second"], []))

    def cached_tokens(key, **fields):
        body = {"prompt": list(DOCUMENT), "max_tokens": 2} | fields
        answer = post(app, "POST", "/v1/completions", json=body, headers={"Authorization": f"Bearer {key}"})
        assert answer.status_code == 200, answer.text
        return answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]

    try:
        assert [cached_tokens(key) for key in ("first", "second", "first", "second")] == [0, 0, 80, 80]
        assert [cached_tokens("first", cache_salt="a") for _ in range(2)] == [0, 80]
        refused = post(
            app,
            "POST",
            "/v1/completions",
            json={"prompt": "a", "cache_salt": ""},
            headers={"Authorization": "Bearer first"},
        )
        assert refused.status_code == 400
    finally:
        replica.engine.close()
