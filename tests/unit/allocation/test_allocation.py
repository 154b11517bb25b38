"""What holds for every allocation method, and the arithmetic of budgets."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from profile_factory import BITS, FULL, KV_HEADS, LAYERS, SLIDING, geometry_of, limits_for, profile_of

from baklava.allocation import (
    METHODS,
    Allocation,
    AllocationResult,
    Baklava,
    BitPair,
    Blended,
    Greedy,
    Perturbed,
    PyramidKV,
    SqueezeAttention,
    Uniform,
    allocate,
    budget_limits,
    build_allocation,
    distribute_proportionally,
    method_class,
)
from baklava.allocation.base import bytes_per_head, round_to_steps, total_bytes
from baklava.errors import UserError
from baklava.eviction import Eviction, HeavyHitter, StreamingLLM
from baklava.plan.budget_plan import full_cache_plan
from baklava.plan.geometry import ModelIdentity
from baklava.profiling.profile import uniform_profile

EVERYTHING = Blended(importance_power=1.0, layer_power=-0.5, curve_power=0.5, measure="repetition", cap=0.5)
GIVEN: dict[str, Allocation] = {name: method() for name, method in METHODS.items()} | {
    "everything": EVERYTHING,
    "perturbed": Perturbed(Baklava(), ((0.0,) * KV_HEADS, (1.0,) * KV_HEADS, (-1.0,) * KV_HEADS, (0.5,) * KV_HEADS)),
}
CHOOSING: dict[str, Allocation] = {"any": Greedy(bits="any"), "curves": Blended(bits="curves", curve_power=0.5)}
EVERY = GIVEN | CHOOSING
UNRANKED = (
    Uniform(),
    Baklava(),
    PyramidKV(),
    SqueezeAttention(),
    Blended(reconstruction_power=0.0, importance_power=2.0),
)
EVICTIONS = (StreamingLLM(), HeavyHitter(), HeavyHitter(residual_length=40))

drawn = given(
    eviction=st.sampled_from(EVICTIONS),
    bits=st.sampled_from(BITS),
    budget=st.floats(0.08, 1.0),
    context=st.integers(1000, 5000),
    seed=st.integers(0, 9),
)
few = settings(max_examples=10)


@pytest.mark.parametrize("name", EVERY)
@drawn
@few
def test_a_plan_meets_its_budget_and_never_exceeds_it(
    name: str, eviction: Eviction, bits: BitPair, budget: float, context: int, seed: int
) -> None:
    profile = profile_of(seed)
    plan = allocate(profile, budget=budget, context_length=context, method=EVERY[name], eviction=eviction, bits=bits)
    left = budget * plan.full_bytes_per_sequence - plan.bytes_per_sequence
    held = [tokens for row in plan.tokens for tokens in row]
    assert left >= 0
    assert min(held) >= eviction.config.min_tokens
    # What is left is less than a step in a head, but for the heads that are full already.
    capped, entry = sum(tokens >= context for tokens in held), 16 * 4 + 8
    assert capped == len(held) or left < entry * (9 + 8 * capped)


@pytest.mark.parametrize("name", [name for name in EVERY if name != "perturbed"])
@given(budget=st.floats(0.2, 1.0), context=st.integers(1000, 5000), seed=st.integers(0, 9))
@few
def test_sliding_layers_get_no_budget_and_their_bytes_count(name: str, budget: float, context: int, seed: int) -> None:
    profile = profile_of(seed, SLIDING)
    plan = allocate(profile, budget=budget, context_length=context, method=EVERY[name], eviction=StreamingLLM())
    assert [len(row) for row in plan.tokens] == [3, 0, 3, 0]
    assert plan.bytes_per_sequence <= budget * plan.full_bytes_per_sequence


def test_a_budget_that_the_windows_alone_exceed_is_refused_with_the_smallest_that_works() -> None:
    geometry, eviction = geometry_of((None, 64, None, 64)), StreamingLLM().config
    with pytest.raises(UserError, match="the sliding windows alone take 24,576") as refused:
        budget_limits(geometry, 0.1, 500, eviction)
    smallest = float(str(refused.value).rpartition(" ")[2])
    assert smallest == pytest.approx((2 * 64 + 2 * 6) / (2 * 64 + 2 * 500), abs=1e-4)
    assert budget_limits(geometry, smallest, 500, eviction).total_entries >= 6 * eviction.min_tokens
    with pytest.raises(UserError, match=f"raise it to at least {smallest:g}") as refused:
        budget_limits(geometry, smallest - 2e-4, 500, eviction)
    assert "lower" not in str(refused.value)  # no interval could be lower
    with pytest.raises(UserError, match="or lower the eviction interval or the centroids"):
        budget_limits(geometry, smallest, 500, HeavyHitter(eviction_interval=8, centroids=2).config)
    with pytest.raises(UserError, match=r"a residual of 80 need .* or lower the residual_length$"):
        budget_limits(geometry, smallest, 500, HeavyHitter(eviction_interval=8, residual_length=80).config)
    with pytest.raises(UserError, match="no budget suffices for 5 tokens"):
        budget_limits(geometry, 1.0, 5, eviction)


def test_a_window_counts_as_many_tokens_as_the_context_has() -> None:
    geometry = geometry_of((None, 4000, None, 4000))
    plan = allocate(
        uniform_profile(ModelIdentity(id="tiny", config_hash="abc"), geometry),
        budget=0.8,
        context_length=200,
        method=Uniform(),
        eviction=StreamingLLM(),
    )
    assert 0.79 < plan.ratio <= 0.8
    assert plan.bytes_per_sequence > plan.full_bytes_per_sequence > plan.bytes_for(200)


@pytest.mark.parametrize("name", EVERY)
@drawn
@few
def test_results_stay_within_their_limits_and_are_deterministic(
    name: str, eviction: Eviction, bits: BitPair, budget: float, context: int, seed: int
) -> None:
    limits = budget_limits(geometry_of(), budget, context, eviction.config, bits)
    result, again = (EVERY[name].allocate(profile_of(seed), limits) for _ in range(2))
    assert result.entries.shape == (LAYERS, KV_HEADS)
    assert result.entries.min() >= limits.min_tokens
    assert result.entries.max() <= limits.max_tokens
    assert bytes_per_head(result, limits).sum() <= limits.budget_bytes * (1 + 1e-9)
    assert total_bytes(round_to_steps(result, limits, 8), result, limits) <= limits.budget_bytes
    assert (result.entries == again.entries).all()
    assert result.bit_pairs == again.bit_pairs


@pytest.mark.parametrize("name", EVERY)
@drawn
@few
def test_more_budget_never_lowers_the_total(
    name: str, eviction: Eviction, bits: BitPair, budget: float, context: int, seed: int
) -> None:
    budgets = (budget, min(1.0, budget * 1.1))
    limits = [budget_limits(geometry_of(), each, context, eviction.config, bits) for each in budgets]
    shares = [EVERY[name].allocate(profile_of(seed), each) for each in limits]
    less, more = (bytes_per_head(share, limit).sum() for share, limit in zip(shares, limits, strict=True))
    assert less <= more * (1 + 1e-6)


@pytest.mark.parametrize("name", sorted(set(EVERY) - {"perturbed"}))
@drawn
@few
def test_a_head_that_is_better_in_every_way_never_gets_fewer_bytes(
    name: str, eviction: Eviction, bits: BitPair, budget: float, context: int, seed: int
) -> None:
    limits = budget_limits(geometry_of(), budget, context, eviction.config, bits)
    shares = EVERY[name].allocate(profile_of(seed, FULL, True), limits)
    costs = bytes_per_head(shares, limits)
    assert costs[0, 1] >= costs[0, 0] * (1 - 1e-9) or shares.entries[0, 1] >= limits.max_tokens


@pytest.mark.parametrize("name", GIVEN)
def test_the_whole_budget_keeps_everything(name: str) -> None:
    limits = budget_limits(geometry_of(), 1.0, 2000, StreamingLLM().config)
    assert GIVEN[name].allocate(profile_of(0), limits).entries == pytest.approx(2000)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("bits", [(16, 16), (2, 8)])
def test_budgets_can_be_checked_on_a_uniform_profile(name: str, bits: BitPair) -> None:
    flat = uniform_profile(ModelIdentity(id="tiny", config_hash="abc"), geometry_of())
    plan = allocate(flat, budget=0.2, context_length=2000, method=EVERY[name], eviction=HeavyHitter(), bits=bits)
    assert plan.bytes_per_sequence <= 0.2 * plan.full_bytes_per_sequence
    levels = {tokens for row in plan.tokens for tokens in row}
    assert max(levels) - min(levels) <= 8 or name in ("pyramidkv", "duo_attention", "perturbed")


@pytest.mark.parametrize("name", METHODS)
def test_parameters_are_plain_values_and_an_unknown_one_is_refused(name: str) -> None:
    method = METHODS[name]()
    assert all(isinstance(value, bool | int | float | str) for value in method.params.values())
    assert METHODS[name](**method.params) == method == build_allocation(name, method.params)
    with pytest.raises(TypeError, match="loudness"):
        METHODS[name](loudness=1.0)


@pytest.mark.parametrize("name", ["duo_attention", "adakv", "greedy", "reconstruction_counts", "blended", "any"])
def test_a_profile_without_what_a_method_needs_is_one_sentence(name: str) -> None:
    bare = profile_of(0).model_copy(update={"rankings": {}, "curves": None})
    with pytest.raises(UserError, match="profile the model again"):
        EVERY[name].allocate(bare, limits_for(1000, 1, 100))


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("baklava", {"cap": 0.0}),
        ("baklava", {"importance_power": 3000}),
        ("baklava", {"layer_power": float("nan")}),
        ("pyramidkv", {"steepness": 1.0}),
        ("squeeze_attention", {"share": 0.0}),
        ("duo_attention", {"tokens": 0}),
        ("adakv", {"safeguard": 1.5}),
        ("heavy_hitter_counts", {"floor": -1.0}),
        ("reconstruction_counts", {"floor": 1.1}),
        ("blended", {"cap": 0.0}),
        ("blended", {"reconstruction_power": 17}),
        ("blended", {"importance_power": -17}),
        ("blended", {"layer_power": 17.0}),
        ("blended", {"curve_power": -400.0}),
    ],
)
def test_an_invalid_parameter_is_one_sentence(name: str, params: dict[str, object]) -> None:
    with pytest.raises(UserError, match=f"{name} with .*{next(iter(params))} .*must be"):
        METHODS[name](**params)


def test_an_unknown_method_lists_the_known_ones() -> None:
    with pytest.raises(UserError, match="uniform, baklava, pyramid"):
        method_class("pagoda")


def test_a_budget_too_small_or_out_of_range_is_one_sentence() -> None:
    for budget, said in ((0.001, "leaves 3 entries per head"), (0.0, "must be above 0"), (1.5, "at most 1")):
        with pytest.raises(UserError, match=said):
            allocate(profile_of(0), budget=budget, context_length=3584, method=Uniform(), eviction=StreamingLLM())


def test_the_full_plan_keeps_everything_and_costs_exactly_the_full_cache() -> None:
    profile = profile_of(4)
    plan = full_cache_plan(profile.model, profile.geometry, 777)
    assert plan.ratio == 1.0
    assert {tokens for row in plan.tokens for tokens in row} == {777}


@given(
    st.lists(st.floats(0, 10), min_size=6, max_size=6),
    st.lists(st.integers(1, 9), min_size=6, max_size=6),
    st.integers(1100, 9000),
)
def test_proportional_shares_stay_within_their_limits(weights: list[float], prices: list[int], total: int) -> None:
    grid, costs = np.array(weights).reshape(2, 3), np.array(prices).reshape(2, 3)
    shares = distribute_proportionally(grid, float(total), 20.0, 400.0, costs)
    assert (shares * costs).sum() <= total + 1e-6
    assert shares.min() >= 20 - 1e-9
    assert shares.max() <= 400 + 1e-9
    assert (shares * costs).sum() == pytest.approx(min(total, costs.sum() * 400), rel=1e-6)


def test_rounding_gives_what_is_left_to_the_largest_remainders() -> None:
    shares = AllocationResult.with_bits(np.array([[10.0, 23.0, 15.9]]), (16, 16))
    assert round_to_steps(shares, limits_for(49, 1, 100, layers=1), 8).tolist() == [[8, 24, 16]]
