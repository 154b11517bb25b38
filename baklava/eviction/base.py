"""The eviction plug-in: a dataclass with one verb, the score of an entry, and the queries that it observes."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, fields
from typing import ClassVar

from jaxtyping import Float, Int
from torch import Tensor

from baklava.errors import UserError
from baklava.plan.budget_plan import EvictionConfig, ParamValue

SHARED_PARAMS = (
    "sinks",
    "recent_ratio",
    "eviction_interval",
    "pooling",
    "residual_length",
    "centroids",
    "fit_references",
    "fit_ridge",
)
"""Parameters that every method has."""


@dataclass(frozen=True)
class QuerySample:
    """Which queries a method observes. In decoding every query is observed, unless `window` is 0.

    Attributes:
        window: only the last `window` queries of a prompt; None for all. 0 observes no queries: entries are scored by
            their keys and values alone, at each eviction.
        stride: only every `stride`-th query of the prompt.
        single_block: observe all queries in one block. For methods that need no attention probabilities of a prompt.
        uses_repetition: observe the queries of a repetition of the prompt instead of the prompt's own.
        references: once all queries of a prompt have been observed by the method's rule of decoding, observe this many
            of them again as reference queries; see `baklava.cache.head_groups.references`.
    """

    window: int | None = None
    stride: int = 1
    single_block: bool = False
    uses_repetition: bool = False
    references: int = 0


@dataclass(frozen=True)
class Observation:
    """One block of queries over the entries of a group of KV heads.

    Attributes:
        query: observed queries, after RoPE.
        key: keys as cached, after RoPE.
        value: values as cached.
        query_positions: positions of the queries, counted over a row's real tokens; negative for padding.
        key_positions: positions of the entries, counted likewise.
        previous_scores: scores before this block; zero for new entries.
        scaling: factor of the attention logits.
        compute_attention: returns the attention probabilities; see `attention`.
        stride: distance between two observed queries.
        decoding: whether the queries were decoded rather than part of a prompt.
        output: output of reference queries, in the channels of the values; None for other queries.
    """

    query: Float[Tensor, "batch heads group queries head_dim"]
    key: Float[Tensor, "batch heads entries head_dim"]
    value: Float[Tensor, "batch heads entries head_dim"]
    query_positions: Int[Tensor, "#batch queries"]
    key_positions: Int[Tensor, "#batch #heads entries"]
    previous_scores: Float[Tensor, "batch heads entries"]
    scaling: float
    compute_attention: Callable[[], Tensor]
    stride: int = 1
    decoding: bool = False
    output: Float[Tensor, "batch heads group queries head_dim"] | None = None
    _computed: dict[str, Tensor] = field(default_factory=dict, repr=False)

    @property
    def attention(self) -> Float[Tensor, "batch heads group queries entries"]:
        """Attention probabilities, zero for padding queries; computed on first use."""
        if "attention" not in self._computed:
            self._computed["attention"] = self.compute_attention()
        return self._computed["attention"]

    def reduce_group(self, reduction: str) -> Float[Tensor, "batch heads queries entries"]:
        """Return the attention reduced over the query group by "mean" or "max"; computed once per block."""
        if reduction not in self._computed:
            self._computed[reduction] = self.attention.amax(2) if reduction == "max" else self.attention.mean(2)
        return self._computed[reduction]

    @property
    def first_query_position(self) -> Int[Tensor, "#batch 1 1"]:
        """Position of the block's first query."""
        return self.query_positions[:, :1, None]

    @property
    def last_query_position(self) -> Int[Tensor, "#batch 1 1"]:
        """Position of the block's last query."""
        return self.query_positions[:, -1:, None]


@dataclass(frozen=True)
class Eviction(ABC):
    """Decides which entries of a KV head stay when it exceeds its budget.

    The first `sinks` tokens and the newest entries stay. All others compete by their `score`; higher scores stay. The
    shared parameters are described in `EvictionConfig`.
    """

    name: ClassVar[str]
    scored: ClassVar[bool] = True

    sinks: int = 4
    recent_ratio: float = 0.5
    eviction_interval: int = 32
    pooling: int = 1
    residual_length: int = 0
    centroids: int = 0
    fit_references: int = 0
    fit_ridge: float = 10.0

    def __post_init__(self) -> None:
        is_odd = self.pooling > 0 and self.pooling % 2 == 1
        counts = self.sinks, self.centroids, self.residual_length
        in_range = min(counts) >= 0 and self.eviction_interval >= 1 and 0 <= self.recent_ratio <= 1
        if not (in_range and is_odd):
            raise UserError(
                f"{self.name} with sinks {self.sinks}, recent_ratio {self.recent_ratio}, eviction_interval "
                f"{self.eviction_interval}, pooling {self.pooling}, centroids {self.centroids}, residual_length "
                f"{self.residual_length}: sinks, centroids and residual_length must be at least 0, recent_ratio "
                "between 0 and 1, eviction_interval at least 1, pooling odd"
            )
        if self.fit_references < 0 or not 0 < self.fit_ridge < float("inf"):
            raise UserError(
                f"{self.name} with fit_references {self.fit_references}, fit_ridge {self.fit_ridge}: fit_references "
                "must be at least 0, which is no fit, and fit_ridge a positive number"
            )

    @abstractmethod
    def score(self, observation: Observation) -> Float[Tensor, "batch heads entries"]:
        """Return the scores of all entries after one more block of queries; higher scores stay."""

    @property
    @abstractmethod
    def query_sample(self) -> QuerySample:
        """Which queries the method observes."""

    @property
    def params(self) -> dict[str, ParamValue]:
        """The method's own parameters, without those that every method has."""
        return {param.name: getattr(self, param.name) for param in fields(self) if param.name not in SHARED_PARAMS}

    @property
    def score_key(self) -> Hashable:
        """Key of the scores: methods with equal keys give equal scores. None for methods that are not scored."""
        return (self.name, *self.params.items()) if self.scored else None

    @property
    def config(self) -> EvictionConfig:
        """The config that a plan holds of this method."""
        shared = {name: getattr(self, name) for name in SHARED_PARAMS}
        return EvictionConfig(method=self.name, scored=self.scored, params=self.params, **shared)

    @property
    def decoding(self) -> "Eviction":
        """The method whose rule scores decoded tokens; kernels may know it."""
        return self

    @property
    def num_references(self) -> int:
        """Reference queries of a prompt that are needed, to score or to fit."""
        return self.query_sample.references or self.fit_references

    @property
    def reference_key(self) -> tuple[int, int]:
        """Key of the references that values are fitted to: methods with equal keys fit to the same ones."""
        return self.num_references, self.fit_references

    @property
    def attention_power(self) -> float:
        """Power such that scores are the mean attention to this power; 0 if they are something else."""
        return 0.0

    @property
    def predicted_share(self) -> float:
        """Weight of predicted ranks in the order of a prompt, whose predictors the plan has; 0 if none are needed."""
        return 0.0

    def recent_window(self, capacity: int) -> int:
        """Return how many of the newest entries a head of this capacity never evicts."""
        return int(self.recent_ratio * (capacity - self.sinks - self.eviction_interval))

    def require(self, condition: bool, rule: str) -> None:
        """Raise UserError unless the condition on this method's parameters holds."""
        if not condition:
            params = ", ".join(f"{name} {value!r}" for name, value in self.params.items())
            raise UserError(f"{self.name} with {params}: {rule}")
