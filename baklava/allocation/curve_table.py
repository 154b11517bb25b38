"""What heads lose at a number of bytes: the measured loss curves, and how bytes are bought along them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
from jaxtyping import Bool, Float, Int

from baklava.allocation.base import Grid, Limits, Pair, Shares, lacking
from baklava.errors import UserError
from baklava.profiling.profile import Curves, Measure, Profile

Bytes = Float[np.ndarray, " heads"]


@dataclass(frozen=True)
class Table:
    """Losses of every head per pair of bits and per number of entries, from the fewest that it may have to the most.

    `prices` and `fixed` are the bytes of an entry and those of a head beside its entries, per pair.
    """

    limits: Limits
    pairs: tuple[Pair, ...]
    entries: Float[np.ndarray, " points"]
    losses: Float[np.ndarray, "heads pairs points"]
    prices: Int[np.ndarray, " pairs"]
    fixed: Int[np.ndarray, " pairs"]

    @property
    def costs(self) -> Float[np.ndarray, "pairs points"]:
        """Bytes of a head per pair and number of entries."""
        return self.fixed[:, None] + self.prices[:, None] * self.entries

    def best(self, budgets: Bytes) -> tuple[Shares, Bool[np.ndarray, "layers kv_heads"]]:
        """Each head in the bits that lose least at its bytes, and which heads no pair of bits fits."""
        entries = (budgets[:, None] - self.fixed) / self.prices
        fits = entries >= self.limits.least - 1e-6  # bytes were added up, so they are not exact
        entries = np.clip(entries, self.limits.least, self.limits.most)
        chosen = np.where(fits, self._predicted(entries), np.inf).argmin(1)
        shape = (-1, self.limits.geometry.kv_heads)
        key_bits, value_bits = np.array(self.pairs)[chosen].T
        held = np.take_along_axis(entries, chosen[:, None], 1)
        shares = Shares(held.reshape(shape), key_bits.reshape(shape), value_bits.reshape(shape))
        return shares, ~fits.any(1).reshape(shape)

    def _predicted(self, entries: Float[np.ndarray, "heads pairs"]) -> Float[np.ndarray, "heads pairs"]:
        return interpolated(np.log(entries)[:, :, None], np.log(self.entries), self.losses)[:, :, 0]


def table_of(profile: Profile, measure: Measure, limits: Limits, pairs: Sequence[Pair] | None = None) -> Table:
    """The curves of these bits, all measured ones where None, made to fall with every entry.

    Curves stretch with the context, as rankings do. Below the fewest measured entries a curve goes on as it began.

    Raises:
        UserError: the profile lacks curves, this measure, or these bits.
    """
    curves = _curves_of(profile, measure)
    missing = set(pairs or ()) - set(curves.bits)
    if missing:
        raise UserError(
            f"no loss curves for bits {_named(missing)}; choose among "
            f"{_named(curves.bits)}, which the profile has, or profile again with these"
        )
    chosen = tuple(pairs or cast(Sequence[Pair], curves.bits))
    rows = [curves.bits.index(pair) for pair in chosen]
    grid = np.array([curves.losses[measure][layer] for layer in profile.geometry.budgetable])
    if not np.isfinite(grid).all():
        raise UserError(f"the profile of {profile.model.id} has loss curves that are no numbers; profile it in float32")
    falling = np.minimum.accumulate(grid.reshape(limits.heads, *grid.shape[2:])[:, rows], axis=-1)
    entries, losses = _within(limits, np.array(curves.entries) * (limits.most / curves.entries[-1]), falling)
    prices, fixed = np.array([(limits.entry_bytes(pair), limits.fixed_bytes(pair)) for pair in chosen]).T
    return Table(limits, chosen, entries, losses, prices, fixed)


def greedy_budgets(table: Table) -> Bytes:
    """Bytes per head such that no exchange of bytes loses less, were every curve the lower hull of its points.

    All heads begin with the cheapest point; then edges of hulls are bought, the steepest first, the last ones in part.

    Raises:
        UserError: the bytes do not hold even the cheapest points.
    """
    costs, losses = table.costs.ravel(), table.losses.reshape(len(table.losses), -1)
    cheapest, spendable = costs.min(), float(table.limits.bytes)
    if cheapest * len(losses) > spendable:
        raise UserError(
            f"{table.limits.bytes} bytes do not hold {table.limits.least} entries per head in bits "
            f"{_named(table.pairs)}, which have loss curves; raise the budget or profile fewer bits"
        )
    heads, sizes, slopes = _edges(costs, losses)
    # Edges of one slope are bought together, so that heads that are alike stay alike.
    _, group = np.unique(-slopes, return_inverse=True)
    together = np.bincount(group, sizes)
    left = spendable - cheapest * len(losses) - (np.cumsum(together) - together)
    taken = np.clip(left / together, 0, 1)[group] * sizes
    return cheapest + np.bincount(heads, taken, minlength=len(losses))


def curve_counts(profile: Profile, measure: Measure, limits: Limits) -> Grid:
    """Entries per head that lose least together, in the bits of `limits`."""
    shares, _ = (table := table_of(profile, measure, limits, [limits.bits])).best(greedy_budgets(table))
    return shares.entries


def interpolated(
    at: Float[np.ndarray, "#heads #pairs n"],
    points: Float[np.ndarray, " p"],
    values: Float[np.ndarray, "heads pairs p"],
) -> Float[np.ndarray, "heads pairs n"]:
    """Values at other points, on straight lines, the outermost of which go on."""
    at = np.broadcast_to(at, (*values.shape[:2], at.shape[2]))
    right = np.clip(np.searchsorted(points, at), 1, len(points) - 1)
    left_value, right_value = (np.take_along_axis(values, index, 2) for index in (right - 1, right))
    part = (at - points[right - 1]) / (points[right] - points[right - 1])
    return left_value + part * (right_value - left_value)


def _curves_of(profile: Profile, measure: Measure) -> Curves:
    if profile.curves is None:
        raise lacking(profile, "loss curves")
    if measure not in profile.curves.losses:
        known = ", ".join(profile.curves.losses)
        raise UserError(f"the profile of {profile.model.id} has no curves of {measure!r}; choose one of {known}")
    return profile.curves


def _named(pairs: Iterable[tuple[int, int]]) -> str:
    return ", ".join(f"k{keys}v{values}" for keys, values in pairs)


def _within(
    limits: Limits, entries: Float[np.ndarray, " p"], losses: Float[np.ndarray, "heads pairs p"]
) -> tuple[Float[np.ndarray, " points"], Float[np.ndarray, "heads pairs points"]]:
    """The points above the fewest entries that a head may have, with one there."""
    least = np.full((1, 1, 1), float(limits.least))
    first = interpolated(np.log(least), np.log(entries), losses)
    above = entries > limits.least
    return np.append(least.ravel(), entries[above]), np.concatenate([first, losses[:, :, above]], axis=2)


def _edges(
    costs: Float[np.ndarray, " points"], losses: Float[np.ndarray, "heads points"]
) -> tuple[Int[np.ndarray, " edges"], Float[np.ndarray, " edges"], Float[np.ndarray, " edges"]]:
    """Head, bytes and slope of every edge of the lower hulls, those of a head from the steepest on.

    All heads at once: from where a hull has come it goes on to the point that the steepest line leads to.
    """
    rows = np.arange(len(losses))
    here = np.where(costs == costs.min(), losses, np.inf).argmin(1)
    edges: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    while True:
        dearer = costs - costs[here][:, None]
        gained = losses[rows, here][:, None] - losses
        slopes = np.where(dearer > 0, gained / np.where(dearer > 0, dearer, 1), 0)
        onward, steepest = slopes.argmax(1), slopes.max(1)
        edges.append((rows, costs[onward] - costs[here], steepest))
        if not steepest.max() > 0:
            heads, sizes, falls = (np.concatenate(parts) for parts in zip(*edges, strict=True))
            return heads[falls > 0], sizes[falls > 0], falls[falls > 0]
        here = np.where(steepest > 0, onward, here)
