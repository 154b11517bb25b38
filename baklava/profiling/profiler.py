"""How scores order the entries of a context, kept as a few points per head so that counts for any budget follow."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from baklava import console as progress
from baklava.cache.storage.fake_quantize import is_packable
from baklava.data.windows import Window
from baklava.errors import UserError
from baklava.eviction import Eviction, HeavyHitter, Reconstruction
from baklava.paths import cache_dir
from baklava.plan.byte_accounting import supports_mixed_precision
from baklava.plan.geometry import CacheGeometry
from baklava.profiling import loss_curves as curves
from baklava.profiling.cosine_importance import Meter
from baklava.profiling.loss_curves import Lattice, channel_sizes
from baklava.profiling.output_gradients import LayerPass, passed
from baklava.profiling.profile import Curves, Grid, Measure, Profile, Ranker, Ranking
from baklava.runtime.context_reconstruction import can_repeat, repeat_prompt
from baklava.runtime.model_loader import LoadedModel
from baklava.runtime.prefill import prefill_and_record

POINTS = 40
"""Ranks kept of every head, in equal steps of their logarithm: neighbours are a fifth apart in a context of 3,072."""

LEAST = 1e-12
"""Scores below are nothing at all."""

Curve = tuple[float, ...]


def ranks_of(entries: int) -> tuple[int, ...]:
    """Ranks from 1 to `entries`, most of them small."""
    return tuple(sorted({round(float(rank)) for rank in np.geomspace(1, entries, POINTS)}))


def points(scores: Float[Tensor, "heads entries"], sinks: int, ranks: tuple[int, ...]) -> tuple[Curve, ...]:
    """Logarithms of the scores at these ranks, for each head of a layer; the sinks, which always stay, left out."""
    ordered = scores[:, sinks:].sort(dim=1, descending=True).values
    index = torch.tensor(ranks, device=scores.device) - 1
    kept = ordered[:, index].clamp(min=LEAST).log()
    return tuple(tuple(round(value, 3) for value in head) for head in kept.tolist())


def ranking(contexts: list[list[Float[Tensor, "heads entries"]]], sinks: int) -> Ranking:
    """The ranking of every head, from the scores of one context after another, layer by layer."""
    entries = min(layers[0].shape[1] for layers in contexts) - sinks
    ranks = ranks_of(entries)
    scores = tuple(tuple(points(layer, sinks, ranks) for layer in layers) for layers in contexts)
    return Ranking(tokens=entries, ranks=ranks, scores=scores)


KEEPS = HeavyHitter(centroids=4)
"""The eviction method that curves and counts are measured under."""

RANKERS: dict[Ranker, Eviction] = {"heavy_hitter": KEEPS, "reconstruction": Reconstruction()}

BITS = (
    *((16, 16), (8, 8), (8, 6), (8, 5), (8, 4), (6, 6), (6, 5), (6, 4), (6, 3), (5, 5), (5, 4), (5, 3), (5, 2)),
    *((4, 4), (4, 3), (4, 2), (3, 3), (3, 2), (2, 2)),
)
"""Pairs that heads may be stored in: keys never in fewer bits than values, which lose less."""

REPEATED = 256
"""Tokens that are repeated for the curves of repetition."""

VERSION = "3"
"""Part of a cached profile's name: another one where the same windows would now give other numbers."""


@dataclass(frozen=True)
class Measured:
    """What one window says, per layer.

    Scores are `[kv heads, context]`, losses `[kv heads, bits, entries]`, sizes of key channels `[kv heads, head_dim]`.
    """

    scores: dict[Ranker, list[Tensor]]
    losses: dict[Measure, list[Tensor]]
    channels: list[Tensor]


def windows_digest(windows: Sequence[Window]) -> str:
    """Hash of the windows' tokens: what a profile was measured on."""
    return hashlib.sha256(repr([(window.ids, window.context_length) for window in windows]).encode()).hexdigest()[:16]


@torch.inference_mode()
def profile(loaded: LoadedModel, windows: Sequence[Window]) -> Profile:
    """Measure every head on these windows.

    Importance takes a forward per window. Where all layers have full attention, rankings and curves take a prefill that
    is observed, one that is repeated, and a backward pass through the continuation: about eight prefills together.
    Where the model's positions leave no room to repeat a context, what comes of repeating it is left out.

    Raises:
        UserError: a window is longer than the model's positions, or its context is all sinks.
    """
    loaded.check_length(max(len(window.ids) for window in windows))
    _check_contexts(windows)
    meter, full = Meter(loaded), len(loaded.geometry.budgetable) == loaded.geometry.layers
    lattice, rankers = _lattice(loaded.geometry, windows), _rankers(loaded, windows) if full else {}
    measured: list[Measured] = []
    with progress.progress_bar(len(windows), "profiling", "window") as bar:
        for number, window in enumerate(windows):
            with meter.attached():
                loaded.model(_ids(loaded, window.ids), use_cache=False, logits_to_keep=1)
            if full:
                measured.append(_measure(loaded, window, lattice, rankers, number))
            bar.update(1)
    return Profile(
        model=loaded.identity,
        geometry=loaded.geometry,
        windows=windows_digest(windows),
        importance={source: _grid(1 - similarity) for source, similarity in meter.heads().items()},
        layer_importance=tuple((1 - meter.layers()).tolist()),
        rankings={name: ranking([each.scores[name] for each in measured], KEEPS.sinks) for name in rankers},
        curves=_curves(measured, lattice) if full else None,
        key_channels=_ordered(measured) if full and supports_mixed_precision(loaded.geometry.head_dim) else None,
    )


def cached_profile(loaded: LoadedModel, windows: Sequence[Window]) -> Profile:
    """The profile of a model on these windows, measured once and then read from the cache folder."""
    content = loaded.identity.model_dump_json() + loaded.weights_digest + windows_digest(windows) + VERSION
    path = cache_dir() / "profiles" / f"{hashlib.sha256(content.encode()).hexdigest()[:16]}.json"
    if path.exists():
        progress.log(f"profile: read from {path}")
        return Profile.read(path)
    measured = profile(loaded, windows)
    measured.write(path)
    return measured


def _check_contexts(windows: Sequence[Window]) -> None:
    shortest = min(window.context_length for window in windows)
    if shortest <= KEEPS.sinks:
        raise UserError(
            f"a context of {shortest} tokens is all sinks, of which there are {KEEPS.sinks}, so there is nothing to "
            "rank behind them; raise --context"
        )


def _rankers(loaded: LoadedModel, windows: Sequence[Window]) -> dict[Ranker, Eviction]:
    """What entries are ranked by; by reconstruction only where there is room to repeat every context."""
    room = all(can_repeat(loaded, _ids(loaded, window.ids[: window.context_length])) for window in windows)
    return RANKERS if room else {"heavy_hitter": KEEPS}


def _lattice(geometry: CacheGeometry, windows: Sequence[Window]) -> Lattice:
    tokens = min(len(window.ids) for window in windows)
    bits = tuple(pair for pair in BITS if min(pair) >= 16 or is_packable(geometry.head_dim, min(pair)))
    return Lattice(KEEPS, curves.capacities(tokens, KEEPS.sinks, KEEPS.interval), bits)


def _measure(
    loaded: LoadedModel, window: Window, lattice: Lattice, rankers: dict[Ranker, Eviction], number: int
) -> Measured:
    context = _ids(loaded, window.ids[: window.context_length])
    recorded = prefill_and_record(loaded, context, tuple(rankers.values()))
    scores: dict[Ranker, list[Tensor]] = {
        name: [layer[method.observation][0] for layer in recorded.recording.scores] for name, method in rankers.items()
    }
    kept_by = scores["heavy_hitter"]
    # One pass at a time: each holds the keys, values and gradients of all layers.
    layers = passed(loaded, recorded.recording, _ids(loaded, window.ids[window.context_length :]), number)
    text, error = _losses(layers, kept_by, lattice)
    channels = [channel_sizes(layer, KEEPS.sinks).cpu() for layer in layers]
    del layers
    losses: dict[Measure, list[Tensor]] = {"text": text, "error": error}
    if "reconstruction" in rankers:
        start = (number * REPEATED) % max(1, window.context_length - REPEATED)
        repeated = torch.cat([repeat_prompt(loaded, context, start), context[:, start : start + REPEATED]], 1)
        losses["repetition"], _ = _losses(passed(loaded, recorded.recording, repeated, number), kept_by, lattice)
    return Measured(scores, losses, channels)


def _losses(
    layers: Sequence[LayerPass], scores: Sequence[Float[Tensor, "heads context"]], lattice: Lattice
) -> tuple[list[Tensor], list[Tensor]]:
    found = [curves.losses(layer, observed, lattice) for layer, observed in zip(layers, scores, strict=True)]
    return [kl for kl, _ in found], [error for _, error in found]


def _curves(measured: Sequence[Measured], lattice: Lattice) -> Curves:
    losses = {
        measure: tuple(
            _rows(curves.mean([each.losses[measure][layer] for each in measured]))
            for layer in range(len(measured[0].losses[measure]))
        )
        for measure in get_args(Measure)
        if measure in measured[0].losses
    }
    return Curves(eviction=KEEPS.choice, entries=lattice.entries, bits=lattice.bits, losses=losses)


def _ordered(measured: Sequence[Measured]) -> tuple[tuple[str, ...], ...]:
    """Channels of every head by their size, the geometric mean over windows, as a plan names them."""
    sizes = torch.stack([torch.stack(each.channels) for each in measured])
    orders = sizes.clamp(min=1e-12).log().mean(0).argsort(stable=True, dim=-1, descending=True)
    return tuple(tuple(bytes(head).hex() for head in layer) for layer in orders.tolist())


def _rows(grid: curves.Grid) -> tuple[tuple[tuple[float, ...], ...], ...]:
    """Four digits are more than any of them is worth."""
    return tuple(tuple(tuple(float(f"{loss:.4g}") for loss in row) for row in head) for head in grid.tolist())


def _ids(loaded: LoadedModel, ids: Sequence[int]) -> Int[Tensor, "1 tokens"]:
    return torch.tensor([ids], device=loaded.device)


def _grid(values: Float[Tensor, "layers heads"]) -> Grid:
    return tuple(tuple(row) for row in values.tolist())
