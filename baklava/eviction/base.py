"""The eviction plug-in: a dataclass with one verb, the score of an entry, and a record of what it wants to see."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, fields
from typing import ClassVar

from jaxtyping import Float, Int
from torch import Tensor

from baklava.errors import UserError
from baklava.plan.budget_plan import EvictionChoice

SHARED = ("sinks", "recent", "interval", "pooling", "staged", "centroids")
"""Knobs that every method has."""


@dataclass(frozen=True)
class Sample:
    """Which queries of a prompt a method observes: of its last `window` (None for all) every `stride`-th.

    In decoding every query is observed. A window of 0 asks for keys and values alone: such entries are scored when
    something has to go, and not before. `whole` asks for all of them in one block, of methods that need no
    probabilities of a prompt; `repeated` for the queries of a repetition of the prompt instead of its own.
    """

    window: int | None = None
    stride: int = 1
    whole: bool = False
    repeated: bool = False


@dataclass(frozen=True)
class Observation:
    """What one block of queries shows of the entries of a group of KV heads.

    `previous` are the scores before this block (zero for new entries). Positions count a row's real tokens from 0; they
    are negative for padding. `stride` is the distance between the observed queries, `decoding` tells whether they came
    a few at a time rather than as a prompt. Keys are as cached, after RoPE.
    """

    query: Float[Tensor, "batch heads group queries head_dim"]
    key: Float[Tensor, "batch heads entries head_dim"]
    value: Float[Tensor, "batch heads entries head_dim"]
    query_positions: Int[Tensor, "#batch queries"]
    key_positions: Int[Tensor, "#batch #heads entries"]
    previous: Float[Tensor, "batch heads entries"]
    scaling: float
    attend: Callable[[], Tensor]
    stride: int = 1
    decoding: bool = False
    _made: dict[str, Tensor] = field(default_factory=dict, repr=False)

    @property
    def attention(self) -> Float[Tensor, "batch heads group queries entries"]:
        """Probabilities that the queries give to the entries, zero where a query is padding; made on first use."""
        if "attention" not in self._made:
            self._made["attention"] = self.attend()
        return self._made["attention"]

    def over_group(self, reduction: str) -> Float[Tensor, "batch heads queries entries"]:
        """Attention reduced over the query group by "mean" or "max"; computed once per block."""
        if reduction not in self._made:
            self._made[reduction] = self.attention.amax(2) if reduction == "max" else self.attention.mean(2)
        return self._made[reduction]

    @property
    def first_query(self) -> Int[Tensor, "#batch 1 1"]:
        """Position of the block's first query."""
        return self.query_positions[:, :1, None]

    @property
    def last_query(self) -> Int[Tensor, "#batch 1 1"]:
        """Position of the block's last query."""
        return self.query_positions[:, -1:, None]


@dataclass(frozen=True)
class Eviction(ABC):
    """Decides which entries of a KV head stay when it is over budget.

    The `sinks` first tokens and the newest entries stay; all others compete by `score`, higher keeps more, averaged
    over the `pooling` entries around them (1 is none). `staged` and `centroids` are as in a plan's EvictionChoice.
    """

    name: ClassVar[str]
    scored: ClassVar[bool] = True

    sinks: int = 4
    recent: float = 0.5
    interval: int = 32
    pooling: int = 1
    staged: bool = False
    centroids: int = 0

    def __post_init__(self) -> None:
        odd = self.pooling > 0 and self.pooling % 2 == 1
        if min(self.sinks, self.centroids) < 0 or self.interval < 1 or not 0 <= self.recent <= 1 or not odd:
            raise UserError(
                f"{self.name} with sinks {self.sinks}, recent {self.recent}, interval {self.interval}, pooling "
                f"{self.pooling}, centroids {self.centroids}: sinks and centroids must be at least 0, recent between 0 "
                "and 1, interval at least 1, pooling odd"
            )

    @abstractmethod
    def score(self, seen: Observation) -> Float[Tensor, "batch heads entries"]:
        """Scores of all entries after one more block of queries; higher keeps more."""

    @property
    @abstractmethod
    def sample(self) -> Sample:
        """Which queries of a prompt it observes."""

    @property
    def knobs(self) -> dict[str, bool | int | float | str]:
        """The method's own knobs, without those that every method has."""
        return {knob.name: getattr(self, knob.name) for knob in fields(self) if knob.name not in SHARED}

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
            pooling=self.pooling,
            staged=self.staged,
            centroids=self.centroids,
            scored=self.scored,
            knobs=self.knobs,
        )

    @property
    def attention_power(self) -> float:
        """Scores are mean attention to this power; 0 where they are something else."""
        return 0.0

    def newest(self, capacity: int) -> int:
        """Number of newest entries that are never evicted from a head of this capacity."""
        return int(self.recent * (capacity - self.sinks - self.interval))

    def check(self, holds: bool, rule: str) -> None:
        """Raise UserError unless the rule about this method's knobs holds."""
        if not holds:
            knobs = ", ".join(f"{name} {value!r}" for name, value in self.knobs.items())
            raise UserError(f"{self.name} with {knobs}: {rule}")
