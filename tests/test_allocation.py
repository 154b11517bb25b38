from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baklava.allocation import (
    METHODS,
    Allocation,
    Baklava,
    Limits,
    Uniform,
    allocate,
    method_of,
    proportional,
)
from baklava.allocation.base import Pair, Shares, rounded
from baklava.errors import UserError
from baklava.eviction import Eviction, HeavyHitter, Streaming
from baklava.geometry import CacheGeometry, ModelIdentity
from baklava.plan import full_plan
from baklava.profile import Profile

LAYERS, KV_HEADS, GROUP = 4, 3, 2


def geometry_of(windows: tuple[int | None, ...]) -> CacheGeometry:
    return CacheGeometry(layers=LAYERS, kv_heads=KV_HEADS, query_group=GROUP, head_dim=16, windows=windows)


def limits_for(total: int, least: int, most: int, bits: Pair = (16, 16), layers: int = LAYERS) -> Limits:
    """Limits that hold `total` entries of a ring."""
    spare = Limits(geometry_of((None,) * layers), Streaming().choice, 0, least, most, bits)
    return replace(spare, bytes=total * spare.entry_bytes(bits) + spare.heads * spare.fixed_bytes(bits))


def profile_of(seed: int, windows: tuple[int | None, ...] = (None,) * LAYERS) -> Profile:
    draw = np.random.default_rng(seed)
    grid = tuple(tuple(row) for row in draw.uniform(0, 1.5, (LAYERS, KV_HEADS * GROUP)).tolist())
    geometry = geometry_of(windows)
    return Profile(
        model=ModelIdentity(id="tiny", config_hash="abc"),
        geometry=geometry,
        windows="none",
        importance={"value": grid, "key": grid},
        layer_importance=tuple(draw.uniform(0, 1, LAYERS).tolist()),
    )


@pytest.mark.parametrize("method", [cls() for cls in METHODS.values()], ids=lambda method: method.name)
@pytest.mark.parametrize("eviction", [Streaming(), HeavyHitter()], ids=lambda eviction: eviction.name)
@given(budget=st.floats(0.06, 1.0), context=st.integers(1000, 5000), seed=st.integers(0, 5))
@settings(max_examples=30, deadline=None)
def test_a_plan_meets_its_budget_and_never_exceeds_it(
    method: Allocation, eviction: Eviction, budget: float, context: int, seed: int
) -> None:
    plan = allocate(profile_of(seed), budget=budget, context_length=context, method=method, eviction=eviction)
    entry = 16 * 4 + (8 if eviction.scored else 0)
    assert plan.bytes_per_sequence <= budget * plan.full_bytes_per_sequence
    full = all(tokens >= context for row in plan.tokens for tokens in row)
    # What is left is less than a step in a head, but for the heads that are full already.
    capped = sum(tokens >= context for row in plan.tokens for tokens in row)
    assert full or plan.bytes_per_sequence > budget * plan.full_bytes_per_sequence - entry * (9 + 8 * capped)


@given(st.lists(st.floats(0, 10), min_size=6, max_size=6), st.integers(120, 3000))
@settings(deadline=None)
def test_proportional_shares_stay_within_their_limits(weights: list[float], total: int) -> None:
    shares = proportional(np.array(weights).reshape(2, 3), float(total), 20.0, 400.0)
    assert shares.sum() <= total + 1e-6
    assert shares.min() >= 20 - 1e-9
    assert shares.max() <= 400 + 1e-9
    assert shares.sum() == pytest.approx(min(total, 6 * 400), rel=1e-6)


def test_rounding_gives_what_is_left_to_the_largest_remainders() -> None:
    shares = np.array([[10.0, 23.0, 15.9]])
    limits = limits_for(49, 1, 100, layers=1)
    assert rounded(Shares.of(shares, (16, 16)), limits, 8).tolist() == [[8, 24, 16]]


def test_a_more_important_head_gets_more_and_power_zero_is_uniform() -> None:
    profile, limits = profile_of(1), limits_for(12 * 300, 5, 1000)
    grid = np.array(profile.importance["value"]).reshape(LAYERS, KV_HEADS, GROUP).mean(2)
    shares = Baklava(importance_power=1.0).shares(profile, limits).entries
    assert (np.argsort(shares, axis=None) == np.argsort(grid, axis=None)).all()
    even = Baklava(importance_power=0.0).shares(profile, limits).entries
    assert np.allclose(even, Uniform().shares(profile, limits).entries, rtol=1e-6)


def test_the_reduction_and_the_layer_power_change_the_budgets() -> None:
    profile, limits = profile_of(2), limits_for(12 * 300, 5, 1000)
    base = Baklava().shares(profile, limits).entries
    assert not np.allclose(base, Baklava(reduction="max").shares(profile, limits).entries)
    assert not np.allclose(base, Baklava(layer_power=1.0).shares(profile, limits).entries)


def test_sliding_layers_get_no_budget_and_their_bytes_count() -> None:
    profile = profile_of(3, windows=(None, 64, None, 64))
    plan = allocate(profile, budget=0.5, context_length=2000, method=Uniform(), eviction=Streaming())
    assert [len(row) for row in plan.tokens] == [3, 0, 3, 0]
    assert plan.bytes_per_sequence <= 0.5 * plan.full_bytes_per_sequence


def test_the_full_plan_keeps_everything_and_costs_exactly_the_full_cache() -> None:
    profile = profile_of(4)
    plan = full_plan(profile.model, profile.geometry, 777)
    assert plan.ratio == 1.0
    assert {tokens for row in plan.tokens for tokens in row} == {777}


def test_a_budget_too_small_or_out_of_range_is_one_sentence() -> None:
    for budget, said in ((0.001, "leaves 3 entries per head"), (0.0, "must be above 0"), (1.5, "at most 1")):
        with pytest.raises(UserError, match=said):
            allocate(profile_of(0), budget=budget, context_length=3584, method=Uniform(), eviction=Streaming())


def test_an_unknown_method_lists_the_known_ones_and_bad_knobs_are_refused() -> None:
    with pytest.raises(UserError, match="uniform, baklava"):
        method_of("pagoda")
    with pytest.raises(UserError, match="floor"):
        Baklava(floor=2.0)
    with pytest.raises(UserError, match="has no source 'hidden'"):
        Baklava(source="hidden").shares(profile_of(0), limits_for(1000, 1, 100))
