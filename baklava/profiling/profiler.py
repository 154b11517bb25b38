"""Measures a profile of a model on calibration windows."""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from baklava import console
from baklava.cache.score_predictor import MAX_FEATURES, PredictorFit, entry_features
from baklava.cache.storage.fake_quantize import is_packable
from baklava.data.windows import Window
from baklava.errors import UserError
from baklava.eviction import Eviction, HeavyHitter, KVzip
from baklava.paths import cache_dir, write_to_cache
from baklava.plan.geometry import CacheGeometry, supports_mixed_precision
from baklava.profiling.cosine_importance import CosineImportance
from baklava.profiling.loss_curves import (
    CurveGrid,
    LayerTrace,
    LossGrid,
    channel_sizes,
    curve_capacities,
    layer_losses,
    trace_layers,
)
from baklava.profiling.profile import LossCurves, LossMeasure, Profile, Ranking, RankingName
from baklava.profiling.source_digest import source_digest
from baklava.runtime.context_reconstruction import can_repeat, repeat_prompt
from baklava.runtime.model_loader import LoadedModel
from baklava.runtime.prefill import prefill_and_record

DEFAULT_EVICTION = HeavyHitter(centroids=4)
"""The eviction method under which curves and counts are measured."""

RANKING_METHODS: dict[RankingName, Eviction] = {"heavy_hitter": DEFAULT_EVICTION, "reconstruction": KVzip()}

MAX_RANKS = 40
"""Ranks stored per head, in equal steps of their logarithm: neighbours differ by a fifth in a context of 3,072."""

MIN_SCORE = 1e-12
"""Scores below this count as this; their logarithm would be too small to be meaningful."""

BIT_PAIRS = (
    *((16, 16), (8, 8), (8, 6), (8, 5), (8, 4), (6, 6), (6, 5), (6, 4), (6, 3), (5, 5), (5, 4), (5, 3), (5, 2)),
    *((4, 4), (4, 3), (4, 2), (3, 3), (3, 2), (2, 2)),
)
"""Bits of keys and values at which curves are measured: keys never in fewer bits than values, which lose less."""

REPETITION_TOKENS = 256
"""Tokens that are repeated for the curves of repetition."""


@dataclass(frozen=True)
class WindowMeasurements:
    """What one window says, per layer with full attention.

    Attributes:
        scores: `[kv heads, context]` per ranking.
        losses: `[kv heads, bits, entries]` per measure.
        channel_sizes: `[kv heads, head_dim]`.
    """

    scores: dict[RankingName, list[Tensor]]
    losses: dict[LossMeasure, list[Tensor]]
    channel_sizes: list[Tensor]


def windows_digest(windows: Sequence[Window]) -> str:
    """Return the hash of the windows' tokens: what a profile was measured on."""
    content = repr([(window.ids, window.context_length) for window in windows])
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def cached_profile(loaded: LoadedModel, windows: Sequence[Window]) -> Profile:
    """Return the profile of a model on these windows, from the cache folder if it was measured by the same code.

    A cache that cannot be read or written costs a warning and the time to measure again, not the profile.
    """
    content = loaded.identity.model_dump_json() + loaded.weights_digest + windows_digest(windows)
    content += source_digest(__name__)
    path = cache_dir() / "profiles" / f"{hashlib.sha256(content.encode()).hexdigest()[:16]}.json"
    if os.path.exists(path):  # False as well if the folder of another user must not be looked into
        try:
            profile = Profile.read(path)
        except UserError:
            console.log(f"warning: {path} cannot be read, so the model is profiled again")
        else:
            console.log(f"profile: read from {path}")
            return profile
    try:
        profile = measure_profile(loaded, windows)
    except KeyboardInterrupt:
        console.log("stopped while profiling: nothing of the profile is kept; the same command starts it again")
        raise
    write_to_cache(path, profile.write)
    return profile


@torch.inference_mode()
def measure_profile(loaded: LoadedModel, windows: Sequence[Window]) -> Profile:
    """Measure every head on these windows.

    Importance takes a forward per window. Rankings and curves, of the layers with full attention, take an observed
    prefill, a repeated one, and a backward pass through the continuation: about eight prefills together. If the model's
    positions do not suffice to repeat a context, measurements of the repetition are left out.

    Raises:
        UserError: a window is longer than the model's positions, or its context is all sinks.
    """
    loaded.check_length(max(len(window.ids) for window in windows))
    shortest = min(window.context_length for window in windows)
    if shortest <= DEFAULT_EVICTION.sinks:
        raise UserError(
            f"a context of {shortest} tokens is all sinks, of which there are {DEFAULT_EVICTION.sinks}, so there is "
            "nothing to rank after them; raise --context"
        )
    geometry = loaded.geometry
    tokens = min(len(window.ids) for window in windows)
    grid = CurveGrid(
        DEFAULT_EVICTION,
        curve_capacities(tokens, DEFAULT_EVICTION.sinks, DEFAULT_EVICTION.eviction_interval),
        tuple(pair for pair in BIT_PAIRS if min(pair) >= 16 or is_packable(geometry.head_dim, min(pair))),
    )
    repeatable = all(can_repeat(loaded, loaded.as_batch(window.ids[: window.context_length])) for window in windows)
    names: tuple[RankingName, ...] = get_args(RankingName) if repeatable else ("heavy_hitter",)
    importance = CosineImportance(loaded)
    measured: list[WindowMeasurements] = []
    has_few_features = geometry.kv_heads * (2 * geometry.head_dim + 1) <= MAX_FEATURES
    can_predict = repeatable and loaded.moves_queries and has_few_features
    fits = [PredictorFit() for _ in geometry.full_attention_layers] if can_predict else []
    with console.progress_bar(len(windows), "profiling", "window") as progress:
        for number, window in enumerate(windows):
            with importance.measuring():
                loaded.model(loaded.as_batch(window.ids), use_cache=False, logits_to_keep=1)
            measured.append(_measure_window(loaded, window, grid, names, number, fits))
            progress.update(1)
    return Profile(
        model=loaded.identity,
        geometry=geometry,
        moves_queries=loaded.moves_queries,
        windows=windows_digest(windows),
        importance={
            source: tuple(tuple((1 - layer).tolist()) for layer in layers)
            for source, layers in importance.head_similarity().items()
        },
        layer_importance=tuple((1 - importance.layer_similarity()).tolist()),
        rankings={
            name: build_ranking([window.scores[name] for window in measured], DEFAULT_EVICTION.sinks, geometry)
            for name in names
        },
        curves=_mean_curves(measured, grid, geometry),
        key_channels=_channel_orders(measured, geometry) if supports_mixed_precision(geometry.head_dim) else None,
        score_predictors=geometry.spread((fit.solve().encode() for fit in fits), None) if fits else None,
    )


def build_ranking(contexts: list[list[Float[Tensor, "heads entries"]]], sinks: int, geometry: CacheGeometry) -> Ranking:
    """Return the ranking of every head from the scores of each context, layer by layer; sinks are not ranked."""
    entries = min(layers[0].shape[1] for layers in contexts) - sinks
    ranks = tuple(sorted({round(float(rank)) for rank in np.geomspace(1, entries, MAX_RANKS)}))
    scores = tuple(
        geometry.spread((_log_scores_at_ranks(layer[:, sinks:], ranks) for layer in layers), ()) for layers in contexts
    )
    return Ranking(tokens=entries, ranks=ranks, scores=scores)


def _log_scores_at_ranks(
    scores: Float[Tensor, "heads entries"], ranks: tuple[int, ...]
) -> tuple[tuple[float, ...], ...]:
    descending = scores.sort(dim=1, descending=True).values
    log_scores = descending[:, torch.tensor(ranks, device=scores.device) - 1].clamp(min=MIN_SCORE).log()
    return tuple(tuple(round(score, 3) for score in head) for head in log_scores.tolist())


def _measure_window(
    loaded: LoadedModel,
    window: Window,
    grid: CurveGrid,
    names: Sequence[RankingName],
    number: int,
    fits: Sequence[PredictorFit],
) -> WindowMeasurements:
    context = loaded.as_batch(window.ids[: window.context_length])
    recording = prefill_and_record(loaded, context, [RANKING_METHODS[name] for name in names]).recording
    hits = [layer[DEFAULT_EVICTION.score_key][0] for layer in recording.scores]
    scores: dict[RankingName, list[Tensor]] = {"heavy_hitter": hits}
    if "reconstruction" in names:
        scores["reconstruction"] = [layer[0] for layer in recording.reconstruction]
        for index, fit in enumerate(fits):
            rotary = recording.rotary_shifts[index]
            assert rotary is not None
            features = entry_features(recording.keys[index], recording.values[index], rotary)[0]
            ranked = slice(DEFAULT_EVICTION.sinks, None)
            fit.add(features[ranked], scores["reconstruction"][index][:, ranked])

    def losses_by_layer(layers: Sequence[LayerTrace]) -> tuple[list[LossGrid], list[LossGrid]]:
        pairs = [layer_losses(*layer, grid) for layer in zip(layers, hits, strict=True)]
        return [kl for kl, _ in pairs], [error for _, error in pairs]

    # One pass at a time: each holds the keys, values and gradients of all layers.
    layers = trace_layers(loaded, recording, loaded.as_batch(window.ids[window.context_length :]), number)
    text, error = losses_by_layer(layers)
    sizes = [channel_sizes(layer, DEFAULT_EVICTION.sinks).cpu() for layer in layers]
    del layers
    losses: dict[LossMeasure, list[Tensor]] = {"text": text, "error": error}
    if "reconstruction" in names:
        start = (number * REPETITION_TOKENS) % max(1, window.context_length - REPETITION_TOKENS)
        prompt = repeat_prompt(loaded, context, start)
        repetition = torch.cat([prompt, context[:, start : start + REPETITION_TOKENS]], 1)
        losses["repetition"], _ = losses_by_layer(trace_layers(loaded, recording, repetition, number))
    return WindowMeasurements(scores, losses, sizes)


def _mean_curves(measured: Sequence[WindowMeasurements], grid: CurveGrid, geometry: CacheGeometry) -> LossCurves:
    """Return the mean over the windows, to four digits: more would be noise."""
    losses = {}
    for measure in get_args(LossMeasure):
        if measure in measured[0].losses:
            by_layer = zip(*(window.losses[measure] for window in measured), strict=True)
            means = [torch.stack(layers).mean(0).tolist() for layers in by_layer]
            rounded = (
                tuple(tuple(tuple(float(f"{loss:.4g}") for loss in row) for row in head) for head in layer)
                for layer in means
            )
            losses[measure] = geometry.spread(rounded, ())
    return LossCurves(eviction=DEFAULT_EVICTION.config, entries=grid.entries, bits=grid.bits, losses=losses)


def _channel_orders(
    measured: Sequence[WindowMeasurements], geometry: CacheGeometry
) -> tuple[tuple[str, ...] | None, ...]:
    """Return the channels of every head by their size, the geometric mean over windows, in a plan's notation."""
    sizes = torch.stack([torch.stack(window.channel_sizes) for window in measured])
    orders = sizes.clamp(min=1e-12).log().mean(0).argsort(stable=True, dim=-1, descending=True)
    return geometry.spread((tuple(bytes(head).hex() for head in layer) for layer in orders.tolist()), None)
