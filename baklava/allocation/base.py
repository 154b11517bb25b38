"""The allocation plug-in: a dataclass with one verb that says how many entries each KV head gets, in how many bits."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields, replace
from typing import ClassVar

import numpy as np
from jaxtyping import Float, Int

from baklava.errors import UserError
from baklava.plan.budget_plan import Bits, EvictionChoice, ParamValue, head_bytes
from baklava.plan.geometry import CacheGeometry
from baklava.profiling.profile import Profile

Pair = tuple[Bits, Bits]
"""Bits of the keys and bits of the values."""

Grid = Float[np.ndarray, "layers kv_heads"]

MOST_POWER = 16
"""Powers of what a profile says lie between minus and plus this: those far beyond overflow."""


@dataclass(frozen=True)
class Limits:
    """What an allocation has to spend: `bytes` over all budgeted heads, each of `least` to `most` entries.

    `bits` are the (key, value) bits of methods that do not choose them; `graded` tells that packed keys have more
    bits in the channels that matter most.
    """

    geometry: CacheGeometry
    eviction: EvictionChoice
    bytes: int
    least: int
    most: int
    bits: Pair
    graded: bool = False

    @property
    def heads(self) -> int:
        """Budgeted KV heads of the model."""
        return len(self.geometry.budgetable) * self.geometry.kv_heads

    @property
    def total(self) -> int:
        """Entries of all heads together when every head stores them in `bits`."""
        fixed = self.fixed_bytes(self.bits)
        return max(0, self.bytes - self.heads * fixed) // self.entry_bytes(self.bits)

    def within(self, floor: float, cap: float = 1.0) -> tuple[float, float]:
        """Fewest and most entries of a head: at least `floor` of the uniform share, at most `cap` of all entries."""
        uniform = self.total / self.heads
        least, most = max(self.least, floor * uniform), max(cap * self.most, uniform)
        return float(min(least, self.most)), float(min(most, self.most))

    def entry_bytes(self, bits: Pair) -> int:
        """Bytes that one more entry costs a head."""
        return self._head(self.most + 1, bits) - self._head(self.most, bits)

    def fixed_bytes(self, bits: Pair) -> int:
        """Bytes of a head beside its entries x `entry_bytes`: what sinks and staged tokens cost above packed ones."""
        return self._head(self.most, bits) - self.most * self.entry_bytes(bits)

    def _head(self, tokens: int, bits: Pair) -> int:
        return head_bytes(self.geometry, tokens, *bits, self.eviction, self.graded)


@dataclass(frozen=True)
class Shares:
    """Entries per KV head, not yet rounded, and the bits of its keys and values. Rows are the budgetable layers."""

    entries: Grid
    key_bits: Int[np.ndarray, "layers kv_heads"]
    value_bits: Int[np.ndarray, "layers kv_heads"]

    @classmethod
    def of(cls, entries: Grid, bits: Pair) -> "Shares":
        """The same bits in every head."""
        key_bits, value_bits = (np.full(entries.shape, each) for each in bits)
        return cls(entries, key_bits, value_bits)

    @property
    def pairs(self) -> list[Pair]:
        """Bits of every head, layer after layer."""
        return list(zip(self.key_bits.ravel().tolist(), self.value_bits.ravel().tolist(), strict=True))


@dataclass(frozen=True)
class Allocation(ABC):
    """Spreads a number of bytes over the (layer, KV head) grid."""

    name: ClassVar[str]
    profiled: ClassVar[bool] = True
    """Whether the method asks the profile for more than the geometry."""

    @abstractmethod
    def shares(self, profile: Profile, limits: Limits) -> Shares:
        """What each KV head gets; all together cost at most `limits.bytes`, each has `least` to `most` entries."""

    @property
    def knobs(self) -> dict[str, ParamValue]:
        """The method's knobs by name; what is not a plain value, as text."""
        values = {knob.name: getattr(self, knob.name) for knob in fields(self)}
        return {name: value if isinstance(value, ParamValue) else repr(value) for name, value in values.items()}

    def check(self, holds: bool, rule: str) -> None:
        """Raise UserError unless the rule about this method's knobs holds."""
        if not holds:
            knobs = ", ".join(f"{name} {value!r}" for name, value in self.knobs.items())
            raise UserError(f"{self.name} with {knobs}: {rule}")

    def check_powers(self, *powers: float) -> None:
        """Raise UserError unless all powers lie within the range of `MOST_POWER`."""
        right = all(abs(power) <= MOST_POWER for power in powers)
        self.check(right, f"powers must be within [-{MOST_POWER}, {MOST_POWER}]")


def lacking(profile: Profile, what: str) -> UserError:
    """The error of a method that asks for something which a profile does not hold."""
    cure = "profile the model again"
    if len(profile.geometry.budgetable) < profile.geometry.layers:
        cure = "choose another method, since some of its layers slide"
    elif profile.rankings:
        cure = "choose another method, or a lower --context, which leaves the model room to repeat it"
    return UserError(f"the profile of {profile.model.id} has no {what}, which this method asks for; {cure}")


def proportional(
    weights: Grid, total: float, least: float, most: float, prices: Int[np.ndarray, "layers kv_heads"] | int = 1
) -> Grid:
    """Spread `total` so that shares are proportional to the weights, every one within [least, most].

    A unit of a share costs `prices` of the total. The scale is found by bisection: the sum of the clipped shares grows
    with it. When all heads reach `most`, less than `total` is spent.
    """
    weights = np.maximum(weights, 1e-12)
    low, high = 0.0, most / weights.min()
    for _ in range(200):
        middle = (low + high) / 2
        if (np.clip(weights * middle, least, most) * prices).sum() <= total:
            low = middle
        else:
            high = middle
    return np.clip(weights * low, least, most)


def filled(shares: Shares, limits: Limits) -> Shares:
    """The same bits, and entries in the same proportions, scaled until they cost what there is to spend."""
    prices, fixed = _prices(shares, limits)
    spendable = float(limits.bytes - fixed.sum())
    entries = proportional(shares.entries, spendable, float(limits.least), float(limits.most), prices)
    return replace(shares, entries=entries)


def rounded(shares: Shares, limits: Limits, step: int) -> Int[np.ndarray, "layers kv_heads"]:
    """Round to multiples of `step`, so that heads share capacities; the bytes are met to within a step of a head.

    Heads at the least or the most that they may have hold that, a multiple or not, and steps from the least count from
    there. Shares are rounded down, then the bytes left go, a step each, to the heads with the largest remainders.
    """
    levels = np.maximum(np.floor(shares.entries / step) * step, limits.least).astype(int)
    prices, _ = _prices(shares, limits)
    left = limits.bytes - spent(levels, shares, limits)
    for index in np.argsort(levels - shares.entries, axis=None, kind="stable"):
        more = min(step, limits.most - levels.flat[index])
        cost = more * prices.flat[index]
        if 0 < cost <= left:
            levels.flat[index] += more
            left -= cost
    return levels


def spent(tokens: Int[np.ndarray, "layers kv_heads"], shares: Shares, limits: Limits) -> int:
    """Bytes of heads with these capacities, in the bits of `shares`."""
    return int(head_costs(replace(shares, entries=tokens.astype(float)), limits).sum())


def head_costs(shares: Shares, limits: Limits) -> Grid:
    """Bytes of every head."""
    prices, fixed = _prices(shares, limits)
    return shares.entries * prices + fixed


def _prices(shares: Shares, limits: Limits) -> tuple[Int[np.ndarray, "layers kv_heads"], ...]:
    """Bytes that an entry of each head costs, and those of a head beside its entries."""
    pairs = shares.pairs
    known = {pair: (limits.entry_bytes(pair), limits.fixed_bytes(pair)) for pair in set(pairs)}
    prices, fixed = np.array([known[pair] for pair in pairs]).T
    return prices.reshape(shares.entries.shape), fixed.reshape(shares.entries.shape)
