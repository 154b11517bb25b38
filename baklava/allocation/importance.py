"""Allocation by importance: entries in proportion to what a profile measures of a head.

- `Baklava`: head and layer importance, which are those of BaKlaVa (arXiv 2502.13176).
- `Blended`: a product of importance, score counts and counts from the loss curves.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import numpy as np
from jaxtyping import Float
from typing_extensions import override

from baklava.allocation.base import (
    Allocation,
    AllocationResult,
    HeadGrid,
    Limits,
    bytes_per_head,
    distribute_proportionally,
    scale_to_budget,
)
from baklava.allocation.greedy import HeadBytes, LossTable, curve_counts
from baklava.allocation.score_thresholds import mean_counts
from baklava.errors import UserError
from baklava.profiling.profile import ImportanceSource, LossMeasure, Profile

REDUCTIONS: dict[str, Callable[..., np.ndarray]] = {"mean": np.mean, "max": np.max, "sum": np.sum}
"""How the query group of a KV head is reduced."""


@dataclass(frozen=True)
class Baklava(Allocation):
    """Entries ∝ importance^p × layer importance^q (our reading of BaKlaVa, arXiv 2502.13176).

    Attributes:
        importance_power: p, the contrast between heads; 0 makes them equal.
        layer_power: q, the contrast between layers; 0 makes them equal.
        floor: minimum of a head, relative to the uniform share.
        cap: maximum of a head, relative to the context.
        source: the head input that importance compares with the head's output.
        reduction: how the query group is reduced.
    """

    name: ClassVar[str] = "baklava"

    importance_power: float = 2.0
    layer_power: float = 0.0
    floor: float = 0.1
    cap: float = 1.0
    source: ImportanceSource = "value"
    reduction: Literal["mean", "max", "sum"] = "mean"

    def __post_init__(self) -> None:
        self.require(
            self.reduction in REDUCTIONS and 0 <= self.floor <= 1 and 0 < self.cap <= 1,
            f"reduction must be one of {', '.join(REDUCTIONS)}, floor within [0, 1], cap within (0, 1]",
        )
        self.require_bounded_powers(self.importance_power, self.layer_power)

    @override
    def allocate(self, profile: Profile, limits: Limits) -> AllocationResult:
        heads = head_importance(profile, self.source, self.reduction) ** self.importance_power
        weights = heads * layer_importance(profile) ** self.layer_power
        lower, upper = limits.bounds(self.floor, self.cap)
        entries = distribute_proportionally(weights, float(limits.total_entries), lower, upper)
        return AllocationResult.with_bits(entries, limits.bits)


@dataclass(frozen=True)
class Blended(Allocation):
    """Entries ∝ reconstruction counts^a × importance^b × layer importance^c × curve counts^d; our own method.

    The profile may lack a factor whose power is 0. Curve counts minimize the sum of the loss curves of `measure`, in
    the bits of the plan.

    Attributes:
        reconstruction_power: a.
        importance_power: b.
        layer_power: c.
        curve_power: d.
        floor: minimum of a head, relative to the uniform share.
        cap: maximum of a head, relative to the context.
        measure: loss of the curves.
        bits: "fixed" uses the bits of the plan. With "curves" each head takes the measured bits that lose least at its
            bytes, by the same curves. Bytes that full heads leave over raise the bytes of all.
    """

    name: ClassVar[str] = "blended"

    reconstruction_power: float = 1.0
    importance_power: float = 0.0
    layer_power: float = 0.0
    curve_power: float = 0.0
    floor: float = 0.1
    cap: float = 1.0
    measure: LossMeasure = "text"
    bits: Literal["fixed", "curves"] = "fixed"

    def __post_init__(self) -> None:
        self.require(0 <= self.floor <= 1 and 0 < self.cap <= 1, "floor must be within [0, 1], cap within (0, 1]")
        measures = get_args(LossMeasure)
        self.require(self.measure in measures, f"measure must be one of {', '.join(measures)}")
        self.require(self.bits in ("fixed", "curves"), "bits must be fixed or curves")
        self.require_bounded_powers(
            self.reconstruction_power, self.importance_power, self.layer_power, self.curve_power
        )

    @override
    def allocate(self, profile: Profile, limits: Limits) -> AllocationResult:
        weights = np.ones((len(profile.geometry.full_attention_layers), profile.geometry.kv_heads))
        if self.reconstruction_power:
            weights *= mean_counts(profile, "reconstruction", limits, self.floor) ** self.reconstruction_power
        if self.importance_power:
            weights *= np.maximum(head_importance(profile), 1e-6) ** self.importance_power
        if self.layer_power:
            weights *= layer_importance(profile) ** self.layer_power
        if self.curve_power:
            weights *= curve_counts(profile, self.measure, limits) ** self.curve_power
        lower, upper = limits.bounds(self.floor, self.cap)
        entries = distribute_proportionally(weights / weights.max(), float(limits.total_entries), lower, upper)
        result = AllocationResult.with_bits(entries, limits.bits)
        return result if self.bits == "fixed" else self._in_best_bits(result, profile, limits)

    def _in_best_bits(self, result: AllocationResult, profile: Profile, limits: Limits) -> AllocationResult:
        """Return the bits that lose least at each head's bytes, which are all raised until the budget is spent."""
        table = LossTable.from_profile(profile, self.measure, limits)
        head_bytes = bytes_per_head(result, limits).ravel()
        low, high = 1.0, max(1.0, table.costs.max() / head_bytes.min())
        for _ in range(20):
            middle = (low + high) / 2
            spent = bytes_per_head(_best_or_fallback(table, middle * head_bytes, result), limits).sum()
            low, high = (middle, high) if spent <= limits.budget_bytes else (low, middle)
        return scale_to_budget(_best_or_fallback(table, low * head_bytes, result), limits)


def _best_or_fallback(table: LossTable, head_bytes: HeadBytes, fallback: AllocationResult) -> AllocationResult:
    """Return the bits that lose least at these bytes, and the fallback for heads that no measured bits fit."""
    best, fits_none = table.best_bits(head_bytes)
    return AllocationResult(
        np.where(fits_none, fallback.entries, best.entries),
        np.where(fits_none, fallback.key_bits, best.key_bits),
        np.where(fits_none, fallback.value_bits, best.value_bits),
    )


def head_importance(profile: Profile, source: ImportanceSource = "value", reduction: str = "mean") -> HeadGrid:
    """Return the importance of each budgeted KV head, at least 0.

    Raises:
        UserError: the profile lacks this source.
    """
    if source not in profile.importance:
        raise UserError(
            f"the profile of {profile.model.id} has no source {source!r}; choose one of {', '.join(profile.importance)}"
        )
    geometry = profile.geometry
    importance = np.array([profile.importance[source][layer] for layer in geometry.full_attention_layers])
    grouped = importance.reshape(-1, geometry.kv_heads, geometry.query_group)
    return np.maximum(REDUCTIONS[reduction](grouped, axis=2), 0)


def layer_importance(profile: Profile) -> Float[np.ndarray, "layers 1"]:
    """Return the importance of each budgeted layer, above 0, since powers of it may be negative."""
    return np.maximum(np.array(profile.layer_importance)[list(profile.geometry.full_attention_layers)], 1e-6)[:, None]
