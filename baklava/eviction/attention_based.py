"""Eviction by attention: the entries that queries attend to stay.

- `HeavyHitter`: the most attention from all queries so far (H2O).
- `TOVA`: from the newest query.
- `SnapKV`: from the last queries of the prompt.
- `ExpectedAttention`: from the queries that are expected to follow.
- `KVzip`: from the queries with which the model repeats the prompt.
- `AttentionMatching`: those that change the output of the prompt's own queries most, moved to the place after it.
- `KVzap`: the same, and those that a repetition is predicted to look at.
"""

from collections.abc import Hashable
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from baklava.eviction.base import SHARED_PARAMS, Eviction, Observation, QuerySample

TIE_STEP = 1e-30
"""Between the scores of two entries that would be equal."""


@dataclass(frozen=True)
class HeavyHitter(Eviction):
    """Keep the entries with the highest mean attention from the queries that saw them (H2O, arXiv 2306.14048).

    The mean is a running one, so decoding continues from the prompt. The defaults were the best in our measurements
    (docs/lab-notes.md). H2O itself is reduction "mean", power 1, distance 0.

    Attributes:
        reduction: how the query group of a KV head is reduced.
        power: 1 ranks by the mean attention, 2 by the mean square.
        distance: only queries at least this many tokens after an entry count, since near tokens always attend to each
            other.
        stride: of a prompt, only every `stride`-th query is observed.

    Cost: the attention probabilities of every `stride`-th query of a prompt; in decoding, a pass over the scores per
    token.
    """

    name: ClassVar[str] = "heavy_hitter"

    reduction: Literal["mean", "max"] = "max"
    power: Literal[1, 2] = 2
    distance: int = 32
    stride: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(
            self.reduction in ("mean", "max") and self.power in (1, 2) and self.distance >= 0 and self.stride >= 1,
            "reduction must be mean or max, power 1 or 2, distance at least 0, stride at least 1",
        )

    @override
    @property
    def query_sample(self) -> QuerySample:
        return QuerySample(stride=self.stride)

    @override
    @property
    def attention_power(self) -> float:
        return self.power

    @override
    def score(self, observation: Observation) -> Float[Tensor, "batch heads entries"]:
        attention = observation.reduce_group(self.reduction).float()  # the square of 1/5000 is 0 in float16
        if self.power == 2:
            attention = attention.square()
        if self.distance:
            distances = observation.query_positions[:, None, :, None] - observation.key_positions[:, :, None, :]
            attention = torch.where(distances >= self.distance, attention, 0)
        positions = observation.first_query_position, observation.last_query_position, observation.key_positions
        return self.running_mean(observation.previous_scores, attention.sum(2), *positions, observation.stride)

    def running_mean(
        self, before: Tensor, sums: Tensor, first: Tensor, last: Tensor, key_positions: Tensor, stride: int = 1
    ) -> Float[Tensor, "batch heads entries"]:
        """Return the scores of entries after some queries; those for which none has counted keep their scores.

        Args:
            before: Their scores before these queries.
            sums: The attention from these queries, reduced over the group, to the power, without those that are near.
            first: Position of the first of the queries.
            last: Position of the last of the queries.
            key_positions: Positions of the entries.
            stride: Distance between two of the queries.
        """
        num_before = self._num_queries(first - stride, key_positions, stride)
        num_after = self._num_queries(last, key_positions, stride)
        mean = (before * num_before + sums) / num_after.clamp(min=1)
        return torch.where(num_after > 0, mean, before)

    def _num_queries(self, last: Tensor, key_positions: Tensor, stride: int) -> Tensor:
        """Return how many of the queries up to position `last` count for each entry."""
        since = last - key_positions - self.distance
        if stride > 1:
            since = since.div(stride, rounding_mode="floor")
        return (since + 1).clamp(min=0)


@dataclass(frozen=True)
class TOVA(Eviction):
    """Keep the entries that the newest query attends to most (TOVA, arXiv 2401.06104).

    `reduction` reduces the query group. The paper averages over all heads of a layer; here each KV head decides for
    itself. In decoding, the newest token's attention replaces the scores.

    Cost: the attention probabilities of one query per prompt.
    """

    name: ClassVar[str] = "tova"

    reduction: Literal["mean", "max"] = "mean"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.reduction in ("mean", "max"), "reduction must be mean or max")

    @override
    @property
    def query_sample(self) -> QuerySample:
        return QuerySample(window=1)

    @override
    def score(self, observation: Observation) -> Float[Tensor, "batch heads entries"]:
        return observation.reduce_group(self.reduction)[:, :, -1]


@dataclass(frozen=True)
class SnapKV(Eviction):
    """Keep the entries that an observation window of the newest queries attends to most (SnapKV, arXiv 2404.14469).

    The weight of a query falls exponentially over about `window` tokens. Decoding continues the average token by token
    without storing queries; the paper's window has a hard edge. `reduction` reduces the query group; `pooling` keeps
    the neighbours of attended entries.

    Cost: the attention probabilities of the last 4 x `window` queries of a prompt.
    """

    name: ClassVar[str] = "snapkv"

    pooling: int = 5
    window: int = 16
    reduction: Literal["mean", "max"] = "mean"

    def __post_init__(self) -> None:
        super().__post_init__()
        is_valid = self.window >= 1 and self.reduction in ("mean", "max")
        self.require(is_valid, "window must be at least 1, reduction mean or max")

    @override
    @property
    def query_sample(self) -> QuerySample:
        return QuerySample(window=4 * self.window)

    @override
    def score(self, observation: Observation) -> Float[Tensor, "batch heads entries"]:
        attention = observation.reduce_group(self.reduction)
        return exponential_moving_average(observation.previous_scores, attention, self.window)


def exponential_moving_average(
    previous: Float[Tensor, "batch heads entries"], values: Float[Tensor, "batch heads queries entries"], window: int
) -> Float[Tensor, "batch heads entries"]:
    """Return the average over queries, weighted by (1 - 1/window)^age and continued from `previous`."""
    decay, queries = 1 - 1 / window, values.shape[2]
    ages = torch.arange(queries - 1, -1, -1, device=values.device, dtype=torch.float32)
    weights = torch.full_like(ages, decay).pow(ages) / window
    return previous * decay**queries + (values.float() * weights[:, None]).sum(2)


@dataclass(frozen=True)
class ExpectedAttention(Eviction):
    """Keep the entries with the largest product of expected attention and value norm (arXiv 2510.00636).

    Future queries are modelled as normal, with the mean and covariance of the prompt's last `window` queries. The paper
    rotates that mean to the future positions. Here queries keep their positions, so that no model's RoPE needs to be
    known; softcaps and sink logits are ignored. In decoding, the attention received replaces the expected one, averaged
    over about `window` tokens.

    Cost: two products of the keys with a head_dim² matrix per prompt; no attention probabilities of a prompt.
    """

    name: ClassVar[str] = "expected_attention"

    window: int = 256

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.window >= 2, "window must be at least 2")

    @override
    @property
    def query_sample(self) -> QuerySample:
        return QuerySample(window=self.window, single_block=True)

    @override
    def score(self, observation: Observation) -> Float[Tensor, "batch heads entries"]:
        value_norm = observation.value.float().norm(dim=-1)
        if observation.decoding:
            received = observation.reduce_group("mean") * value_norm[:, :, None]
            return exponential_moving_average(observation.previous_scores, received, self.window)
        # mean over the query group of softmax(E[logit] + Var[logit] / 2)
        mean, covariance = _query_moments(observation)
        key = observation.key.float()[:, :, None]
        logits = (key @ mean[..., None])[..., 0] * observation.scaling
        logits += ((key @ covariance) * key).sum(-1) * (observation.scaling**2 / 2)
        is_padding = (observation.key_positions < 0)[:, :, None]
        expected = logits.masked_fill(is_padding, -torch.inf).softmax(-1).nan_to_num().mean(2)
        return expected * value_norm


def _query_moments(observation: Observation) -> tuple[Tensor, Tensor]:
    """Return the mean [.., head_dim] and covariance [.., head_dim, head_dim] of each query head's real queries."""
    is_real = (observation.query_positions >= 0)[:, None, None, :, None]
    query = observation.query.float() * is_real
    count = is_real.sum(3).clamp(min=1)
    mean = query.sum(3) / count
    centred = (query - mean[..., None, :]) * is_real
    return mean, centred.transpose(3, 4) @ centred / count[..., None]


@dataclass(frozen=True)
class KVzip(Eviction):
    """Keep the entries with the largest attention from any query while the model repeats the prompt (2505.23416).

    Entries of a prompt are ranked by the maximum over the repeating queries and the query group. Decoding and later
    turns continue as with heavy hitters: the prompt's scores are those of heavy hitters, assigned in the order of these
    ranks. (If decoding took the maximum of the attention received, every new token would score high.)

    Cost: about one more prefill, over the full cache, which stays in memory until it is compressed; see
    `baklava.runtime.prefill`.
    """

    name: ClassVar[str] = "kvzip"

    @override
    @cached_property
    def decoding(self) -> HeavyHitter:
        return HeavyHitter(**{name: getattr(self, name) for name in SHARED_PARAMS})

    @override
    @property
    def attention_power(self) -> float:
        return self.decoding.power

    @override
    @property
    def query_sample(self) -> QuerySample:
        return QuerySample(uses_repetition=True)

    @override
    def score(self, observation: Observation) -> Float[Tensor, "batch heads entries"]:
        return torch.maximum(observation.previous_scores, observation.reduce_group("max").amax(2))

    @staticmethod
    def reorder(
        hits: Float[Tensor, "batch heads entries"], reconstruction: Float[Tensor, "batch heads entries"]
    ) -> Float[Tensor, "batch heads entries"]:
        """Return the scores as heavy hitters, assigned in the order of the attention during the repetition."""
        # Entries that no query has counted for score 0; a little more keeps them in order.
        ascending = hits.sort(2).values + TIE_STEP * torch.arange(hits.shape[2], device=hits.device)
        return torch.empty_like(hits).scatter(2, reconstruction.argsort(dim=2, stable=True), ascending)


@dataclass(frozen=True)
class AttentionMatching(Eviction):
    """Keep the entries without which the outputs of reference queries would change most (after arXiv 2602.16284).

    Attention matching compacts a cache so that reference queries get the outputs that the full cache gives them. Its
    references cost more passes over the prompt. Here they are the prompt's own queries, moved by RoPE to the place
    after the prompt, where the next ones will stand (`baklava.cache.head_groups.references`).

    Without an entry that has the share a of its attention, a query whose output is o loses a² |v - o|² of squared
    error. That is the match of an entry, the largest of the query group, averaged over the references and rescaled to
    the sum of a². The score of an entry is the geometric mean of its match and of its score as a heavy hitter: what
    counts must matter both to the queries where they stand and after the prompt. Matches alone are better on most
    texts and much worse on some (docs/lab-notes.md). Decoding continues as with heavy hitters.

    Attributes:
        references: number of queries of a prompt, or of a chunk of it, that are moved. They are spread evenly.
        reduction: how the query group of a KV head is reduced for heavy hitters.
        distance: for heavy hitters, only queries at least this many tokens after an entry count.

    Cost: that of `HeavyHitter`, and the attention of `references` queries to the whole prompt. In PyTorch their
    probabilities are materialised, for one KV head at a time.
    """

    name: ClassVar[str] = "attention_matching"

    references: int = 256
    reduction: Literal["mean", "max"] = "max"
    distance: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.references >= 1, "references must be at least 1")
        _ = self.decoding  # checks the others

    @override
    @cached_property
    def decoding(self) -> HeavyHitter:
        shared = {name: getattr(self, name) for name in SHARED_PARAMS}
        return HeavyHitter(**shared, reduction=self.reduction, distance=self.distance)

    @override
    @property
    def query_sample(self) -> QuerySample:
        return QuerySample(references=self.references)

    @override
    @property
    def attention_power(self) -> float:
        return self.decoding.power

    @override
    def score(self, observation: Observation) -> Float[Tensor, "batch heads entries"]:
        if observation.output is None:
            return self.decoding.score(observation)
        squares = observation.attention.float().square()
        value, output = observation.value.float()[:, :, None], observation.output.float()
        distances = value.square().sum(-1)[..., None, :] + output.square().sum(-1)[..., None]
        distances = (distances - 2 * output @ value.transpose(3, 4)).clamp(min=0)
        errors, mass = (squares * distances).amax(2).sum(2), squares.amax(2).sum((2, 3))
        return self.blend(observation.previous_scores, errors, mass, output.shape[3])

    @staticmethod
    def blend(
        hits: Float[Tensor, "batch heads entries"],
        errors: Float[Tensor, "batch heads entries"],
        mass: Float[Tensor, "batch heads"],
        num_references: int,
    ) -> Float[Tensor, "batch heads entries"]:
        """Return the scores of entries after a prompt or a chunk of it.

        Args:
            hits: Scores as heavy hitters.
            errors: Squared errors that entries would leave, summed over the references.
            mass: Sum of squared attention over references and entries.
            num_references: Number of the references.
        """
        total = errors.sum(2, keepdim=True)
        scale = torch.where(total > 0, mass[..., None] / total, 0)  # of equal values, none is missed
        return (hits * errors * (scale / num_references)).sqrt()


@dataclass(frozen=True)
class KVzap(AttentionMatching):
    """Order a prompt by attention matching, and by the attention that its repetition is predicted to pay it.

    A repetition asks for everything once (`KVzip`), so its order keeps facts that no query of the prompt has asked for.
    KVzap (arXiv 2601.07891) predicts it, here by a regression on what a layer stores, which the profile fits and the
    plan carries (`baklava.cache.score_predictor`). Tokens of a prompt, or of a chunk of it, keep the scores of
    attention matching, dealt in the order of the weighted ranks.

    Attributes:
        share: weight of the predicted rank; the rest is that of the rank by attention matching.

    Cost: that of `AttentionMatching`, and one product per entry.
    """

    name: ClassVar[str] = "kvzap"

    share: float = 0.25

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(0 < self.share <= 1, "share must be above 0 and at most 1")

    @override
    @property
    def score_key(self) -> Hashable:
        """That of attention matching: predictions need no recording."""
        own = {name: value for name, value in self.params.items() if name != "share"}
        return (AttentionMatching.name, *own.items())

    @override
    @property
    def predicted_share(self) -> float:
        return self.share
