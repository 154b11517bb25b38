"""Loading a model so that it can live inside a plan."""

import hashlib
import os
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from baklava.cache import attention
from baklava.data.demo_assets import DEMO_SHA256, demo_model
from baklava.errors import UserError
from baklava.plan.geometry import CacheGeometry, ModelIdentity

DEMO = "demo"

_UNLOADABLE = (OSError, ValueError, RuntimeError, SafetensorError, StrictDataclassError)
"""What loaders raise for a checkpoint that is missing, damaged, or does not fit its config."""


@dataclass(frozen=True)
class LoadedModel:
    """A transformers model that attends through baklava, its tokenizer, and what shapes its cache."""

    model: Any
    tokenizer: Any
    identity: ModelIdentity
    geometry: CacheGeometry

    @property
    def device(self) -> torch.device:
        """Where the inputs go."""
        device: torch.device = self.model.device
        return device

    @property
    def max_length(self) -> int:
        """Most tokens that the model was made for, prompt and completion together."""
        return int(self.model.config.get_text_config(decoder=True).max_position_embeddings)

    @cached_property
    def weights_digest(self) -> str:
        """Hash of the first values of every weight: other weights under the same name have another one."""
        found = hashlib.sha256()
        for parameter in self.model.parameters():
            found.update(parameter.detach().flatten()[:16].float().cpu().numpy().tobytes())
        return found.hexdigest()[:16]

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """Tokens that end a text."""
        ends = self.model.generation_config.eos_token_id
        return frozenset([ends] if isinstance(ends, int) else ends or ())

    def count_tokens(self, text: str) -> int:
        """Tokens of a text, without those that a tokenizer puts around it."""
        return len(self.tokenizer.encode(text, add_special_tokens=False, verbose=False))

    def check_length(
        self, tokens: int, what: str = "a window", remedy: str = "lower --context or --continuation"
    ) -> None:
        """Raise UserError when a window, or what it is, is longer than the model's positions."""
        if tokens > self.max_length:
            raise UserError(
                f"{what} of {tokens} tokens is longer than the {self.max_length} that {self.identity.id} takes; "
                f"{remedy}"
            )

    @classmethod
    def of(cls, model: Any, tokenizer: Any = None, id: str = "local", revision: str | None = None) -> "LoadedModel":
        """Wrap a transformers model that exists already; switches its attention to baklava's."""
        attention.register()
        model.set_attn_implementation(attention.ATTN_IMPLEMENTATION)
        # transformers only warns where a model does not let its attention be chosen.
        if model.config._attn_implementation != attention.ATTN_IMPLEMENTATION:
            raise UserError(
                f"{model.config.model_type} does not attend through transformers' attention interface, so its cache "
                "cannot be budgeted; choose another model"
            )
        # A cache type baked into a checkpoint would make generate() refuse ours.
        model.generation_config.cache_implementation = None
        identity = ModelIdentity.of(model.config, id, revision)
        return cls(model.eval(), tokenizer, identity, CacheGeometry.of(model.config))


def load(name: str, *, device: str | None = None, threads: int | None = None, device_map_auto: bool = False) -> LoadedModel:
    """Load `demo`, a directory, or a hub id; safetensors only, and never code from the checkpoint.

    The CPU computes in float32, four times faster there than bfloat16; other devices in the checkpoint's own dtype.
    `threads` sets torch's threads for the whole process. `device_map_auto` lays the layers over all visible devices, for a model
    that is larger than one of them.

    Raises:
        UserError: nothing loadable under this name, or a model that cannot be budgeted.
    """
    if threads:
        torch.set_num_threads(threads)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    path = str(demo_model()) if name == DEMO else name
    dtype = torch.float32 if device == "cpu" else "auto"
    attention.register()
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        model = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=dtype,
            device_map="auto" if device_map_auto else None,
            use_safetensors=True,
            trust_remote_code=False,
            attn_implementation=attention.ATTN_IMPLEMENTATION,
        )
    except _UNLOADABLE as error:
        raise UserError(_unloadable(name, error)) from None
    return LoadedModel.of(model if device_map_auto else model.to(device), tokenizer, id=name, revision=_revision(name, model))


def load_config(name: str) -> tuple[ModelIdentity, CacheGeometry]:
    """Identity and geometry from the config alone, without loading weights."""
    path = str(demo_model()) if name == DEMO else name
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except _UNLOADABLE as error:
        raise UserError(_unloadable(name, error)) from None
    return ModelIdentity.of(config, name), CacheGeometry.of(config)


def _revision(name: str, model: Any) -> str | None:
    return DEMO_SHA256 if name == DEMO else getattr(model.config, "_commit_hash", None)


def _unloadable(name: str, error: Exception) -> str:
    reason = str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error).__name__
    if os.path.isdir(name):
        return (
            f"cannot load a model from directory {name} ({reason}); it needs config.json, safetensors and a tokenizer"
        )
    return (
        f"cannot load model {name!r} ({reason}); give `demo`, a directory with safetensors, or the id of a hub model "
        "that this machine can reach"
    )
