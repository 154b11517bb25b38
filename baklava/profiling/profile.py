"""The profile: what calibration windows say of every KV head, as frozen plain numbers."""

import hashlib
import math
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Literal, get_args

from pydantic import Field

from baklava.errors import UserError
from baklava.plan.budget_plan import Bits, EvictionChoice
from baklava.plan.geometry import CacheGeometry, ModelIdentity
from baklava.serialization import FrozenModel, atomic_write_text

Source = Literal["value", "key", "query", "hidden"]
Grid = tuple[tuple[float, ...], ...]
Ranker = Literal["heavy_hitter", "reconstruction"]
"""Scores that entries are ranked by: those of `HeavyHitter()` and of `Reconstruction()`, with their defaults."""

Measure = Literal["text", "repetition", "error"]


class Ranking(FrozenModel):
    """How a score orders the entries of a context, head by head: enough to count the entries above any threshold.

    `scores[window][layer][kv head][i]` is the natural logarithm of the score of the `ranks[i]`-th best entry of a
    context of `tokens` entries, the sinks left out; ranks ascend from 1. Rows of sliding layers are empty.
    """

    tokens: int
    ranks: tuple[int, ...]
    scores: tuple[tuple[tuple[tuple[float, ...], ...], ...], ...]


class Curves(FrozenModel):
    """What each head loses when it alone keeps fewer entries in fewer bits, under the eviction method named here.

    `losses[measure][layer][kv head][i][j]` is for `bits[i]` (of keys, of values) and a capacity of `entries[j]`, which
    ascend to the whole window. "text" is the expected KL to the full cache in nats per continuation token, to second
    order; "repetition" the same while the model repeats the context; "error" the relative error of the head's output:
    the root of its mean square over the queries, averaged over windows. Lower is better. Rows of sliding layers are
    empty.
    """

    eviction: EvictionChoice
    entries: tuple[int, ...]
    bits: tuple[tuple[int, int], ...]
    losses: dict[Measure, tuple[tuple[tuple[tuple[float, ...], ...], ...], ...]]


class Profile(FrozenModel):
    """What the calibration windows say of every head; frozen plain numbers.

    `importance[source][layer][query head]` is 1 − the mean cosine similarity between the head's input and its output,
    from 0 (the head passes its input on) to 2; higher matters more. The input of a head is its own token's value, key
    or query, or its slice of the hidden state; "hidden" is missing where heads do not tile the hidden state.
    `layer_importance[layer]` is 1 − the mean cosine of the hidden state before and after the layer's attention
    (SqueezeAttention, arXiv 2404.04793).
    `key_channels` orders the channels of every KV head's keys as a plan does, by what they add to the logits: the size
    of the keys around their mean times that of the queries.
    `rankings` and `curves` are there where all layers have full attention; what comes of repeating the context only
    where the model's positions leave room for that.
    """

    schema_version: Literal[3] = 3
    model: ModelIdentity
    geometry: CacheGeometry
    windows: str
    importance: dict[Source, Grid]
    layer_importance: tuple[float, ...]
    rankings: dict[Ranker, Ranking] = Field(default_factory=dict)
    curves: Curves | None = None
    key_channels: tuple[tuple[str, ...] | None, ...] | None = None

    @cached_property
    def digest(self) -> str:
        """Hash of the whole profile, made once: a search asks for it with every plan."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()[:16]

    def write(self, path: Path) -> None:
        """Write the profile as JSON, whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_text(path, self.model_dump_json() + "\n")

    @classmethod
    def read(cls, path: Path) -> "Profile":
        """Read a profile; raises UserError when the file is not one."""
        try:
            return cls.model_validate_json(path.read_text())
        except (OSError, ValueError) as error:
            raise UserError(
                f"cannot read profile {path} ({type(error).__name__}); remove it and profile again"
            ) from None


def flat_profile(model: ModelIdentity, geometry: CacheGeometry) -> Profile:
    """A profile in which all heads matter alike, for methods that do not ask and to see whether a budget can be met."""
    heads = ((1.0,) * geometry.query_heads,) * geometry.layers
    full = len(geometry.budgetable) == geometry.layers
    return Profile(
        model=model,
        geometry=geometry,
        windows="none",
        importance=dict.fromkeys(get_args(Source), heads),
        layer_importance=(1.0,) * geometry.layers,
        rankings=dict.fromkeys(get_args(Ranker), _flat_ranking(geometry)) if full else {},
        curves=_flat_curves(geometry) if full else None,
    )


def _flat_ranking(geometry: CacheGeometry) -> Ranking:
    ranks = (1, 16, 256, 4096)
    head = tuple(-math.log(rank) for rank in ranks)
    return Ranking(tokens=ranks[-1], ranks=ranks, scores=(((head,) * geometry.kv_heads,) * geometry.layers,))


def _flat_curves(geometry: CacheGeometry) -> Curves:
    """Curves of every pair of bits, that lose more in fewer bits and with fewer entries."""
    entries, bits = (1, 16, 256, 4096), tuple(product(get_args(Bits), repeat=2))
    head = tuple(tuple(2.0**-keys + 2.0**-values + 1 / count for count in entries) for keys, values in bits)
    losses = ((head,) * geometry.kv_heads,) * geometry.layers
    choice = EvictionChoice(method="streaming")
    return Curves(eviction=choice, entries=entries, bits=bits, losses=dict.fromkeys(get_args(Measure), losses))
