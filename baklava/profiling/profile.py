"""The profile: what the calibration windows say of every KV head, as frozen plain numbers."""

import hashlib
import math
from collections.abc import Mapping
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any, Literal, Self, get_args

from pydantic import Field
from typing_extensions import override

from baklava.errors import UserError
from baklava.plan.budget_plan import Bits, EvictionConfig
from baklava.plan.geometry import CacheGeometry, ModelIdentity
from baklava.serialization import FrozenModel, atomic_write_text

ImportanceSource = Literal["value", "key", "query", "hidden"]
"""Input of a head that its output is compared with."""

RankingName = Literal["heavy_hitter", "reconstruction"]
"""What entries are ranked by: their scores under `HeavyHitter()`, and the attention of a repetition of the context."""

LossMeasure = Literal["text", "repetition", "error"]

QueryHeadGrid = tuple[tuple[float, ...], ...]
"""A number per layer and query head; none for a layer that does not attend."""


class Ranking(FrozenModel):
    """How a score orders the entries of a context, per head: enough to count the entries above any threshold.

    Attributes:
        tokens: entries of a context, without the sinks.
        ranks: ascending from 1.
        scores: `scores[window][layer][kv head][i]` is the natural logarithm of the score of the entry at `ranks[i]`,
            best first. Rows of sliding layers are empty.
    """

    tokens: int
    ranks: tuple[int, ...]
    scores: tuple[tuple[tuple[tuple[float, ...], ...], ...], ...]


class LossCurves(FrozenModel):
    """What each head loses if it alone keeps fewer entries in fewer bits.

    Attributes:
        eviction: eviction under which the losses were measured.
        entries: capacities, ascending to the whole window.
        bits: pairs of (key bits, value bits).
        losses: `losses[measure][layer][kv head][i][j]` is the loss at `bits[i]` and `entries[j]`; lower is better.
            "text": expected KL to the full cache in nats per continuation token, to second order. "repetition": the
            same while the model repeats the context. "error": relative error of the head's output, as the root of its
            mean square over the queries, averaged over windows. Rows of sliding layers are empty.
    """

    eviction: EvictionConfig
    entries: tuple[int, ...]
    bits: tuple[tuple[int, int], ...]
    losses: dict[LossMeasure, tuple[tuple[tuple[tuple[float, ...], ...], ...], ...]]


class Profile(FrozenModel):
    """What the calibration windows say of every head.

    Rankings and curves are of the layers with full attention; what needs a repetition of the context exists if the
    model's positions suffice for it.

    Attributes:
        moves_queries: whether the model's queries can be moved, as some eviction methods need it.
        windows: digest of the calibration windows.
        importance: `importance[source][layer][query head]` is 1 − the mean cosine similarity between the head's input
            and its output, from 0 (the head passes its input on) to 2; higher is more important. The input of a head
            is its own token's value, key or query, or its slice of the hidden state. "hidden" is missing if the heads
            do not divide the hidden state.
        layer_importance: per layer, 1 − the mean cosine similarity of the hidden state before and after attention
            (SqueezeAttention, arXiv 2404.04793).
        key_channels: order of the channels of every KV head's keys, as in a plan, by their contribution to the logits:
            the deviation of the keys from their mean times the size of the queries.
        score_predictors: predictors of the attention that a repetition pays an entry, as in a plan.
    """

    schema_version: Literal[6] = 6
    model: ModelIdentity
    geometry: CacheGeometry
    moves_queries: bool = True
    windows: str
    importance: dict[ImportanceSource, QueryHeadGrid]
    layer_importance: tuple[float, ...]
    rankings: dict[RankingName, Ranking] = Field(default_factory=dict)
    curves: LossCurves | None = None
    key_channels: tuple[tuple[str, ...] | None, ...] | None = None
    score_predictors: tuple[tuple[str, ...] | None, ...] | None = None

    @cached_property
    def digest(self) -> str:
        """Hash of the whole profile, computed once, since a search uses it in every plan."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()[:16]

    @override
    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        copied = super().model_copy(update=update, deep=deep)
        copied.__dict__.pop("digest", None)  # the cached one is of this profile
        return copied

    def write(self, path: Path) -> None:
        """Write the profile as JSON, atomically."""
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_text(path, self.model_dump_json() + "\n")

    @classmethod
    def read(cls, path: Path) -> "Profile":
        """Read a profile; raises UserError if the file is not one."""
        try:
            return cls.model_validate_json(path.read_text())
        except (OSError, ValueError) as error:
            raise UserError(
                f"cannot read profile {path} ({type(error).__name__}); remove it and profile again"
            ) from None


def uniform_profile(model: ModelIdentity, geometry: CacheGeometry) -> Profile:
    """Return a profile in which all heads are equal, to check budgets and for methods that need no profile."""
    heads = ((1.0,) * geometry.query_heads,) * geometry.layers
    return Profile(
        model=model,
        geometry=geometry,
        windows="none",
        importance=dict.fromkeys(get_args(ImportanceSource), heads),
        layer_importance=(1.0,) * geometry.layers,
        rankings=dict.fromkeys(get_args(RankingName), _uniform_ranking(geometry)),
        curves=_uniform_curves(geometry),
    )


def _uniform_ranking(geometry: CacheGeometry) -> Ranking:
    ranks = (1, 16, 256, 4096)
    head = tuple(-math.log(rank) for rank in ranks)
    layers = geometry.spread([(head,) * geometry.kv_heads] * len(geometry.full_attention_layers), ())
    return Ranking(tokens=ranks[-1], ranks=ranks, scores=(layers,))


def _uniform_curves(geometry: CacheGeometry) -> LossCurves:
    """Return curves of every pair of bits that lose more in fewer bits and with fewer entries."""
    entries, bits = (1, 16, 256, 4096), tuple(product(get_args(Bits), repeat=2))
    head = tuple(tuple(2.0**-keys + 2.0**-values + 1 / count for count in entries) for keys, values in bits)
    layers = geometry.spread([(head,) * geometry.kv_heads] * len(geometry.full_attention_layers), ())
    losses = dict.fromkeys(get_args(LossMeasure), layers)
    return LossCurves(eviction=EvictionConfig(method="streaming_llm"), entries=entries, bits=bits, losses=losses)
