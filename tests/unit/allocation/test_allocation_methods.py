"""Properties of single allocation methods."""

from pathlib import Path

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
    AdaKV,
    Baklava,
    Blended,
    DuoAttention,
    Greedy,
    HeavyHitterCounts,
    Perturbed,
    PyramidKV,
    ReconstructionCounts,
    SqueezeAttention,
    Uniform,
    allocate,
    budget_limits,
    build_allocation,
    shuffled,
)
from baklava.allocation.base import bytes_per_head
from baklava.allocation.greedy import LossTable, greedy_bytes
from baklava.allocation.layerwise import lowest_cluster
from baklava.errors import UserError
from baklava.eviction import HeavyHitter, StreamingLLM
from baklava.plan.budget_plan import BudgetPlan
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
    shares = Baklava(importance_power=1.0).allocate(profile, LIMITS).entries
    assert (np.argsort(shares, axis=None) == np.argsort(grid, axis=None)).all()
    even = Baklava(importance_power=0.0).allocate(profile, LIMITS).entries
    assert np.allclose(even, Uniform().allocate(profile, LIMITS).entries, rtol=1e-6)


def test_the_reduction_and_the_layer_power_change_the_budgets() -> None:
    base, *others = (
        method.allocate(profile_of(2), LIMITS).entries
        for method in (Baklava(), Baklava(reduction="max"), Baklava(layer_power=1.0))
    )
    assert not any(np.allclose(base, other) for other in others)
    with pytest.raises(UserError, match="has no source 'hidden'"):
        Baklava(source="hidden").allocate(profile_of(0), LIMITS)


def test_a_pyramid_falls_by_the_same_step_from_layer_to_layer() -> None:
    entries = PyramidKV(steepness=0.9).allocate(profile_of(0), LIMITS).entries
    assert entries[:, 0] == pytest.approx([570, 390, 210, 30])
    assert (entries == entries[:, :1]).all()


def test_squeeze_attention_moves_entries_from_the_least_important_layers_to_the_others() -> None:
    layers = profile_of(0).model_copy(update={"layer_importance": (0.9, 0.1, 0.12, 0.5)})
    entries = SqueezeAttention(share=0.4).allocate(layers, LIMITS).entries
    assert entries == pytest.approx(np.repeat([[480], [120], [120], [480]], 3, axis=1))


@pytest.mark.parametrize("seed", range(5))
def test_clusters_are_those_of_least_squares(seed: int) -> None:
    values = np.random.default_rng(seed).uniform(0, 1, 7)
    ordered = np.sort(values)
    splits = [(i, j) for i in range(1, 7) for j in range(i + 1, 7)]
    best = min(splits, key=lambda cut: sum(part.size * part.var() for part in np.split(ordered, cut)))
    assert lowest_cluster(values).sum() == best[0]
    assert values[lowest_cluster(values)].max() == ordered[best[0] - 1]


def test_equally_important_layers_are_not_squeezed() -> None:
    assert not lowest_cluster(np.full(5, 0.3)).any()
    assert lowest_cluster(np.array([0.2, 0.7, 0.2])).tolist() == [True, False, True]


@pytest.mark.parametrize("total", [400, 3600, 9000])
def test_duo_attention_heads_keep_everything_or_a_recent_window(total: int) -> None:
    limits = limits_for(total, 5, 1004)
    entries = DuoAttention(tokens=64).allocate(profile_of(3), limits).entries
    levels = np.unique(entries)
    assert len(levels) <= 2
    assert entries.sum() == pytest.approx(total)
    assert (entries == 1004).sum() == max(0, total - 12 * 68) // (1004 - 68)
    assert levels[0] >= min(total / 12, 68)


def test_retrieval_heads_need_most_entries_to_repeat_the_context() -> None:
    needed = ReconstructionCounts(floor=0.0).allocate(profile_of(3), LIMITS).entries
    kept = DuoAttention().allocate(profile_of(3), LIMITS).entries == 1004
    assert needed[kept].min() >= needed[~kept].max()


def test_adakv_gives_every_layer_the_same_and_every_head_its_safeguard() -> None:
    entries = AdaKV(safeguard=0.2).allocate(profile_of(4), LIMITS).entries
    assert entries.sum(1) == pytest.approx([900] * LAYERS)
    assert entries.min() >= 0.2 * 300
    assert entries.std(1).min() > 1
    even = AdaKV(safeguard=1.0).allocate(profile_of(4), LIMITS).entries
    assert even == pytest.approx(300)


@pytest.mark.parametrize("cls", [HeavyHitterCounts, ReconstructionCounts])
@pytest.mark.parametrize("total", [200, 3600, 11000, 13000])
def test_counts_meet_the_total(cls: type[HeavyHitterCounts] | type[ReconstructionCounts], total: int) -> None:
    entries = cls(floor=0.0).allocate(profile_of(5), limits_for(total, 5, 1004)).entries
    assert entries.sum() == pytest.approx(min(total, 12 * 1004))


def test_counts_are_those_above_one_threshold_over_all_heads() -> None:
    # ln score = -slope x ln rank, so that a threshold t leaves e^(t / slope) entries, in addition to 4 sinks
    slopes = np.random.default_rng(0).uniform(1, 2, (LAYERS, KV_HEADS))
    scores = np.broadcast_to(-slopes[..., None] * np.log(RANKS), (2, 1, LAYERS, KV_HEADS, len(RANKS)))
    profile = profile_with(
        np.ones((LAYERS, KV_HEADS, GROUP)), profile_of(0).layer_importance, scores, np.ones((LAYERS, KV_HEADS, 4, 5))
    )
    entries = ReconstructionCounts(floor=0.0).allocate(profile, limits_for(1500, 5, 1004)).entries
    thresholds = np.log(entries - 4) * slopes
    assert thresholds == pytest.approx(thresholds[0, 0], rel=1e-4)


def test_a_layer_tilt_favours_late_layers() -> None:
    flat, tilted = (
        ReconstructionCounts(layer_tilt=tilt).allocate(profile_of(6), LIMITS).entries for tilt in (0.0, 2.0)
    )
    assert tilted[-1].sum() > flat[-1].sum()
    assert tilted[0].sum() < flat[0].sum()


@pytest.mark.parametrize("bits", ["fixed", "any"])
def test_no_exchange_between_two_heads_loses_less_than_greedy(bits: str) -> None:
    limits = limits_for(12 * 200, 16, 1004, BITS[1])
    table = LossTable.from_profile(convex(0), "error", limits, [BITS[1]] if bits == "fixed" else None)
    budgets = greedy_bytes(table)
    assert budgets.sum() == pytest.approx(limits.budget_bytes)

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
    fixed, chosen = (Greedy(bits=bits).allocate(profile, limits) for bits in ("fixed", "any"))
    assert set(fixed.bit_pairs) == {(16, 16)}
    assert chosen.entries.sum() > 2 * fixed.entries.sum()
    assert bytes_per_head(chosen, limits).sum() <= limits.budget_bytes * (1 + 1e-9)


def test_bits_without_a_curve_are_refused() -> None:
    with pytest.raises(UserError, match=r"no loss curves for bits k8v8; choose among k16v16, k4v4, k4v2, k3v3"):
        Greedy().allocate(profile_of(0), limits_for(1000, 5, 500, (8, 8)))


def test_a_missing_measure_is_refused() -> None:
    curves = profile_of(0).curves
    assert curves is not None
    text = {"text": curves.losses["text"]}
    profile = profile_of(0).model_copy(update={"curves": curves.model_copy(update={"losses": text})})
    with pytest.raises(UserError, match="no curves of 'error'; choose one of text"):
        Greedy().allocate(profile, LIMITS)


def test_blended_with_reconstruction_alone_is_reconstruction_counts() -> None:
    counts = ReconstructionCounts(floor=0.15).allocate(profile_of(7), LIMITS).entries
    assert Blended(floor=0.15).allocate(profile_of(7), LIMITS).entries == pytest.approx(counts, rel=1e-6)


@pytest.mark.parametrize("power", ["importance_power", "layer_power", "curve_power"])
def test_every_power_of_a_blend_changes_it(power: str) -> None:
    base, blended = (Blended(**params).allocate(profile_of(8), LIMITS).entries for params in ({}, {power: 1.0}))
    assert not np.allclose(base, blended, rtol=0.01)


@pytest.mark.parametrize("seed", range(4))
def test_a_blend_that_chooses_bits_loses_less_by_its_curves(seed: int) -> None:
    profile, limits = profile_of(seed), budget_limits(geometry_of(), 0.2, 1004, HeavyHitter().config, (16, 16))
    fixed, chosen = (Blended(bits=bits).allocate(profile, limits) for bits in ("fixed", "curves"))
    assert len(set(chosen.bit_pairs)) > 1
    assert chosen.entries.sum() > fixed.entries.sum()
    assert bytes_per_head(chosen, limits).sum() <= limits.budget_bytes * (1 + 1e-9)


def test_perturbations_move_entries_and_keep_the_bytes() -> None:
    profile, base = profile_of(9), Baklava()
    grid = np.zeros((LAYERS, KV_HEADS))
    grid[1, 2] = 1.0
    zero, one = (Perturbed(base, tuple(map(tuple, factors.tolist()))) for factors in (grid * 0, grid))
    entries = base.allocate(profile, LIMITS).entries
    assert zero.allocate(profile, LIMITS).entries == pytest.approx(entries)
    perturbed = one.allocate(profile, LIMITS)
    ratio = perturbed.entries / entries
    assert ratio[1, 2] == pytest.approx(2 * ratio[0, 0])
    assert bytes_per_head(perturbed, LIMITS).sum() == pytest.approx(LIMITS.budget_bytes)
    assert "perturbed" not in METHODS
    with pytest.raises(UserError, match="log2_factors of 1 layers do not fit 4 layers of 3 KV heads"):
        Perturbed(base, ((0.0, 0.0, 0.0),)).allocate(profile, LIMITS)


def test_a_perturbed_plan_round_trips_and_rebuilds_its_method(tmp_path: Path) -> None:
    inner = Perturbed(Greedy(bits="any"), ((0.5,) * KV_HEADS,) * LAYERS)
    method = Perturbed(inner, ((-0.25,) * KV_HEADS,) * LAYERS)
    plan = allocate(profile_of(0), budget=0.3, context_length=2000, method=method, eviction=StreamingLLM())
    plan.write(tmp_path / "plan.json")
    read = BudgetPlan.read(tmp_path / "plan.json")
    assert read == plan
    assert build_allocation(read.allocation.method, read.allocation.params) == method
    base = {"method": "greedy", "params": {"measure": "error", "bits": "any"}}
    assert inner.params == {"base": base, "log2_factors": [[0.5] * KV_HEADS] * LAYERS}


def test_parameters_that_do_not_fit_a_method_are_one_sentence() -> None:
    with pytest.raises(UserError, match=r"do not fit greedy .* make a new plan"):
        build_allocation("greedy", {"loudness": 1.0})
    with pytest.raises(UserError, match="unknown allocation method 'pagoda'"):
        build_allocation("perturbed", {"base": {"method": "pagoda", "params": {}}, "log2_factors": [[0.0]]})
    for base in ({"method": "greedy"}, {"params": {}}, {"method": ["greedy"], "params": {}}):
        with pytest.raises(UserError, match="is not a method in a plan"):
            build_allocation("perturbed", {"base": base, "log2_factors": [[0.0]]})


def test_a_shuffled_plan_has_the_same_budgets_in_other_heads() -> None:
    method, eviction = Greedy(bits="any"), HeavyHitter()
    plan = allocate(profile_of(1), budget=0.2, context_length=2000, method=method, eviction=eviction)
    first, again, other = (shuffled(plan, seed) for seed in (1, 1, 2))
    assert type(plan).model_validate_json(first.model_dump_json()) == first == again
    assert first.layers not in (plan.layers, other.layers)
    assert first.bytes_per_sequence == plan.bytes_per_sequence
    budgets = [
        sorted(
            head
            for layer in each.layers
            if layer
            for head in zip(layer.tokens, layer.key_bits, layer.value_bits, strict=True)
        )
        for each in (plan, first)
    ]
    assert budgets[0] == budgets[1]
