"""The allocation plug-in: a dataclass with one verb, which gives each KV head a number of entries and their bits."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Float, Int

from baklava.errors import UserError
from baklava.plan.budget_plan import Bits, EvictionConfig, head_bytes
from baklava.plan.geometry import CacheGeometry
from baklava.profiling.profile import Profile

BitPair = tuple[Bits, Bits]
"""Bits of the keys and bits of the values."""

HeadGrid = Float[np.ndarray, "layers kv_heads"]
"""A number per KV head; the rows are the full-attention layers."""

MAX_POWER = 16
"""Maximum magnitude of a power; powers far beyond it overflow."""


@dataclass(frozen=True)
class Limits:
    """What an allocation may spend.

    Attributes:
        geometry: the model's KV cache.
        eviction: eviction of the plan.
        budget_bytes: bytes of all budgeted heads together.
        min_tokens: minimum capacity of a head in entries.
        max_tokens: maximum capacity of a head in entries.
        bits: bits of keys and values, for methods that do not choose them.
        mixed_precision: whether quantized keys give their important channels more bits.
    """

    geometry: CacheGeometry
    eviction: EvictionConfig
    budget_bytes: int
    min_tokens: int
    max_tokens: int
    bits: BitPair
    mixed_precision: bool = False

    @property
    def num_heads(self) -> int:
        """Number of budgeted KV heads of the model."""
        return len(self.geometry.full_attention_layers) * self.geometry.kv_heads

    @property
    def total_entries(self) -> int:
        """Entries of all heads together if every head stores them in `bits`."""
        fixed = self.fixed_bytes(self.bits)
        return max(0, self.budget_bytes - self.num_heads * fixed) // self.entry_bytes(self.bits)

    @property
    def min_bytes(self) -> int:
        """Bytes of all heads together if each has the minimum capacity in `bits`."""
        return self.num_heads * self._head_bytes(self.min_tokens, self.bits)

    def bounds(self, floor: float, cap: float = 1.0) -> tuple[float, float]:
        """Return the minimum and maximum entries of a head.

        Args:
            floor: minimum, relative to the uniform share.
            cap: maximum, relative to `max_tokens`.
        """
        uniform = self.total_entries / self.num_heads
        lower, upper = max(self.min_tokens, floor * uniform), max(cap * self.max_tokens, uniform)
        return float(min(lower, self.max_tokens)), float(min(upper, self.max_tokens))

    def entry_bytes(self, bits: BitPair) -> int:
        """Return the bytes that one more entry adds to a head."""
        return self._head_bytes(self.max_tokens + 1, bits) - self._head_bytes(self.max_tokens, bits)

    def fixed_bytes(self, bits: BitPair) -> int:
        """Return the bytes of a head that do not grow with its entries, such as the extra bytes of 16-bit sinks."""
        return self._head_bytes(self.max_tokens, bits) - self.max_tokens * self.entry_bytes(bits)

    def _head_bytes(self, tokens: int, bits: BitPair) -> int:
        return head_bytes(self.geometry, tokens, *bits, self.eviction, self.mixed_precision)


@dataclass(frozen=True)
class AllocationResult:
    """Entries per KV head, not yet rounded, and the bits of its keys and values; rows are full-attention layers."""

    entries: HeadGrid
    key_bits: Int[np.ndarray, "layers kv_heads"]
    value_bits: Int[np.ndarray, "layers kv_heads"]

    @classmethod
    def with_bits(cls, entries: HeadGrid, bits: BitPair) -> "AllocationResult":
        """Return a result with the same bits in every head."""
        key_bits, value_bits = (np.full(entries.shape, number) for number in bits)
        return cls(entries, key_bits, value_bits)

    @property
    def bit_pairs(self) -> list[BitPair]:
        """Bits of every head, layer by layer."""
        return list(zip(self.key_bits.ravel().tolist(), self.value_bits.ravel().tolist(), strict=True))


@dataclass(frozen=True)
class Allocation(ABC):
    """Spreads a number of bytes over the (layer, KV head) grid."""

    name: ClassVar[str]
    needs_profile: ClassVar[bool] = True
    """Whether the method uses more of the profile than the geometry."""

    @abstractmethod
    def allocate(self, profile: Profile, limits: Limits) -> AllocationResult:
        """Return the share of each KV head, within `limits`; all heads together take at most the budget."""

    @property
    def params(self) -> dict[str, Any]:
        """The method's parameters as plain data, from which `build_allocation` builds it again."""
        return {param.name: _plain_data(getattr(self, param.name)) for param in fields(self)}

    def require(self, condition: bool, rule: str) -> None:
        """Raise UserError unless the condition on this method's parameters holds."""
        if not condition:
            params = ", ".join(f"{name} {value!r}" for name, value in self.params.items())
            raise UserError(f"{self.name} with {params}: {rule}")

    def require_bounded_powers(self, *powers: float) -> None:
        """Raise UserError unless the magnitude of all powers is at most `MAX_POWER`."""
        bounded = all(abs(power) <= MAX_POWER for power in powers)
        self.require(bounded, f"powers must be within [-{MAX_POWER}, {MAX_POWER}]")


def _plain_data(value: Any) -> Any:
    if isinstance(value, Allocation):
        return {"method": value.name, "params": value.params}
    return [_plain_data(item) for item in value] if isinstance(value, tuple) else value


def missing_profile_error(profile: Profile, missing: str) -> UserError:
    """Return the error of a method that needs something that the profile lacks."""
    remedy = "profile the model again"
    if profile.rankings:
        remedy = "choose another method, or a lower --context, so that the model's positions suffice to repeat it"
    return UserError(f"the profile of {profile.model.id} has no {missing}, which this method needs; {remedy}")


def distribute_proportionally(
    weights: HeadGrid, total: float, lower: float, upper: float, prices: Int[np.ndarray, "layers kv_heads"] | int = 1
) -> HeadGrid:
    """Distribute `total` in proportion to the weights, with every share within [lower, upper].

    A unit of a share costs its entry of `prices`. If all heads reach `upper`, less than `total` is spent. The scale is
    found by bisection, since the sum of the clipped shares grows with it.
    """
    weights = np.maximum(weights, 1e-12)
    low, high = 0.0, upper / weights.min()
    for _ in range(200):
        middle = (low + high) / 2
        if (np.clip(weights * middle, lower, upper) * prices).sum() <= total:
            low = middle
        else:
            high = middle
    return np.clip(weights * low, lower, upper)


def scale_to_budget(result: AllocationResult, limits: Limits) -> AllocationResult:
    """Return the same bits with entries in the same proportions, scaled until they spend the budget."""
    prices, fixed = _head_prices(result, limits)
    total = float(limits.budget_bytes - fixed.sum())
    lower, upper = float(limits.min_tokens), float(limits.max_tokens)
    return replace(result, entries=distribute_proportionally(result.entries, total, lower, upper, prices))


def round_to_steps(result: AllocationResult, limits: Limits, step: int) -> Int[np.ndarray, "layers kv_heads"]:
    """Round capacities to multiples of `step`, so that heads share capacities; less than a step of bytes is left.

    Heads at the minimum or maximum capacity stay there, and steps up from the minimum count from it. Entries are
    rounded down, then the remaining bytes buy one step each for the heads with the largest remainders.
    """
    tokens = np.maximum(np.floor(result.entries / step) * step, limits.min_tokens).astype(int)
    prices, _ = _head_prices(result, limits)
    remaining_bytes = limits.budget_bytes - total_bytes(tokens, result, limits)
    for index in np.argsort(tokens - result.entries, axis=None, kind="stable"):
        increment = min(step, limits.max_tokens - tokens.flat[index])
        cost = increment * prices.flat[index]
        if 0 < cost <= remaining_bytes:
            tokens.flat[index] += increment
            remaining_bytes -= cost
    return tokens


def total_bytes(tokens: Int[np.ndarray, "layers kv_heads"], result: AllocationResult, limits: Limits) -> int:
    """Return the bytes of all heads with these capacities, in the bits of `result`."""
    return int(bytes_per_head(replace(result, entries=tokens.astype(float)), limits).sum())


def bytes_per_head(result: AllocationResult, limits: Limits) -> HeadGrid:
    """Return the bytes of every head."""
    prices, fixed = _head_prices(result, limits)
    return result.entries * prices + fixed


def _head_prices(result: AllocationResult, limits: Limits) -> tuple[Int[np.ndarray, "layers kv_heads"], ...]:
    """Return the bytes per entry and the fixed bytes of each head."""
    pairs = result.bit_pairs
    prices = {pair: (limits.entry_bytes(pair), limits.fixed_bytes(pair)) for pair in set(pairs)}
    per_entry, fixed = np.array([prices[pair] for pair in pairs]).T
    return per_entry.reshape(result.entries.shape), fixed.reshape(result.entries.shape)
