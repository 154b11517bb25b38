import pytest
import torch
from byte_model import END, byte_model, byte_tokenizer
from handmade import plan_of
from hypothesis import given
from hypothesis import strategies as st

from baklava.cache import BudgetedCache
from baklava.errors import UserError
from baklava.eviction import HeavyHitter, Streaming
from baklava.plan import full_plan
from serve_app.engine import BrokenPromiseError, Engine
from serve_app.sampling import Sampling
from serve_app.text import Detokenizer, StopStrings, pieces

PROMPT = list(b"A river is a line of water.")


@pytest.fixture(scope="module")
def loaded(tiny):
    return byte_model(tiny)


@pytest.fixture(scope="module")
def engine(loaded):
    return Engine(loaded, full_plan(loaded.identity, loaded.geometry, 256, bits=32))


def ids(engine, **wishes):
    return [token.id for token in engine.generate(PROMPT, Sampling(**({"max_tokens": 24} | wishes)))]


@pytest.mark.parametrize("eviction", [Streaming(), HeavyHitter(interval=4, distance=0)])
def test_a_plan_that_covers_the_text_gives_the_tokens_of_transformers_own_cache(loaded, eviction):
    engine = Engine(loaded, plan_of(loaded, [[64, 72]] * loaded.geometry.layers, eviction, context_length=256))
    reference = loaded.model.generate(
        torch.tensor([PROMPT]), attention_mask=torch.ones(1, len(PROMPT)), max_new_tokens=24, do_sample=False
    )
    assert ids(engine, temperature=0) == reference[0, len(PROMPT) :].tolist()


def test_a_seed_gives_the_same_tokens_whatever_else_draws_random_numbers(engine):
    first = ids(engine, seed=7)
    torch.manual_seed(0)
    torch.rand(10)
    assert ids(engine, seed=7) == first
    assert ids(engine, seed=8) != first


def test_requests_without_a_seed_differ(engine):
    assert ids(engine) != ids(engine)


@pytest.mark.parametrize("wish", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}, {"temperature": 1e-7}])
def test_truncation_to_one_token_is_greedy(engine, wish):
    assert ids(engine, **wish) == ids(engine, temperature=0)


@pytest.fixture(scope="module")
def ending(engine):
    """Greedy tokens and the place of one that had not come before: a token to stop on."""
    tokens = ids(engine, temperature=0)
    return tokens, next(place for place in range(3, 24) if tokens[place] not in tokens[:place])


def test_a_stop_token_ends_the_text(engine, ending):
    tokens, place = ending
    made = list(engine.generate(PROMPT, Sampling(24, temperature=0, stop_ids=frozenset([tokens[place]]))))
    assert [token.id for token in made] == tokens[: place + 1]
    assert [token.finish for token in made] == [None] * place + ["stop"]


def test_the_models_end_token_ends_the_text_unless_it_is_ignored(tiny, ending):
    tokens, place = ending
    other = byte_model(tiny, eos_token_id=tokens[place])
    engine = Engine(other, full_plan(other.identity, other.geometry, 256, bits=32))
    assert ids(engine, temperature=0) == tokens[: place + 1]
    assert ids(engine, temperature=0, ignore_eos=True) == tokens
    longer = ids(engine, temperature=0, min_tokens=place + 5)
    assert len(longer) >= place + 5
    assert tokens[place] not in longer[: place + 5]


def test_the_last_token_says_that_the_length_is_reached(engine):
    made = list(engine.generate(PROMPT, Sampling(max_tokens=5, temperature=0)))
    assert [token.finish for token in made] == [None, None, None, None, "length"]


@pytest.mark.parametrize("eviction", [Streaming(), HeavyHitter(interval=4, distance=0)])
def test_a_sequence_far_over_the_budget_holds_what_was_promised_and_no_more(loaded, eviction):
    plan = plan_of(loaded, [[12, 24]] * loaded.geometry.layers, eviction, context_length=256)
    engine = Engine(loaded, plan)
    ids(engine, max_tokens=60)
    assert 0 < engine.held_last <= engine.held_most <= plan.bytes_per_sequence
    assert engine.held_most < plan.full_bytes_per_sequence / 4


def test_a_broken_promise_is_an_error_and_no_token(engine, monkeypatch):
    monkeypatch.setattr(BudgetedCache, "promised_bytes", property(lambda cache: 100))
    with pytest.raises(BrokenPromiseError, match="promises at most 100"):
        ids(engine)


def test_a_plan_for_another_model_is_refused(engine, tiny):
    with pytest.raises(UserError, match="was made for"):
        Engine(tiny(layers=3), engine.plan)


def test_closing_a_generation_lets_the_next_one_in(engine):
    tokens = engine.generate(PROMPT, Sampling(max_tokens=100))
    next(tokens)
    tokens.close()
    assert len(ids(engine, max_tokens=3)) == 3


def text_of(engine, loaded, stops=(), **wishes):
    made = list(pieces(engine, loaded.tokenizer, PROMPT, Sampling(**({"max_tokens": 24} | wishes)), stops))
    return "".join(piece.text for piece in made), made


def test_the_pieces_make_up_the_decoded_text_one_per_token(engine, loaded):
    text, made = text_of(engine, loaded, temperature=0)
    assert text == bytes(ids(engine, temperature=0)).decode()
    assert len(made) == 24
    assert made[-1].finish == "length"


def test_a_stop_string_across_tokens_ends_the_text_and_is_left_out(engine, loaded):
    whole, _ = text_of(engine, loaded, seed=1)
    stop = whole[10:13]
    text, made = text_of(engine, loaded, (stop, "never"), seed=1)
    assert text == whole[: whole.find(stop)]
    assert made[-1].finish == "stop"
    assert len(made) == len(text) + 3


def test_a_token_that_stops_adds_no_text(engine, loaded, ending):
    tokens, place = ending
    text, made = text_of(engine, loaded, temperature=0, stop_ids=frozenset([tokens[place]]))
    assert text == bytes(tokens[:place]).decode()
    assert made[-1].finish == "stop"


TOKENIZER = byte_tokenizer()


@given(st.text(max_size=30))
def test_no_character_is_sent_before_its_last_byte(text):
    detokenizer = Detokenizer(TOKENIZER)
    sent = ""
    for byte in text.encode():
        sent += detokenizer.push(byte)
        assert text.startswith(sent)
    assert sent == text or text.endswith("\ufffd")
    assert sent + detokenizer.flush() == text


@given(st.binary(max_size=24))
def test_bytes_that_are_no_text_come_out_as_replacement_characters_in_the_end(data):
    detokenizer = Detokenizer(TOKENIZER)
    sent = "".join(map(detokenizer.push, data)) + detokenizer.flush()
    assert sent.replace("\ufffd", "") == data.decode(errors="replace").replace("\ufffd", "")


def test_the_end_token_has_no_text():
    detokenizer = Detokenizer(TOKENIZER)
    assert detokenizer.push(END) + detokenizer.push(65) == "A"


@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=5), max_size=4), st.data())
def test_text_before_the_first_stop_string_is_sent_and_never_part_of_one(text, stops, data):
    found = [place for stop in stops if (place := text.find(stop)) >= 0]
    finder, sent, rest = StopStrings(stops), "", text
    while rest and not finder.hit:
        size = data.draw(st.integers(1, 3))
        sent += finder.push(rest[:size])
        rest = rest[size:]
    if not finder.hit:
        sent += finder.flush()
    assert finder.hit == bool(found)
    # Of two stop strings the one that is complete first wins, and it may begin later.
    assert text.startswith(sent)
    assert not any(stop in sent for stop in stops)
    assert found or sent == text
