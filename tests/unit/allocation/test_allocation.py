"""What every allocation method keeps to, and what budgets are made of."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from profile_factory import BITS, FULL, KV_HEADS, LAYERS, SLIDING, geometry_of, limits_for, profile_of

from baklava.allocation import (
    METHODS,
    Allocation,
    Baklava,
    Blended,
    Greedy,
    Pair,
    Pyramid,
    Shares,
    Shifted,
    Squeeze,
    Uniform,
    allocate,
    limits_of,
    method_of,
    proportional,
)
from baklava.allocation.base import head_costs, rounded, spent
from baklava.errors import UserError
from baklava.eviction import Eviction, HeavyHitter, Streaming
from baklava.plan.budget_plan import full_plan
from baklava.plan.geometry import ModelIdentity
from baklava.profiling.profile import flat_profile

EVERYTHING = Blended(importance_power=1.0, layer_power=-0.5, curve_power=0.5, measure="repetition", cap=0.5)
GIVEN: dict[str, Allocation] = {name: method() for name, method in METHODS.items()} | {
    "everything": EVERYTHING,
    "shifted": Shifted(Baklava(), ((0.0,) * KV_HEADS, (1.0,) * KV_HEADS, (-1.0,) * KV_HEADS, (0.5,) * KV_HEADS)),
}
CHOOSING: dict[str, Allocation] = {"any": Greedy(bits="any"), "curves": Blended(bits="curves", curve_power=0.5)}
EVERY = GIVEN | CHOOSING
UNRANKED = (Uniform(), Baklava(), Pyramid(), Squeeze(), Blended(reconstruction_power=0.0, importance_power=2.0))
EVICTIONS = (Streaming(), HeavyHitter(), HeavyHitter(staged=True))

drawn = given(
    eviction=st.sampled_from(EVICTIONS),
    bits=st.sampled_from(BITS),
    budget=st.floats(0.08, 1.0),
    context=st.integers(1000, 5000),
    seed=st.integers(0, 9),
)
few = settings(max_examples=25)


@pytest.mark.parametrize("name", EVERY)
@drawn
@few
def test_a_plan_meets_its_budget_and_never_exceeds_it(
    name: str, eviction: Eviction, bits: Pair, budget: float, context: int, seed: int
) -> None:
    profile = profile_of(seed)
    plan = allocate(profile, budget=budget, context_length=context, method=EVERY[name], eviction=eviction, bits=bits)
    left = budget * plan.full_bytes_per_sequence - plan.bytes_per_sequence
    held = [tokens for row in plan.tokens for tokens in row]
    assert left >= 0
    assert min(held) >= eviction.choice.minimum_tokens
    # What is left is less than a step in a head, but for the heads that are full already.
    capped, entry = sum(tokens >= context for tokens in held), 16 * 4 + 8
    assert capped == len(held) or left < entry * (9 + 8 * capped)


@pytest.mark.parametrize("method", UNRANKED, ids=lambda method: method.name)
@given(budget=st.floats(0.2, 1.0), context=st.integers(1000, 5000), seed=st.integers(0, 9))
@few
def test_sliding_layers_get_no_budget_and_their_bytes_count(
    method: Allocation, budget: float, context: int, seed: int
) -> None:
    profile = profile_of(seed, SLIDING)
    plan = allocate(profile, budget=budget, context_length=context, method=method, eviction=Streaming())
    assert [len(row) for row in plan.tokens] == [3, 0, 3, 0]
    assert plan.bytes_per_sequence <= budget * plan.full_bytes_per_sequence


@pytest.mark.parametrize("name", EVERY)
@drawn
@few
def test_shares_stay_within_their_limits_and_are_the_same_twice(
    name: str, eviction: Eviction, bits: Pair, budget: float, context: int, seed: int
) -> None:
    limits = limits_of(geometry_of(), budget, context, eviction.choice, bits)
    shares, again = (EVERY[name].shares(profile_of(seed), limits) for _ in range(2))
    assert shares.entries.shape == (LAYERS, KV_HEADS)
    assert shares.entries.min() >= limits.least
    assert shares.entries.max() <= limits.most
    assert head_costs(shares, limits).sum() <= limits.bytes * (1 + 1e-9)
    assert spent(rounded(shares, limits, 8), shares, limits) <= limits.bytes
    assert (shares.entries == again.entries).all()
    assert shares.pairs == again.pairs


@pytest.mark.parametrize("name", EVERY)
@drawn
@few
def test_more_budget_never_lowers_the_total(
    name: str, eviction: Eviction, bits: Pair, budget: float, context: int, seed: int
) -> None:
    budgets = (budget, min(1.0, budget * 1.1))
    limits = [limits_of(geometry_of(), each, context, eviction.choice, bits) for each in budgets]
    shares = [EVERY[name].shares(profile_of(seed), each) for each in limits]
    less, more = (head_costs(share, limit).sum() for share, limit in zip(shares, limits, strict=True))
    assert less <= more * (1 + 1e-6)


@pytest.mark.parametrize("name", sorted(set(EVERY) - {"shifted"}))
@drawn
@few
def test_a_head_that_is_better_in_every_way_never_gets_fewer_bytes(
    name: str, eviction: Eviction, bits: Pair, budget: float, context: int, seed: int
) -> None:
    limits = limits_of(geometry_of(), budget, context, eviction.choice, bits)
    shares = EVERY[name].shares(profile_of(seed, FULL, True), limits)
    costs = head_costs(shares, limits)
    assert costs[0, 1] >= costs[0, 0] * (1 - 1e-9) or shares.entries[0, 1] >= limits.most


@pytest.mark.parametrize("name", GIVEN)
def test_the_whole_budget_keeps_everything(name: str) -> None:
    limits = limits_of(geometry_of(), 1.0, 2000, Streaming().choice)
    assert GIVEN[name].shares(profile_of(0), limits).entries == pytest.approx(2000)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("bits", [(16, 16), (2, 8)])
def test_budgets_can_be_checked_on_a_flat_profile(name: str, bits: Pair) -> None:
    flat = flat_profile(ModelIdentity(id="tiny", config_hash="abc"), geometry_of())
    plan = allocate(flat, budget=0.2, context_length=2000, method=EVERY[name], eviction=HeavyHitter(), bits=bits)
    assert plan.bytes_per_sequence <= 0.2 * plan.full_bytes_per_sequence
    levels = {tokens for row in plan.tokens for tokens in row}
    assert max(levels) - min(levels) <= 8 or name in ("pyramid", "duo", "shifted")


@pytest.mark.parametrize("name", METHODS)
def test_knobs_are_plain_values_and_an_unknown_one_is_refused(name: str) -> None:
    method = METHODS[name]()
    assert all(isinstance(value, bool | int | float | str) for value in method.knobs.values())
    assert METHODS[name](**method.knobs) == method
    with pytest.raises(TypeError, match="loudness"):
        METHODS[name](loudness=1.0)


@pytest.mark.parametrize("name", ["duo", "head_adaptive", "greedy", "reconstruction_counts", "blended", "any"])
def test_a_profile_without_what_a_method_asks_for_is_one_sentence(name: str) -> None:
    with pytest.raises(UserError, match=r"has no .*which this method asks for; .* some of its layers slide"):
        EVERY[name].shares(profile_of(0, SLIDING), limits_for(1000, 1, 100, layers=2))
    bare = profile_of(0).model_copy(update={"rankings": {}, "curves": None})
    with pytest.raises(UserError, match="profile the model again"):
        EVERY[name].shares(bare, limits_for(1000, 1, 100))


@pytest.mark.parametrize(
    ("name", "knobs"),
    [
        ("baklava", {"cap": 0.0}),
        ("baklava", {"importance_power": 3000}),
        ("baklava", {"layer_power": float("nan")}),
        ("pyramid", {"steepness": 1.0}),
        ("squeeze", {"share": 0.0}),
        ("duo", {"tokens": 0}),
        ("head_adaptive", {"safeguard": 1.5}),
        ("heavy_hitter_counts", {"floor": -1.0}),
        ("reconstruction_counts", {"floor": 1.1}),
        ("blended", {"cap": 0.0}),
        ("blended", {"reconstruction_power": 17}),
        ("blended", {"importance_power": -17}),
        ("blended", {"layer_power": 17.0}),
        ("blended", {"curve_power": -400.0}),
    ],
)
def test_a_bad_knob_is_one_sentence(name: str, knobs: dict[str, object]) -> None:
    with pytest.raises(UserError, match=f"{name} with .*{next(iter(knobs))} .*must be"):
        METHODS[name](**knobs)


def test_an_unknown_method_lists_the_known_ones() -> None:
    with pytest.raises(UserError, match="uniform, baklava, pyramid"):
        method_of("pagoda")


def test_a_budget_too_small_or_out_of_range_is_one_sentence() -> None:
    for budget, said in ((0.001, "leaves 3 entries per head"), (0.0, "must be above 0"), (1.5, "at most 1")):
        with pytest.raises(UserError, match=said):
            allocate(profile_of(0), budget=budget, context_length=3584, method=Uniform(), eviction=Streaming())


def test_the_full_plan_keeps_everything_and_costs_exactly_the_full_cache() -> None:
    profile = profile_of(4)
    plan = full_plan(profile.model, profile.geometry, 777)
    assert plan.ratio == 1.0
    assert {tokens for row in plan.tokens for tokens in row} == {777}


@given(
    st.lists(st.floats(0, 10), min_size=6, max_size=6),
    st.lists(st.integers(1, 9), min_size=6, max_size=6),
    st.integers(1100, 9000),
)
def test_proportional_shares_stay_within_their_limits(weights: list[float], prices: list[int], total: int) -> None:
    grid, costs = np.array(weights).reshape(2, 3), np.array(prices).reshape(2, 3)
    shares = proportional(grid, float(total), 20.0, 400.0, costs)
    assert (shares * costs).sum() <= total + 1e-6
    assert shares.min() >= 20 - 1e-9
    assert shares.max() <= 400 + 1e-9
    assert (shares * costs).sum() == pytest.approx(min(total, costs.sum() * 400), rel=1e-6)


def test_rounding_gives_what_is_left_to_the_largest_remainders() -> None:
    shares = Shares.of(np.array([[10.0, 23.0, 15.9]]), (16, 16))
    assert rounded(shares, limits_for(49, 1, 100, layers=1), 8).tolist() == [[8, 24, 16]]
