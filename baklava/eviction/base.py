"""The eviction plug-in: a dataclass with one verb, the score of an entry."""

from abc import ABC, abstractmethod
from collections.abc import Hashable
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import ClassVar

from jaxtyping import Float, Int
from torch import Tensor

from baklava.errors import UserError
from baklava.plan import EvictionChoice

_SHARED = ("sinks", "recent", "interval")


@dataclass(frozen=True)
class Observation:
    """What one block of queries shows of the entries of a group of KV heads.

    `attention` are the probabilities that the queries give to the entries (zero where a query is padding), `previous`
    the scores before this block (zero for new entries). Positions count a row's real tokens from 0; they are negative
    for padding.
    """

    attention: Float[Tensor, "batch heads group queries entries"]
    query_positions: Int[Tensor, "#batch queries"]
    key_positions: Int[Tensor, "#batch #heads entries"]
    previous: Float[Tensor, "batch heads entries"]
    _reduced: dict[str, Tensor] = field(default_factory=dict, repr=False)

    def over_group(self, reduction: str) -> Float[Tensor, "batch heads queries entries"]:
        """Attention reduced over the query group by "mean" or "max"; computed once per block."""
        if reduction not in self._reduced:
            self._reduced[reduction] = self.attention.amax(2) if reduction == "max" else self.attention.mean(2)
        return self._reduced[reduction]

    @cached_property
    def first_query(self) -> Int[Tensor, "#batch 1 1"]:
        """Position of the block's first query."""
        return self.query_positions[:, :1, None]

    @cached_property
    def last_query(self) -> Int[Tensor, "#batch 1 1"]:
        """Position of the block's last query."""
        return self.query_positions[:, -1:, None]


@dataclass(frozen=True)
class Eviction(ABC):
    """Decides which entries of a KV head stay when it is over budget.

    The `sinks` first tokens and the newest entries stay; all others compete by `score`, higher keeps more.
    """

    name: ClassVar[str]
    scored: ClassVar[bool] = True

    sinks: int = 4
    recent: float = 0.5
    interval: int = 32

    def __post_init__(self) -> None:
        if self.sinks < 0 or self.interval < 1 or not 0 <= self.recent <= 1:
            raise UserError(
                f"{self.name} with sinks {self.sinks}, recent {self.recent}, interval {self.interval}: sinks must be "
                "at least 0, recent between 0 and 1, interval at least 1"
            )

    @abstractmethod
    def score(self, seen: Observation) -> Float[Tensor, "batch heads entries"]:
        """Scores of all entries after one more block of queries; higher keeps more."""

    @property
    def knobs(self) -> dict[str, bool | int | float | str]:
        """The method's own knobs, without those that every method has."""
        return {knob.name: getattr(self, knob.name) for knob in fields(self) if knob.name not in _SHARED}

    @property
    def observation(self) -> Hashable:
        """Two methods with the same observation give the same scores; None where nothing is observed."""
        return (self.name, *self.knobs.items()) if self.scored else None

    @property
    def choice(self) -> EvictionChoice:
        """The record of this method in a plan."""
        return EvictionChoice(
            method=self.name,
            sinks=self.sinks,
            recent=self.recent,
            interval=self.interval,
            scored=self.scored,
            knobs=self.knobs,
        )

    def newest(self, capacity: int) -> int:
        """Number of newest entries that are never evicted from a head of this capacity."""
        return int(self.recent * (capacity - self.sinks - self.interval))
