"""How much of a prompt a step takes beside those who decode."""

from types import SimpleNamespace

import pytest

from serve_app.engine import chunk_size as pace
from serve_app.engine.chunk_size import LEAST, Pace


@pytest.fixture
def clock(monkeypatch):
    """A clock that goes only when it is told to."""
    now = [0.0]
    monkeypatch.setattr(pace.time, "perf_counter", lambda: now[0])
    return now


def decoded(pace, clock, seconds):
    with pace.decoding():
        clock[0] += seconds


def entered(pace, clock, tokens, fixed=0.05, each=0.001):
    prompt = SimpleNamespace(taken=0)
    with pace.entering(prompt):
        clock[0] += fixed + each * tokens
        prompt.taken += tokens


def test_a_part_takes_what_a_decode_batch_allows_weights_and_tokens_counted_apart(clock):
    """A mean per token would take small parts for dear ones, and make them smaller still."""
    pace = Pace(128)
    entered(pace, clock, 512)
    for _ in range(50):
        decoded(pace, clock, 0.1)
        entered(pace, clock, pace.chunk(beside=True))
    part = pace.chunk(beside=True)
    assert 0.11 < 0.05 + 0.001 * part < 0.13 + 0.001
    decoded(pace, clock, 0.01)
    for _ in range(30):
        decoded(pace, clock, 0.01)
    assert pace.chunk(beside=True) == LEAST
    for _ in range(30):
        decoded(pace, clock, 10.0)
    assert pace.chunk(beside=True) == 128


def test_nothing_is_learnt_of_a_step_that_took_no_tokens(clock):
    pace = Pace(128)
    assert pace.chunk(beside=True) == LEAST
    entered(pace, clock, 0, fixed=5.0)
    entered(pace, clock, 512)
    for _ in range(20):
        decoded(pace, clock, 0.1)
    assert pace.chunk(beside=True) > LEAST
    assert pace.chunk(beside=False) == 512
