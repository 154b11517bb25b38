"""What single allocation methods promise."""

import numpy as np
import pytest
from profile_factory import (
    BITS,
    ENTRIES,
    GROUP,
    KV_HEADS,
    LAYERS,
    RANKS,
    geometry_of,
    limits_for,
    profile_of,
    profile_with,
)

from baklava.allocation import (
    METHODS,
    Baklava,
    Blended,
    Duo,
    Greedy,
    HeadAdaptive,
    HeavyHitterCounts,
    Pyramid,
    ReconstructionCounts,
    Shifted,
    Squeeze,
    Uniform,
    allocate,
    limits_of,
)
from baklava.allocation import perturbed as permuted
from baklava.allocation.base import head_costs
from baklava.allocation.curve_table import greedy_budgets, table_of
from baklava.allocation.methods.squeeze import least_cluster
from baklava.errors import UserError
from baklava.eviction import HeavyHitter, Streaming
from baklava.profiling.profile import Profile

LIMITS = limits_for(12 * 300, 5, 1004)


def convex(seed: int) -> Profile:
    """Losses that fall convexly with entries, and curves of more bits below those of fewer."""
    draw = np.random.default_rng(seed)
    sizes = draw.uniform(0.1, 3, (LAYERS, KV_HEADS, 1, 1))
    losses = sizes / np.array(ENTRIES) + np.array([0, 1e-4, 2e-4, 3e-4])[:, None] * sizes
    scores = np.zeros((2, 1, LAYERS, KV_HEADS, len(RANKS)))
    return profile_with(np.ones((LAYERS, KV_HEADS, GROUP)), (0.5,) * LAYERS, scores, losses)


def test_a_more_important_head_gets_more_and_power_zero_is_uniform() -> None:
    profile = profile_of(1)
    grid = np.array(profile.importance["value"]).reshape(LAYERS, KV_HEADS, GROUP).mean(2)
    shares = Baklava(importance_power=1.0).shares(profile, LIMITS).entries
    assert (np.argsort(shares, axis=None) == np.argsort(grid, axis=None)).all()
    even = Baklava(importance_power=0.0).shares(profile, LIMITS).entries
    assert np.allclose(even, Uniform().shares(profile, LIMITS).entries, rtol=1e-6)


def test_the_reduction_and_the_layer_power_change_the_budgets() -> None:
    base, *others = (
        method.shares(profile_of(2), LIMITS).entries
        for method in (Baklava(), Baklava(reduction="max"), Baklava(layer_power=1.0))
    )
    assert not any(np.allclose(base, other) for other in others)
    with pytest.raises(UserError, match="has no source 'hidden'"):
        Baklava(source="hidden").shares(profile_of(0), LIMITS)


def test_a_pyramid_falls_by_the_same_step_from_layer_to_layer() -> None:
    entries = Pyramid(steepness=0.9).shares(profile_of(0), LIMITS).entries
    assert entries[:, 0] == pytest.approx([570, 390, 210, 30])
    assert (entries == entries[:, :1]).all()


def test_a_squeeze_takes_from_the_least_important_layers_what_it_gives_to_the_others() -> None:
    layers = profile_of(0).model_copy(update={"layer_importance": (0.9, 0.1, 0.12, 0.5)})
    entries = Squeeze(share=0.4).shares(layers, LIMITS).entries
    assert entries == pytest.approx(np.repeat([[480], [120], [120], [480]], 3, axis=1))


@pytest.mark.parametrize("seed", range(5))
def test_clusters_are_those_of_least_squares(seed: int) -> None:
    values = np.random.default_rng(seed).uniform(0, 1, 7)
    ordered = np.sort(values)
    splits = [(i, j) for i in range(1, 7) for j in range(i + 1, 7)]
    best = min(splits, key=lambda cut: sum(part.size * part.var() for part in np.split(ordered, cut)))
    assert least_cluster(values).sum() == best[0]
    assert values[least_cluster(values)].max() == ordered[best[0] - 1]


def test_layers_that_matter_alike_are_not_squeezed() -> None:
    assert not least_cluster(np.full(5, 0.3)).any()
    assert least_cluster(np.array([0.2, 0.7, 0.2])).tolist() == [True, False, True]


@pytest.mark.parametrize("total", [400, 3600, 9000])
def test_a_duo_head_keeps_everything_or_a_recent_window(total: int) -> None:
    limits = limits_for(total, 5, 1004)
    entries = Duo(tokens=64).shares(profile_of(3), limits).entries
    levels = np.unique(entries)
    assert len(levels) <= 2
    assert entries.sum() == pytest.approx(total)
    assert (entries == 1004).sum() == max(0, total - 12 * 68) // (1004 - 68)
    assert levels[0] >= min(total / 12, 68)


def test_the_heads_of_a_duo_that_keep_everything_need_most_to_repeat_the_context() -> None:
    needed = ReconstructionCounts(floor=0.0).shares(profile_of(3), LIMITS).entries
    kept = Duo().shares(profile_of(3), LIMITS).entries == 1004
    assert needed[kept].min() >= needed[~kept].max()


def test_head_adaptive_gives_every_layer_the_same_and_every_head_its_safeguard() -> None:
    entries = HeadAdaptive(safeguard=0.2).shares(profile_of(4), LIMITS).entries
    assert entries.sum(1) == pytest.approx([900] * LAYERS)
    assert entries.min() >= 0.2 * 300
    assert entries.std(1).min() > 1
    even = HeadAdaptive(safeguard=1.0).shares(profile_of(4), LIMITS).entries
    assert even == pytest.approx(300)


@pytest.mark.parametrize("cls", [HeavyHitterCounts, ReconstructionCounts])
@pytest.mark.parametrize("total", [200, 3600, 11000, 13000])
def test_counts_meet_the_total(cls: type[HeavyHitterCounts] | type[ReconstructionCounts], total: int) -> None:
    entries = cls(floor=0.0).shares(profile_of(5), limits_for(total, 5, 1004)).entries
    assert entries.sum() == pytest.approx(min(total, 12 * 1004))


def test_counts_are_those_above_one_threshold_over_all_heads() -> None:
    # ln score = -slope x ln rank, so that a threshold t leaves e^(t / slope) entries, beside 4 sinks
    slopes = np.random.default_rng(0).uniform(1, 2, (LAYERS, KV_HEADS))
    scores = np.broadcast_to(-slopes[..., None] * np.log(RANKS), (2, 1, LAYERS, KV_HEADS, len(RANKS)))
    given = profile_of(0)
    profile = profile_with(
        np.ones((LAYERS, KV_HEADS, GROUP)), given.layer_importance, scores, np.ones((LAYERS, KV_HEADS, 4, 5))
    )
    entries = ReconstructionCounts(floor=0.0).shares(profile, limits_for(1500, 5, 1004)).entries
    thresholds = np.log(entries - 4) * slopes
    assert thresholds == pytest.approx(thresholds[0, 0], rel=1e-4)


def test_a_tilt_favours_late_layers() -> None:
    flat, tilted = (ReconstructionCounts(tilt=tilt).shares(profile_of(6), LIMITS).entries for tilt in (0.0, 2.0))
    assert tilted[-1].sum() > flat[-1].sum()
    assert tilted[0].sum() < flat[0].sum()


@pytest.mark.parametrize("bits", ["given", "any"])
def test_no_exchange_between_two_heads_loses_less_than_greedy(bits: str) -> None:
    limits = limits_for(12 * 200, 16, 1004, BITS[1])
    table = table_of(convex(0), "error", limits, [BITS[1]] if bits == "given" else None)
    budgets = greedy_budgets(table)
    assert budgets.sum() == pytest.approx(limits.bytes)

    def predicted(spread: np.ndarray) -> float:
        """Sum of the losses on the lower hulls of all points: the least chord at these bytes."""
        costs, losses = table.costs.ravel(), table.losses.reshape(12, -1)
        return sum(hull_at(costs, losses[head], spread[head]) for head in range(12))

    least, draw = predicted(budgets), np.random.default_rng(1)
    for _ in range(100):
        giver, taker = draw.choice(12, 2, replace=False)
        most = min(budgets[giver] - table.costs.min(), table.costs.max() - budgets[taker])
        moved = budgets.copy()
        moved[[giver, taker]] += np.array([-1, 1]) * draw.uniform(0, max(most, 0))
        assert predicted(moved) >= least - 1e-12


def hull_at(costs: np.ndarray, losses: np.ndarray, budget: float) -> float:
    chords = [
        losses[i] + (budget - costs[i]) / max(costs[j] - costs[i], 1e-9) * (losses[j] - losses[i])
        for i in np.flatnonzero(costs <= budget + 1e-6)
        for j in np.flatnonzero(costs >= budget - 1e-6)
    ]
    return min([*chords, *losses[costs <= budget + 1e-6]])


def test_greedy_takes_fewer_bits_where_they_lose_little() -> None:
    profile, limits = convex(2), limits_for(12 * 100, 16, 1004)
    given, chosen = (Greedy(bits=bits).shares(profile, limits) for bits in ("given", "any"))
    assert set(given.pairs) == {(16, 16)}
    assert chosen.entries.sum() > 2 * given.entries.sum()
    assert head_costs(chosen, limits).sum() <= limits.bytes * (1 + 1e-9)


def test_bits_without_a_curve_are_refused() -> None:
    with pytest.raises(UserError, match=r"no loss curves for bits k8v8; choose among k16v16, k4v4, k4v2, k3v3"):
        Greedy().shares(profile_of(0), limits_for(1000, 5, 500, (8, 8)))


def test_a_missing_measure_is_refused() -> None:
    curves = profile_of(0).curves
    assert curves is not None
    text = {"text": curves.losses["text"]}
    profile = profile_of(0).model_copy(update={"curves": curves.model_copy(update={"losses": text})})
    with pytest.raises(UserError, match="no curves of 'error'; choose one of text"):
        Greedy().shares(profile, LIMITS)


def test_blended_with_reconstruction_alone_is_reconstruction_counts() -> None:
    counts = ReconstructionCounts(floor=0.15).shares(profile_of(7), LIMITS).entries
    assert Blended(floor=0.15).shares(profile_of(7), LIMITS).entries == pytest.approx(counts, rel=1e-6)


@pytest.mark.parametrize("power", ["importance_power", "layer_power", "curve_power"])
def test_every_power_of_a_blend_changes_it(power: str) -> None:
    base, blended = (Blended(**knobs).shares(profile_of(8), LIMITS).entries for knobs in ({}, {power: 1.0}))
    assert not np.allclose(base, blended, rtol=0.01)


@pytest.mark.parametrize("seed", range(4))
def test_a_blend_that_chooses_bits_loses_less_by_its_curves(seed: int) -> None:
    profile, limits = profile_of(seed), limits_of(geometry_of(), 0.2, 1004, HeavyHitter().choice, (16, 16))
    given, chosen = (Blended(bits=bits).shares(profile, limits) for bits in ("given", "curves"))
    assert len(set(chosen.pairs)) > 1
    assert chosen.entries.sum() > given.entries.sum()
    assert head_costs(chosen, limits).sum() <= limits.bytes * (1 + 1e-9)


def test_shifts_move_entries_and_keep_the_bytes() -> None:
    profile, base = profile_of(9), Baklava()
    grid = np.zeros((LAYERS, KV_HEADS))
    grid[1, 2] = 1.0
    zero, one = (Shifted(base, tuple(map(tuple, shifts.tolist()))) for shifts in (grid * 0, grid))
    entries = base.shares(profile, LIMITS).entries
    assert zero.shares(profile, LIMITS).entries == pytest.approx(entries)
    shifted = one.shares(profile, LIMITS)
    ratio = shifted.entries / entries
    assert ratio[1, 2] == pytest.approx(2 * ratio[0, 0])
    assert head_costs(shifted, LIMITS).sum() == pytest.approx(LIMITS.bytes)
    assert "shifted" not in METHODS
    with pytest.raises(UserError, match="shifts of 1 layers do not fit 4 layers of 3 KV heads"):
        Shifted(base, ((0.0, 0.0, 0.0),)).shares(profile, LIMITS)


def test_a_plan_remembers_what_was_shifted() -> None:
    method = Shifted(Greedy(bits="any"), ((0.5,) * KV_HEADS,) * LAYERS)
    plan = allocate(profile_of(0), budget=0.3, context_length=2000, method=method, eviction=Streaming())
    assert plan.allocation.knobs["of"] == "Greedy(measure='error', bits='any')"


def test_a_permuted_plan_has_the_same_budgets_in_other_heads() -> None:
    method, eviction = Greedy(bits="any"), HeavyHitter()
    plan = allocate(profile_of(1), budget=0.2, context_length=2000, method=method, eviction=eviction)
    dealt, again, other = (permuted(plan, seed) for seed in (1, 1, 2))
    assert type(plan).model_validate_json(dealt.model_dump_json()) == dealt == again
    assert dealt.layers not in (plan.layers, other.layers)
    assert dealt.bytes_per_sequence == plan.bytes_per_sequence
    budgets = [
        sorted(
            head
            for layer in each.layers
            if layer
            for head in zip(layer.tokens, layer.key_bits, layer.value_bits, strict=True)
        )
        for each in (plan, dealt)
    ]
    assert budgets[0] == budgets[1]
