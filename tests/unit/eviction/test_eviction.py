from dataclasses import replace

import pytest
import torch

from baklava.errors import UserError
from baklava.eviction import (
    METHODS,
    TOVA,
    Eviction,
    ExpectedAttention,
    HeavyHitter,
    KeyDiff,
    KeyNorm,
    KVzip,
    Observation,
    SnapKV,
    StreamingLLM,
    build_eviction,
    method_class,
)


def observe(
    attention: torch.Tensor, first_query: int = 0, stride: int = 1, decoding: bool = False, seed: int = 0
) -> Observation:
    """Queries at positions from `first_query` on, over entries at positions 0, 1, …, with random keys and values."""
    batch, heads, group, queries, entries = attention.shape
    draw = torch.Generator().manual_seed(seed)
    return Observation(
        query=torch.randn(batch, heads, group, queries, 4, generator=draw),
        key=torch.randn(batch, heads, entries, 4, generator=draw),
        value=torch.randn(batch, heads, entries, 4, generator=draw),
        query_positions=torch.arange(first_query, first_query + queries * stride, stride)[None],
        key_positions=torch.arange(entries)[None, None],
        previous_scores=torch.zeros(batch, heads, entries),
        scaling=0.5,
        compute_attention=lambda: attention,
        stride=stride,
        decoding=decoding,
    )


def causal_attention(tokens: int, seed: int = 0) -> torch.Tensor:
    logits = torch.randn(1, 2, 3, tokens, tokens, generator=torch.Generator().manual_seed(seed)) * 2
    return logits.masked_fill(~torch.ones(tokens, tokens, dtype=torch.bool).tril(), -torch.inf).softmax(-1)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_every_method_scores_each_entry_of_each_head_with_a_finite_number(method: type[Eviction]) -> None:
    score = method().score(observe(causal_attention(20)))
    assert score.shape == (1, 2, 20)
    assert score.isfinite().all()


def test_a_config_has_one_hash_in_any_order_but_types_matter() -> None:
    config = HeavyHitter(distance=32).config
    reordered = config.model_copy(update={"params": dict(reversed(config.params.items()))})
    assert (hash(reordered), build_eviction(reordered)) == (hash(config), build_eviction(config))
    as_float = config.model_copy(update={"params": config.params | {"distance": 32.0}})
    assert as_float == config
    with pytest.raises(UserError, match="do not fit"):  # as the types are checked in tests; the built one is not reused
        build_eviction(as_float)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_every_method_is_rebuilt_from_its_config_in_a_plan(method: type[Eviction]) -> None:
    eviction = method(sinks=7)
    assert build_eviction(eviction.config) == eviction
    assert build_eviction(eviction.config) is build_eviction(eviction.config.model_copy())
    with pytest.raises(UserError, match="do not fit"):
        build_eviction(eviction.config.model_copy(update={"params": {"unheard": 1}}))
    with pytest.raises(UserError, match="make a new plan"):
        build_eviction(eviction.config.model_copy(update={"scored": not eviction.scored}))


@pytest.mark.parametrize(
    "method",
    [
        HeavyHitter(distance=0, reduction="mean", power=1),
        HeavyHitter(reduction="max", distance=0, power=1),
        HeavyHitter(power=2, distance=3, reduction="mean"),
        HeavyHitter(reduction="max", power=2, distance=9),
        SnapKV(window=3),
        TOVA(),
        KVzip(),
    ],
    ids=str,
)
def test_scores_do_not_depend_on_how_queries_are_split_into_blocks(method: Eviction) -> None:
    attention = causal_attention(24)
    at_once = method.score(observe(attention))
    scores = torch.zeros(1, 2, 24)
    for start, stop in ((0, 5), (5, 6), (6, 20), (20, 24)):
        block = replace(observe(attention[..., start:stop, :stop], start), previous_scores=scores[..., :stop])
        scores[..., :stop] = method.score(block)
    torch.testing.assert_close(scores, at_once)


def test_heavy_hitter_is_the_mean_attention_received() -> None:
    attention = causal_attention(10)
    expected = torch.stack([attention[..., j:, j].mean((2, 3)) for j in range(10)], -1)
    torch.testing.assert_close(HeavyHitter(distance=0, reduction="mean", power=1).score(observe(attention)), expected)
    far = torch.stack([attention.amax(2)[..., j + 4 :, j].square().mean(2) for j in range(6)], -1)
    scored = HeavyHitter(reduction="max", power=2, distance=4).score(observe(attention))
    torch.testing.assert_close(scored[..., :6], far)
    assert (scored[..., 6:] == 0).all()


def test_heavy_hitter_distinguishes_small_attention_in_half_precision() -> None:
    attention = torch.tensor([1e-4, 2e-4, 3e-4]).expand(1, 1, 1, 1, 3)
    score = HeavyHitter(distance=0).score(observe(attention.half(), first_query=2))
    assert score.diff().min() > 0


def test_heavy_hitter_over_every_third_query_is_the_mean_over_those() -> None:
    attention = causal_attention(10)
    sampled = [0, 3, 6, 9]
    scored = HeavyHitter(distance=2, reduction="mean", power=1).score(observe(attention[..., sampled, :], stride=3))
    for entry in range(8):
        rows = [row for row in sampled if row >= entry + 2]
        torch.testing.assert_close(scored[..., entry], attention[..., rows, entry].mean((2, 3)))


def test_tova_is_the_attention_of_the_newest_query() -> None:
    attention = causal_attention(10)
    torch.testing.assert_close(TOVA().score(observe(attention)), attention[..., -1, :].mean(2))
    torch.testing.assert_close(TOVA(reduction="max").score(observe(attention)), attention[..., -1, :].amax(2))


def test_snapkv_weighs_the_newest_queries_most_and_continues_in_decoding() -> None:
    attention = causal_attention(10)
    weights = torch.tensor([0.25 * 0.75**age for age in range(9, -1, -1)])
    expected = (attention.mean(2) * weights[:, None]).sum(2)
    torch.testing.assert_close(SnapKV(window=4).score(observe(attention)), expected)
    step = replace(observe(causal_attention(10)[..., -1:, :], 9, decoding=True), previous_scores=expected)
    later = 0.75 * expected + 0.25 * step.attention.mean(2)[:, :, 0]
    torch.testing.assert_close(SnapKV(window=4).score(step), later)


def test_key_methods_prefer_small_keys_and_unlike_keys() -> None:
    observation = observe(causal_attention(6))
    torch.testing.assert_close(KeyNorm().score(observation), -observation.key.square().sum(-1).sqrt())
    same = replace(observation, key=torch.tensor([1.0, 0, 0, 0]).expand(1, 2, 6, 4).clone())
    same.key[:, :, 3] = torch.tensor([0, 2.0, 0, 0])
    assert KeyDiff().score(same).argmax(-1).tolist() == [[3, 3]]


def test_expected_attention_is_the_mean_weight_that_normal_queries_give() -> None:
    observation = observe(causal_attention(8))
    draw = torch.Generator().manual_seed(1)
    mean, spread = torch.randn(1, 2, 3, 1, 4, generator=draw), 0.5
    queries = mean + spread * torch.randn(1, 2, 3, 200_000, 4, generator=draw)
    many = replace(observation, query=queries, query_positions=torch.arange(200_000)[None])
    weights = torch.exp(queries @ observation.key[:, :, None].transpose(3, 4) * observation.scaling).mean(3)
    expected = (weights / weights.sum(-1, keepdim=True)).mean(2) * observation.value.norm(dim=-1)
    torch.testing.assert_close(ExpectedAttention().score(many), expected, rtol=0.02, atol=0.002)


def test_expected_attention_uses_the_attention_received_in_decoding() -> None:
    step = observe(causal_attention(8)[..., -1:, :], 7, decoding=True)
    received = step.attention.mean(2)[:, :, 0] * step.value.norm(dim=-1)
    torch.testing.assert_close(ExpectedAttention(window=4).score(step), received / 4)


def test_kvzip_is_the_maximum_attention_from_any_query() -> None:
    attention = causal_attention(9)
    torch.testing.assert_close(KVzip().score(observe(attention)), attention.amax((2, 3)))


def test_streaming_llm_ranks_by_recency() -> None:
    assert StreamingLLM().score(observe(causal_attention(5)))[0, 0].tolist() == [0, 1, 2, 3, 4]


def test_methods_share_a_score_key_only_if_they_score_alike() -> None:
    assert (
        HeavyHitter(sinks=1, recent_ratio=0.2, eviction_interval=64, distance=0, reduction="mean", power=1).score_key
        == HeavyHitter(distance=0, reduction="mean", power=1).score_key
    )
    assert (
        HeavyHitter(power=2, distance=0, reduction="mean").score_key
        != HeavyHitter(distance=0, reduction="mean", power=1).score_key
    )
    assert StreamingLLM().score_key is None


def test_unknown_methods_and_parameters_are_one_sentence() -> None:
    with pytest.raises(UserError, match="choose one of streaming_llm, heavy_hitter"):
        method_class("h2o")
    with pytest.raises(UserError, match="distance at least 0"):
        HeavyHitter(distance=-1, reduction="mean", power=1)
    with pytest.raises(UserError, match="pooling odd"):
        SnapKV(pooling=4)
    with pytest.raises(UserError, match="residual_length must be at least 0"):
        HeavyHitter(residual_length=-5)
    with pytest.raises(UserError, match="set sinks only"):
        StreamingLLM(eviction_interval=8)
    with pytest.raises(UserError, match="window must be at least 2"):
        ExpectedAttention(window=1)
    with pytest.raises(UserError, match="eviction_interval at least 1"):
        HeavyHitter(eviction_interval=0, distance=0, reduction="mean", power=1)
