"""How the engine samples, alone and in a batch, with every sampling parameter."""

from dataclasses import replace

import pytest
import torch
from byte_model import byte_model, byte_tokenizer
from engine_client import ask, engine_of
from hypothesis import given
from hypothesis import strategies as st
from plan_factory import make_plan

from baklava.eviction import HeavyHitter
from baklava.plan.budget_plan import full_cache_plan
from baklava.runtime.decode import generate
from serve_app.engine.sampler import SamplingState, sample_tokens
from serve_app.engine.sampling_params import SamplingParams

PROMPT = tuple(b"A river is a line of water.")


@pytest.fixture(scope="module")
def loaded(tiny):
    return byte_model(tiny)


@pytest.fixture(scope="module")
def engine(loaded):
    with engine_of(loaded, full_cache_plan(loaded.identity, loaded.geometry, 256, bits=32)) as engine:
        yield engine


def ids(engine, **params):
    return ask(engine, PROMPT, **({"tokens": 24, "temperature": 1.0} | params)).tokens()


@pytest.mark.parametrize("tight", [False, True])
def test_a_seed_gives_the_same_tokens_alone_and_among_eight(loaded, engine, tight):
    plan = (
        make_plan(loaded, [[12, 24]] * 2, HeavyHitter(eviction_interval=4, distance=0), 32, 256)
        if tight
        else engine.plan
    )
    with engine_of(loaded, plan) as own:
        first = ids(own, seed=7)
        torch.manual_seed(0)
        together = [ask(own, PROMPT, 24, temperature=1.0, seed=seed) for seed in range(8)]
        assert together[7].tokens() == first
        assert len({tuple(each.tokens()) for each in together}) == 8


def test_requests_without_a_seed_differ(engine):
    assert ids(engine) != ids(engine)


@pytest.mark.parametrize("params", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}, {"temperature": 1e-7}])
def test_truncation_to_one_token_is_greedy(engine, params):
    assert ids(engine, **params) == ids(engine, temperature=0)


def test_sequences_of_a_request_have_consecutive_seeds_and_ends_of_their_own(engine):
    answer = ask(engine, PROMPT, 24, n=3, seed=5, temperature=1.0)
    assert [answer.tokens(index) for index in range(3)] == [ids(engine, seed=seed) for seed in (5, 6, 7)]
    assert [answer.token_outputs(index)[-1].finish_reason for index in range(3)] == ["length"] * 3


def test_greedy_sequences_are_the_same_and_independent(loaded):
    plan = make_plan(loaded, [[12, 24]] * 2, HeavyHitter(eviction_interval=4, distance=0), 32, 256)
    with engine_of(loaded, plan) as engine:
        answer = ask(engine, PROMPT, 40, n=3)
        assert answer.tokens(0) == answer.tokens(1) == answer.tokens(2) == ask(engine, PROMPT, 40).tokens()


def test_stop_tokens_end_a_text_and_the_models_own_unless_ignored(tiny, engine):
    tokens = ids(engine, temperature=0)
    place = next(place for place in range(3, 24) if tokens[place] not in tokens[:place])
    made = ask(engine, PROMPT, 24, stop_token_ids=frozenset([tokens[place]])).token_outputs()
    assert [token.token_id for token in made] == tokens[: place + 1]
    assert [token.finish_reason for token in made] == [None] * place + ["stop"]
    other = byte_model(tiny, eos_token_id=tokens[place])
    with engine_of(other, full_cache_plan(other.identity, other.geometry, 256, bits=32)) as ending:
        assert ids(ending, temperature=0) == tokens[: place + 1]
        assert ids(ending, temperature=0, ignore_eos=True) == tokens
        longer = ids(ending, temperature=0, min_tokens=place + 5)
        assert len(longer) >= place + 5
        assert tokens[place] not in longer[: place + 5]
        drawn = ids(ending, min_tokens=20, seed=3, logit_bias={tokens[place]: 100.0})
        assert len(drawn) == 21
        assert drawn[-1] == tokens[place]


def test_the_end_token_of_the_tokenizer_ends_a_text_like_the_models_own(loaded, engine):
    tokens = ids(engine, temperature=0)
    place = next(place for place in range(3, 24) if tokens[place] not in tokens[:place])
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(tokens[place])
    other = replace(loaded, tokenizer=tokenizer)
    assert other.eos_token_ids == {tokens[place]}
    with engine_of(other, full_cache_plan(other.identity, other.geometry, 256, bits=32)) as ending:
        made = ask(ending, PROMPT, 24).token_outputs()
        assert [token.token_id for token in made] == tokens[: place + 1]
        assert made[-1].finish_reason == "stop"
        assert ids(ending, temperature=0, ignore_eos=True) == tokens
        assert tokens[place] not in ids(ending, temperature=0, min_tokens=place + 5)[: place + 5]
    assert generate(other, engine.plan, PROMPT, max_new_tokens=24) == tokens[: place + 1]
    assert generate(other, engine.plan, PROMPT, max_new_tokens=24, eos_token_id=0) == tokens


def test_the_last_token_says_that_the_length_is_reached(engine):
    assert [token.finish_reason for token in ask(engine, PROMPT, 5).token_outputs()] == [
        None,
        None,
        None,
        None,
        "length",
    ]


def test_a_bias_brings_a_token_in_and_keeps_one_out(engine):
    greedy = ids(engine, temperature=0)
    assert ids(engine, temperature=0, logit_bias={77: 100.0}) == [77] * 24
    assert greedy[0] not in ids(engine, logit_bias={greedy[0]: -100.0}, seed=1)


def test_logprobs_are_those_of_the_raw_logits(loaded, engine):
    made = ask(engine, PROMPT, 6, logprobs=3, temperature=2.0, seed=4, logit_bias={50: 2.0}, top_k=40).token_outputs()
    text = torch.tensor([[*PROMPT, *(token.token_id for token in made)]])
    with torch.inference_mode():
        expected = loaded.model(text).logits[0].log_softmax(-1)
    for place, token in enumerate(made):
        row = expected[len(PROMPT) - 1 + place]
        assert token.logprob.token_id == token.token_id
        assert token.logprob.logprob == pytest.approx(float(row[token.token_id]), abs=1e-3)
        best = row.topk(3)
        assert [each for each, _ in token.logprob.top] == best.indices.tolist()
        assert [each for _, each in token.logprob.top] == pytest.approx(best.values.tolist(), abs=1e-3)
    assert all(token.logprob is None for token in ask(engine, PROMPT, 3).token_outputs())


def sample(params, logits, draws=1, prompt=(), ends=frozenset()):
    state = SamplingState(SamplingParams(100, **params), prompt, ends)
    made = []
    for _ in range(draws):
        (token,) = sample_tokens(logits[None], [state])
        state.append(token.id)
        made.append(token.id)
    return made


def test_penalties_are_subtracted_as_openai_says():
    logits = torch.tensor([3.0, 2.0, 1.0, 0.0])
    # 0 falls to 3 - .6 - .5 n, 1 to 2 - .6 - .5 n
    params = {"temperature": 0, "presence_penalty": 0.6, "frequency_penalty": 0.5}
    assert sample(params, logits, 5) == [0, 1, 0, 0, 2]
    assert sample({"temperature": 0, "frequency_penalty": -1.0}, logits, 3) == [0, 0, 0]


def test_a_repetition_penalty_divides_what_is_positive_and_multiplies_what_is_not():
    assert sample({"temperature": 0, "repetition_penalty": 2.0}, torch.tensor([3.0, 2.0, -1.0]), prompt=[0]) == [1]
    assert sample({"temperature": 0, "repetition_penalty": 2.0}, torch.tensor([-1.0, -1.5, -9.0]), prompt=[0]) == [1]


def shares(params, logits, draws=4000):
    made = torch.tensor(sample({"seed": 1} | params, logits, draws))
    return torch.bincount(made, minlength=len(logits)) / draws


@given(st.floats(0.05, 0.999), st.integers(0, 6), st.floats(0, 0.9), st.integers(0, 20))
def test_only_tokens_that_truncation_leaves_are_drawn_and_all_of_them_may_be(top_p, top_k, min_p, seed):
    logits = torch.randn(700, generator=torch.Generator().manual_seed(seed)) * 2
    params = {"top_p": top_p, "top_k": top_k, "min_p": min_p}
    kept = set(range(700))
    scores = logits.clone()
    if top_k:
        scores[logits < logits.topk(top_k).values[-1]] = -torch.inf
    probabilities = scores.softmax(-1)
    ordered = probabilities.sort(descending=True)
    kept = set(ordered.indices[(ordered.values.cumsum(0) - ordered.values) < top_p - 1e-6].tolist())
    kept &= set((probabilities >= min_p * probabilities.max() - 1e-9).nonzero()[:, 0].tolist()) | {int(logits.argmax())}
    slack = {int(ordered.indices[0]), *(int(i) for i in ordered.indices[len(kept) : len(kept) + 1])}
    found = set(sample({"seed": seed} | params, logits, 60))
    assert found <= kept | slack


@pytest.mark.parametrize("params", [{}, {"top_p": 0.9}, {"top_k": 3}, {"min_p": 0.1}, {"temperature": 0.5}])
def test_draws_come_as_often_as_they_should(params):
    logits = torch.tensor([2.0, 1.0, 0.5, -1.0, -2.0])
    scaled = logits / params.get("temperature", 1.0)
    left = scaled.softmax(-1)
    if "top_p" in params:
        left = torch.where(left.cumsum(0) - left < 0.9, left, 0)
    if "top_k" in params:
        left = torch.where(torch.arange(5) < 3, left, 0)
    if "min_p" in params:
        left = torch.where(left >= 0.1 * left.max(), left, 0)
    assert (shares(params, logits) - left / left.sum()).abs().max() < 0.03
