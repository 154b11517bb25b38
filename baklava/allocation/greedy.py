"""Greedy allocation: bytes go to the heads whose measured loss curves fall most.

`LossTable` is what heads lose at a number of bytes, `greedy_bytes` minimizes the sum of the losses, and `Greedy` is the
method.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, cast, get_args

import numpy as np
from jaxtyping import Bool, Float, Int
from typing_extensions import override

from baklava.allocation.base import (
    Allocation,
    AllocationResult,
    BitPair,
    HeadGrid,
    Limits,
    missing_profile_error,
    scale_to_budget,
)
from baklava.errors import UserError
from baklava.profiling.profile import LossMeasure, Profile


@dataclass(frozen=True)
class Greedy(Allocation):
    """Bytes go to the head whose loss curve has the steepest convex hull (LU-KV, arXiv 2602.08585).

    The sum of losses is minimal if heads are independent and their curves convex.

    Attributes:
        measure: loss of the curves.
        bits: "fixed" uses the bits of the plan; with "any" each head takes the measured pair that loses least.
    """

    name: ClassVar[str] = "greedy"

    measure: LossMeasure = "error"
    bits: Literal["fixed", "any"] = "fixed"

    def __post_init__(self) -> None:
        measures = get_args(LossMeasure)
        self.require(self.measure in measures, f"measure must be one of {', '.join(measures)}")
        self.require(self.bits in ("fixed", "any"), "bits must be fixed or any")

    @override
    def allocate(self, profile: Profile, limits: Limits) -> AllocationResult:
        table = LossTable.from_profile(profile, self.measure, limits, [limits.bits] if self.bits == "fixed" else None)
        result, _ = table.best_bits(greedy_bytes(table))
        return scale_to_budget(result, limits)


HeadBytes = Float[np.ndarray, " heads"]


@dataclass(frozen=True)
class LossTable:
    """Losses of every head per bit pair and number of entries.

    Attributes:
        limits: what the heads may hold.
        pairs: bits of keys and values.
        entries: ascending, from the minimum capacity of a head to the maximum.
        losses: lower is better.
        prices: bytes per entry of a head, per pair.
        fixed: bytes of a head that do not grow with its entries, per pair.
    """

    limits: Limits
    pairs: tuple[BitPair, ...]
    entries: Float[np.ndarray, " points"]
    losses: Float[np.ndarray, "heads pairs points"]
    prices: Int[np.ndarray, " pairs"]
    fixed: Int[np.ndarray, " pairs"]

    @classmethod
    def from_profile(
        cls, profile: Profile, measure: LossMeasure, limits: Limits, pairs: Sequence[BitPair] | None = None
    ) -> "LossTable":
        """Return the curves of these bit pairs (None: of all measured ones), made to decrease with every entry.

        Curves stretch with the context, as rankings do. Below the fewest measured entries they are extrapolated.

        Raises:
            UserError: the profile lacks curves, this measure, or these bits.
        """
        curves = profile.curves
        if curves is None:
            raise missing_profile_error(profile, "loss curves")
        if measure not in curves.losses:
            known = ", ".join(curves.losses)
            raise UserError(f"the profile of {profile.model.id} has no curves of {measure!r}; choose one of {known}")
        missing = set(pairs or ()) - set(curves.bits)
        if missing:
            raise UserError(
                f"no loss curves for bits {_format_pairs(missing)}; choose among "
                f"{_format_pairs(curves.bits)}, which the profile has, or profile again with these"
            )
        chosen = tuple(pairs or cast(Sequence[BitPair], curves.bits))
        losses = np.array([curves.losses[measure][layer] for layer in profile.geometry.full_attention_layers])
        if not np.isfinite(losses).all():
            raise UserError(
                f"the profile of {profile.model.id} has loss curves that are not finite; profile it in float32"
            )
        rows = [curves.bits.index(pair) for pair in chosen]
        losses = losses.reshape(limits.num_heads, *losses.shape[2:])[:, rows]
        decreasing = np.minimum.accumulate(losses, axis=-1)
        entries = np.array(curves.entries) * (limits.max_tokens / curves.entries[-1])
        entries, losses = _start_at_min_tokens(limits, entries, decreasing)
        prices, fixed = np.array([(limits.entry_bytes(pair), limits.fixed_bytes(pair)) for pair in chosen]).T
        return cls(limits, chosen, entries, losses, prices, fixed)

    @property
    def costs(self) -> Float[np.ndarray, "pairs points"]:
        """Bytes of a head per pair and number of entries."""
        return self.fixed[:, None] + self.prices[:, None] * self.entries

    def best_bits(self, head_bytes: HeadBytes) -> tuple[AllocationResult, Bool[np.ndarray, "layers kv_heads"]]:
        """Return each head in the bits that lose least at its bytes, and which heads no pair of bits fits."""
        entries = (head_bytes[:, None] - self.fixed) / self.prices
        fits = entries >= self.limits.min_tokens - 1e-6  # bytes were added up, so they are not exact
        entries = np.clip(entries, self.limits.min_tokens, self.limits.max_tokens)
        predicted = interpolate(np.log(entries)[:, :, None], np.log(self.entries), self.losses)[:, :, 0]
        best = np.where(fits, predicted, np.inf).argmin(1)
        shape = (-1, self.limits.geometry.kv_heads)
        key_bits, value_bits = np.array(self.pairs)[best].T
        entries = np.take_along_axis(entries, best[:, None], 1)
        result = AllocationResult(entries.reshape(shape), key_bits.reshape(shape), value_bits.reshape(shape))
        return result, ~fits.any(1).reshape(shape)


def greedy_bytes(table: LossTable) -> HeadBytes:
    """Return the bytes per head that minimize the sum of the losses, if every curve is its lower convex hull.

    All heads begin with the cheapest point. Then edges of the hulls are bought, the steepest first, the last ones in
    part.

    Raises:
        UserError: the budget does not suffice for the cheapest points.
    """
    costs, losses = table.costs.ravel(), table.losses.reshape(len(table.losses), -1)
    cheapest, budget_bytes = costs.min(), float(table.limits.budget_bytes)
    if cheapest * len(losses) > budget_bytes:
        raise UserError(
            f"{table.limits.budget_bytes} bytes do not suffice for {table.limits.min_tokens} entries per head in bits "
            f"{_format_pairs(table.pairs)}, which have loss curves; raise the budget or profile fewer bits"
        )
    heads, sizes, slopes = _convex_hull_edges(costs, losses)
    # Edges of equal slope are bought together, so that equal heads stay equal.
    _, group = np.unique(-slopes, return_inverse=True)
    group_sizes = np.bincount(group, sizes)
    remaining = budget_bytes - cheapest * len(losses) - (np.cumsum(group_sizes) - group_sizes)
    bought = np.clip(remaining / group_sizes, 0, 1)[group] * sizes
    return cheapest + np.bincount(heads, bought, minlength=len(losses))


def curve_counts(profile: Profile, measure: LossMeasure, limits: Limits) -> HeadGrid:
    """Return the entries per head that minimize the sum of the losses, in the bits of `limits`."""
    table = LossTable.from_profile(profile, measure, limits, [limits.bits])
    result, _ = table.best_bits(greedy_bytes(table))
    return result.entries


def interpolate(
    at: Float[np.ndarray, "#heads #pairs n"],
    points: Float[np.ndarray, " p"],
    values: Float[np.ndarray, "heads pairs p"],
) -> Float[np.ndarray, "heads pairs n"]:
    """Return values at other points, on straight lines; the outermost ones are extended."""
    at = np.broadcast_to(at, (*values.shape[:2], at.shape[2]))
    right = np.clip(np.searchsorted(points, at), 1, len(points) - 1)
    left_value, right_value = (np.take_along_axis(values, index, 2) for index in (right - 1, right))
    part = (at - points[right - 1]) / (points[right] - points[right - 1])
    return left_value + part * (right_value - left_value)


def _format_pairs(pairs: Iterable[tuple[int, int]]) -> str:
    return ", ".join(f"k{keys}v{values}" for keys, values in pairs)


def _start_at_min_tokens(
    limits: Limits, entries: Float[np.ndarray, " p"], losses: Float[np.ndarray, "heads pairs p"]
) -> tuple[Float[np.ndarray, " points"], Float[np.ndarray, "heads pairs points"]]:
    """Return the points above the minimum capacity of a head, preceded by one at it."""
    start = np.full((1, 1, 1), float(limits.min_tokens))
    first = interpolate(np.log(start), np.log(entries), losses)
    above = entries > limits.min_tokens
    return np.append(start.ravel(), entries[above]), np.concatenate([first, losses[:, :, above]], axis=2)


def _convex_hull_edges(
    costs: Float[np.ndarray, " points"], losses: Float[np.ndarray, "heads points"]
) -> tuple[Int[np.ndarray, " edges"], Float[np.ndarray, " edges"], Float[np.ndarray, " edges"]]:
    """Return head, bytes and slope of every edge of the lower convex hulls, per head in descending slope.

    All heads advance together: from its current point each hull goes to the point with the steepest descent.
    """
    rows = np.arange(len(losses))
    current = np.where(costs == costs.min(), losses, np.inf).argmin(1)
    edges: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    while True:
        extra_cost = costs - costs[current][:, None]
        gain = losses[rows, current][:, None] - losses
        slopes = np.where(extra_cost > 0, gain / np.where(extra_cost > 0, extra_cost, 1), 0)
        following, steepest = slopes.argmax(1), slopes.max(1)
        edges.append((rows, costs[following] - costs[current], steepest))
        if not steepest.max() > 0:
            heads, sizes, descents = (np.concatenate(parts) for parts in zip(*edges, strict=True))
            return heads[descents > 0], sizes[descents > 0], descents[descents > 0]
        current = np.where(steepest > 0, following, current)
