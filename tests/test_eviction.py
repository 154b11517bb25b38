import pytest
import torch

from baklava.errors import UserError
from baklava.eviction import METHODS, Eviction, HeavyHitter, Observation, Streaming, eviction_of, method_of


def observe(attention: torch.Tensor, first_query: int) -> Observation:
    """A block of queries at positions from `first_query` on, over entries at positions 0, 1, …"""
    queries, entries = attention.shape[-2:]
    return Observation(
        attention,
        torch.arange(first_query, first_query + queries)[None],
        torch.arange(entries)[None, None],
        torch.zeros(*attention.shape[:2], entries),
    )


def causal_attention(tokens: int, seed: int = 0) -> torch.Tensor:
    logits = torch.randn(1, 2, 3, tokens, tokens, generator=torch.Generator().manual_seed(seed)) * 2
    return logits.masked_fill(~torch.ones(tokens, tokens, dtype=torch.bool).tril(), -torch.inf).softmax(-1)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_every_method_scores_each_entry_of_each_head_with_a_finite_number(method: type[Eviction]) -> None:
    score = method().score(observe(causal_attention(20), 0))
    assert score.shape == (1, 2, 20)
    assert score.isfinite().all()


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_every_method_is_rebuilt_from_its_record_in_a_plan(method: type[Eviction]) -> None:
    eviction = method(sinks=7)
    assert eviction_of(eviction.choice) == eviction
    with pytest.raises(UserError, match="do not fit"):
        eviction_of(eviction.choice.model_copy(update={"knobs": {"unheard": 1}}))
    with pytest.raises(UserError, match="make a new plan"):
        eviction_of(eviction.choice.model_copy(update={"scored": not eviction.scored}))


@pytest.mark.parametrize(
    "method",
    [
        HeavyHitter(),
        HeavyHitter(reduction="max"),
        HeavyHitter(power=2, distance=3),
        HeavyHitter(reduction="max", power=2, distance=9),
    ],
    ids=str,
)
def test_scores_do_not_depend_on_how_queries_are_cut_into_blocks(method: Eviction) -> None:
    attention = causal_attention(24)
    at_once = method.score(observe(attention, 0))
    scores = torch.zeros(1, 2, 24)
    for start, stop in ((0, 5), (5, 6), (6, 20), (20, 24)):
        block = observe(attention[..., start:stop, :stop], start)
        block = Observation(block.attention, block.query_positions, block.key_positions, scores[..., :stop])
        scores[..., :stop] = method.score(block)
    torch.testing.assert_close(scores, at_once)


def test_heavy_hitter_is_the_mean_attention_received() -> None:
    attention = causal_attention(10)
    expected = torch.stack([attention[..., j:, j].mean((2, 3)) for j in range(10)], -1)
    torch.testing.assert_close(HeavyHitter().score(observe(attention, 0)), expected)
    far = torch.stack([attention.amax(2)[..., j + 4 :, j].square().mean(2) for j in range(6)], -1)
    scored = HeavyHitter(reduction="max", power=2, distance=4).score(observe(attention, 0))
    torch.testing.assert_close(scored[..., :6], far)
    assert (scored[..., 6:] == 0).all()


def test_streaming_ranks_by_recency() -> None:
    assert Streaming().score(observe(causal_attention(5), 0))[0, 0].tolist() == [0, 1, 2, 3, 4]


def test_methods_share_an_observation_only_when_they_score_alike() -> None:
    assert HeavyHitter(sinks=1, recent=0.2, interval=64).observation == HeavyHitter().observation
    assert HeavyHitter(power=2).observation != HeavyHitter().observation
    assert Streaming().observation is None


def test_unknown_methods_and_knobs_are_one_sentence() -> None:
    with pytest.raises(UserError, match="choose one of streaming, heavy_hitter"):
        method_of("h2o")
    with pytest.raises(UserError, match="distance at least 0"):
        HeavyHitter(distance=-1)
    with pytest.raises(UserError, match="interval at least 1"):
        HeavyHitter(interval=0)
