"""How the engine samples, alone and in a batch, with every sampling parameter."""

from dataclasses import replace

import pytest
import torch
from byte_model import byte_model, byte_tokenizer
from engine_client import ask, engine_of
from hypothesis import given
from hypothesis import strategies as st
from plan_factory import make_plan
from torch.utils._python_dispatch import TorchDispatchMode

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


def step(logits, states):
    """Sample a token of each row and append it."""
    made = sample_tokens(logits, states)
    for state, token in zip(states, made, strict=True):
        state.append(token.id)
    return made


def sample(params, logits, draws=1, prompt=()):
    state = SamplingState(SamplingParams(100, **params), prompt, frozenset())
    return [step(logits[None], [state])[0].id for _ in range(draws)]


def test_penalties_are_subtracted_as_openai_says():
    logits = torch.tensor([3.0, 2.0, 1.0, 0.0])
    # 0 falls to 3 - .6 - .5 n, 1 to 2 - .6 - .5 n
    params = {"temperature": 0, "presence_penalty": 0.6, "frequency_penalty": 0.5}
    assert sample(params, logits, 5) == [0, 1, 0, 0, 2]
    assert sample({"temperature": 0, "frequency_penalty": -1.0}, logits, 3) == [0, 0, 0]


def test_a_repetition_penalty_divides_what_is_positive_and_multiplies_what_is_not():
    assert sample({"temperature": 0, "repetition_penalty": 2.0}, torch.tensor([3.0, 2.0, -1.0]), prompt=[0]) == [1]
    assert sample({"temperature": 0, "repetition_penalty": 2.0}, torch.tensor([-1.0, -1.5, -9.0]), prompt=[0]) == [1]


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


def kept_probabilities(scores, params):
    """Probabilities after temperature, with 0 for what is left out."""
    probabilities = (scores / params.temperature).double().softmax(-1)
    ordered = probabilities.sort(descending=True).values[: params.top_k or None]
    share_before = (ordered.cumsum(0) - ordered) / ordered.sum()
    nucleus = ordered if params.top_p >= 1 else ordered[share_before < params.top_p]
    left_out = (probabilities < nucleus[-1]) | (probabilities < params.min_p * probabilities.max())
    return probabilities.masked_fill(left_out, 0)


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"top_p": 0.9},
        {"top_k": 3},
        {"min_p": 0.1},
        {"temperature": 0.5},
        {"temperature": 2.0, "top_k": 4, "top_p": 0.8},
        {"top_p": 0.97, "min_p": 0.05},
    ],
)
@pytest.mark.parametrize("vocabulary", [5, 200])  # fewer tokens, and more, than those among which top-p is tried first
def test_draws_come_as_often_as_they_should(params, vocabulary):
    logits = torch.linspace(2, -2, vocabulary)[torch.randperm(vocabulary, generator=torch.Generator().manual_seed(0))]
    states = [SamplingState(SamplingParams(100, seed=seed, **params), (), frozenset()) for seed in range(200)]
    made = [token.id for _ in range(100) for token in step(logits.expand(200, -1), states)]
    found = torch.bincount(torch.tensor(made), minlength=vocabulary) / len(made)
    expected = kept_probabilities(logits, SamplingParams(100, **params))
    expected /= expected.sum()
    assert not found[expected == 0].any()
    assert ((found - expected).abs() <= 5 * (expected / len(made)).sqrt()).all()


VOCABULARY = 300
ENDS = frozenset([3, 200])
TOKEN_IDS = st.integers(0, VOCABULARY - 1)
PENALTIES = st.sampled_from([0.0, 0.0, 0.7, -1.0])
PARAMS = st.builds(
    SamplingParams,
    st.just(100),
    temperature=st.sampled_from([0.0, 0.5, 1.0, 1.7]),
    top_p=st.one_of(st.just(1.0), st.floats(0.05, 0.99)),
    top_k=st.one_of(st.just(0), st.integers(1, VOCABULARY + 5)),
    min_p=st.one_of(st.just(0.0), st.floats(0.01, 0.5)),
    seed=st.integers(-5, 2**63),
    min_tokens=st.integers(0, 3),
    presence_penalty=PENALTIES,
    frequency_penalty=PENALTIES,
    repetition_penalty=st.sampled_from([1.0, 1.0, 1.3, 0.8]),
    logit_bias=st.dictionaries(TOKEN_IDS, st.sampled_from([-100.0, -1.5, 3.0]), max_size=4),
)
ROWS = st.lists(
    st.tuples(PARAMS, st.lists(TOKEN_IDS, max_size=8), st.sampled_from([None, 0, 1, 5])), min_size=1, max_size=6
)


def states_of(rows):
    return [SamplingState(params, tuple(prompt), ENDS, num_logprobs=top) for params, prompt, top in rows]


def random_logits(rows, seed, steps=4):
    """Logits of several steps, of which many are equal."""
    return (torch.randn(steps, rows, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 2).bfloat16().float()


def tokens_within_rounding(logits, params, prompt, made, uniform):
    """What one row may get, computed without a batch; more than one token only if rounding decides."""
    scores = logits.clone()
    for token, bias in params.logit_bias.items():
        scores[token] += bias
    for token in {*made, *(prompt if params.repetition_penalty != 1 else ())}:
        penalty = params.repetition_penalty
        scores[token] = scores[token] / penalty if scores[token] > 0 else scores[token] * penalty
    for token in set(made):
        scores[token] -= params.frequency_penalty * made.count(token) + params.presence_penalty
    if len(made) < params.min_tokens:
        scores[list(ENDS)] = -torch.inf
    if params.temperature == 0:
        return {int(scores.argmax())}
    tokens = set()
    for error in (-1e-5, 1e-5):
        kept = kept_probabilities(scores, replace(params, top_p=params.top_p + error if params.top_p < 1 else 1.0))
        points = torch.tensor([uniform - 1e-5, uniform + 1e-5]).clamp(0, 1 - 1e-9).double() * kept.sum()
        tokens |= set(torch.searchsorted(kept.cumsum(0), points, right=True).tolist())
    return tokens


@given(ROWS, st.integers(0, 1000))
def test_a_batch_gives_each_row_what_a_plain_loop_gives_it(rows, seed):
    states = states_of(rows)
    made = [[] for _ in rows]
    for logits in random_logits(len(rows), seed):
        uniforms = [state.uniform for state in states]
        for row, token in enumerate(step(logits, states)):
            params, prompt, top = rows[row]
            assert token.id in tokens_within_rounding(logits[row], params, prompt, made[row], uniforms[row])
            made[row].append(token.id)
            if top is None:
                assert token.logprob is None
                continue
            expected = logits[row].log_softmax(-1)
            assert token.logprob.id == token.id
            assert token.logprob.logprob == pytest.approx(float(expected[token.id]), abs=1e-5)
            assert [value for _, value in token.logprob.top] == pytest.approx(
                expected.topk(top).values.tolist(), abs=1e-5
            )
            assert all(value == pytest.approx(float(expected[id]), abs=1e-5) for id, value in token.logprob.top)


@given(ROWS, st.integers(0, 1000), st.randoms(use_true_random=False))
def test_no_row_depends_on_the_others_or_on_its_place(rows, seed, shuffler):
    steps = random_logits(len(rows), seed)
    alone, together = states_of(rows), states_of(rows)
    order = list(range(len(rows)))
    for logits in steps:
        shuffler.shuffle(order)
        batch = dict(zip(order, step(logits[order], [together[row] for row in order]), strict=True))
        for row, state in enumerate(alone):
            (token,) = step(logits[row : row + 1], [state])
            assert batch[row].id == token.id


@pytest.mark.parametrize("params", [{}, {"top_p": 0.9}, {"top_k": 5}, {"min_p": 0.1}, {"frequency_penalty": 1.0}])
@pytest.mark.parametrize("broken", [torch.nan, torch.inf, -torch.inf])
def test_a_row_without_probabilities_fails_alone(params, broken):
    logits = random_logits(3, 0, steps=1)[0]
    states = [SamplingState(SamplingParams(100, seed=seed, **params), (), ENDS, num_logprobs=2) for seed in range(3)]
    expected = sample_tokens(logits, states)
    logits[1] = broken
    first, failed, last = sample_tokens(logits, states)
    assert [first.id, last.id] == [expected[0].id, expected[2].id]
    assert isinstance(failed, ValueError)


def test_a_row_that_raises_fails_alone_and_the_others_get_what_they_would_have_got():
    logits = random_logits(3, 0, steps=1)[0]
    states = states_of([(SamplingParams(100, seed=seed), (), 2) for seed in range(3)])
    expected = sample_tokens(logits, states)
    states[1] = SamplingState(SamplingParams(100, logit_bias={VOCABULARY: 1.0}), (), ENDS)
    first, failed, last = sample_tokens(logits, states)
    assert (first, last) == (expected[0], expected[2])
    assert isinstance(failed, IndexError)


class Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


def test_a_greedy_batch_costs_one_argmax():
    states = states_of([(SamplingParams(100, temperature=0), (), None)] * 4)
    logits = random_logits(4, 0, steps=1)[0]
    with Operations() as operations:
        made = step(logits, states)
    assert [token.id for token in made] == logits.argmax(-1).tolist()
    assert operations.names == ["argmax"]


def test_penalties_read_the_prompt_once():
    reads = []

    class Prompt(tuple):
        def __iter__(self):
            reads.append(self)
            return super().__iter__()

    state = SamplingState(SamplingParams(100, repetition_penalty=2.0), Prompt(range(50)), ENDS)
    for logits in random_logits(1, 0):
        step(logits, [state])
    assert len(reads) == 1
