"""The profile: how much each KV head matters, measured once on calibration windows (BaKlaVa, arXiv 2502.13176)."""

import hashlib
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from pydantic import Field, ValidationError
from torch import Tensor
from torch.nn.functional import cosine_similarity

from baklava import attention, progress
from baklava.errors import UserError
from baklava.files import write_whole
from baklava.geometry import CacheGeometry, ModelIdentity
from baklava.model import LoadedModel
from baklava.paths import cache_dir
from baklava.plan import Bits, EvictionChoice
from baklava.records import Record
from baklava.windows import Window

Source = Literal["value", "key", "query", "hidden"]
Grid = tuple[tuple[float, ...], ...]
Ranker = Literal["heavy_hitter", "reconstruction"]
Measure = Literal["text", "repetition", "error"]


class Ranking(Record):
    """How a score orders the entries of a context, head by head: enough to count the entries above any threshold.

    `scores[window][layer][kv head][i]` is the natural logarithm of the score of the `ranks[i]`-th best entry of a
    context of `tokens` entries, the sinks left out; ranks ascend from 1. Rows of sliding layers are empty.
    """

    tokens: int
    ranks: tuple[int, ...]
    scores: tuple[tuple[tuple[tuple[float, ...], ...], ...], ...]


class Curves(Record):
    """What each head loses when it alone keeps fewer entries in fewer bits, under the eviction method named here.

    `losses[measure][layer][kv head][i][j]` is for `bits[i]` (of keys, of values) and a capacity of `entries[j]`, which
    ascend to the whole window. "text" is the expected KL to the full cache in nats per continuation token, to second
    order; "repetition" the same while the model repeats the context; "error" the mean relative error of the head's
    output per token. Lower is better. Rows of sliding layers are empty.
    """

    eviction: EvictionChoice
    entries: tuple[int, ...]
    bits: tuple[tuple[int, int], ...]
    losses: dict[Measure, tuple[tuple[tuple[tuple[float, ...], ...], ...], ...]]


class Profile(Record):
    """What the calibration windows say of every head; frozen plain numbers.

    `importance[source][layer][query head]` is 1 − the mean cosine similarity between the head's input and its output,
    from 0 (the head passes its input on) to 2; higher matters more. The input of a head is its own token's value, key
    or query, or its slice of the hidden state; "hidden" is missing where heads do not tile the hidden state.
    `layer_importance[layer]` is 1 − the mean cosine of the hidden state before and after the layer's attention
    (SqueezeAttention, arXiv 2404.04793).
    `rankings` and `curves` are there where all layers have full attention.
    """

    schema_version: Literal[2] = 2
    model: ModelIdentity
    geometry: CacheGeometry
    windows: str
    importance: dict[Source, Grid]
    layer_importance: tuple[float, ...]
    rankings: dict[Ranker, Ranking] = Field(default_factory=dict)
    curves: Curves | None = None

    @cached_property
    def digest(self) -> str:
        """Hash of the whole profile, made once: a search asks for it with every plan."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()[:16]

    def write(self, path: Path) -> None:
        """Write the profile as JSON, whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, self.model_dump_json() + "\n")

    @classmethod
    def read(cls, path: Path) -> "Profile":
        """Read a profile; raises UserError when the file is not one."""
        try:
            return cls.model_validate_json(path.read_text())
        except (OSError, ValidationError) as error:
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


def windows_digest(windows: Sequence[Window]) -> str:
    """Hash of the windows' tokens: what a profile was measured on."""
    return hashlib.sha256(repr([(window.ids, window.context) for window in windows]).encode()).hexdigest()[:16]


@torch.inference_mode()
def profile(loaded: LoadedModel, windows: Sequence[Window]) -> Profile:
    """Measure every head in one forward per window."""
    loaded.check_length(max(len(window.ids) for window in windows))
    meter = _Meter(loaded)
    with progress.bar(len(windows), "profiling", "window") as bar, meter.attached():
        for window in windows:
            ids = torch.tensor([window.ids], device=loaded.device)
            loaded.model(ids, use_cache=False, logits_to_keep=1)
            bar.update(1)
    return Profile(
        model=loaded.identity,
        geometry=loaded.geometry,
        windows=windows_digest(windows),
        importance={source: _grid(1 - similarity) for source, similarity in meter.heads().items()},
        layer_importance=tuple((1 - meter.layers()).tolist()),
    )


def cached_profile(loaded: LoadedModel, windows: Sequence[Window]) -> Profile:
    """The profile of a model on these windows, measured once and then read from the cache folder."""
    key = hashlib.sha256((loaded.identity.model_dump_json() + windows_digest(windows)).encode()).hexdigest()[:16]
    path = cache_dir() / "profiles" / f"{key}.json"
    if path.exists():
        progress.say(f"profile: read from {path}")
        return Profile.read(path)
    measured = profile(loaded, windows)
    measured.write(path)
    return measured


class _Meter:
    """Collects cosine similarities while a model runs; what it hooks it lets go of again."""

    def __init__(self, loaded: LoadedModel) -> None:
        self.loaded = loaded
        self.by_head: dict[Source, list[list[Tensor]]] = {
            source: [[] for _ in range(loaded.geometry.layers)] for source in get_args(Source)
        }
        self.by_layer: list[list[Tensor]] = [[] for _ in range(loaded.geometry.layers)]
        self.hidden: dict[int, Tensor] = {}

    @contextmanager
    def attached(self) -> Iterator[None]:
        hooks = [hook for index, layer in enumerate(_decoder_layers(self.loaded)) for hook in self._hook(index, layer)]
        try:
            with attention.watching(self._watch):
                yield
        finally:
            for hook in hooks:
                hook.remove()

    def heads(self) -> dict[Source, Float[Tensor, "layers query_heads"]]:
        """Mean similarity per source, layer and query head."""
        measured = {source: grid for source, grid in self.by_head.items() if grid[0]}
        return {source: torch.stack([_mean(layer) for layer in grid]) for source, grid in measured.items()}

    def layers(self) -> Float[Tensor, " layers"]:
        """Mean similarity of the hidden state before and after attention, per layer."""
        return torch.stack([_mean(layer) for layer in self.by_layer])

    def _hook(self, index: int, layer: Any) -> list[Any]:
        before: dict[str, Tensor] = {}

        def enter(module: Any, args: Any, kwargs: Any) -> None:
            before["residual"] = args[0] if args else kwargs["hidden_states"]

        def attend(module: Any, args: Any, kwargs: Any) -> None:
            self.hidden[index] = args[0] if args else kwargs["hidden_states"]

        def leave(module: Any, args: Any) -> None:
            self.by_layer[index].append(cosine_similarity(before["residual"], args[0], dim=-1).flatten().double())

        return [
            layer.register_forward_pre_hook(enter, with_kwargs=True),
            layer.self_attn.register_forward_pre_hook(attend, with_kwargs=True),
            _norm_after_attention(layer).register_forward_pre_hook(leave),
        ]

    def _watch(self, module: Any, query: Tensor, key: Tensor, value: Tensor, output: Tensor) -> None:
        heads, group = output.shape[2], output.shape[2] // key.shape[1]
        inputs: dict[Source, Tensor] = {
            "value": value.repeat_interleave(group, 1),
            "key": key.repeat_interleave(group, 1),
            "query": query,
        }
        hidden = self.hidden[module.layer_idx]
        if hidden.shape[-1] == heads * output.shape[3]:
            inputs["hidden"] = hidden.view(*hidden.shape[:2], heads, -1).transpose(1, 2)
        for source, entering in inputs.items():
            similarity = cosine_similarity(entering, output.transpose(1, 2), dim=-1)
            self.by_head[source][module.layer_idx].append(similarity.transpose(0, 1).flatten(1).double())


def _decoder_layers(loaded: LoadedModel) -> list[Any]:
    layers = [module for module in loaded.model.modules() if hasattr(module, "self_attn")]
    if len(layers) != loaded.geometry.layers or not all(hasattr(layer.self_attn, "layer_idx") for layer in layers):
        raise UserError(
            f"{loaded.identity.id} has {len(layers)} layers with self_attn, not {loaded.geometry.layers}, so it "
            "cannot be profiled; choose a Llama-type decoder"
        )
    return layers


def _norm_after_attention(layer: Any) -> Any:
    """The first module that reads the residual stream after attention."""
    for name in ("pre_feedforward_layernorm", "post_attention_layernorm"):
        if hasattr(layer, name):
            return getattr(layer, name)
    raise UserError(f"{type(layer).__name__} has no norm after attention, so layer importance cannot be measured")


def _mean(parts: list[Tensor]) -> Tensor:
    """Mean over tokens and windows."""
    return torch.cat([part.reshape(-1, part.shape[-1]) for part in parts], -1).mean(-1).squeeze(0)


def _grid(values: Float[Tensor, "layers heads"]) -> Grid:
    return tuple(tuple(row) for row in values.tolist())
