"""Load a model whose attention reads a budgeted cache."""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from jaxtyping import Int
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from baklava.cache import attention
from baklava.data.demo_assets import DEMO_SHA256, demo_model
from baklava.errors import UserError
from baklava.plan.geometry import CacheGeometry, ModelIdentity

DEMO = "demo"

DIGEST_SAMPLES_PER_WEIGHT = 1024
"""Values of every weight that its digest sees, evenly spread from the first one to the last."""

_UNLOADABLE = (OSError, ValueError, RuntimeError, SafetensorError, StrictDataclassError)
"""What loaders raise for a checkpoint that is missing, damaged, or does not fit its config."""

_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "Cannot allocate memory")
"""Parts of the messages of other errors that mean that memory ran out; PyTorch raises a RuntimeError on the CPU."""


@dataclass(frozen=True)
class LoadedModel:
    """A transformers model that attends through baklava, its tokenizer, and the shape of its cache."""

    model: Any
    tokenizer: Any
    identity: ModelIdentity
    geometry: CacheGeometry

    @property
    def device(self) -> torch.device:
        """The device of the inputs."""
        device: torch.device = self.model.device
        return device

    @property
    def max_length(self) -> int:
        """The largest number of tokens that the model supports, prompt and completion together."""
        return int(self.model.config.get_text_config(decoder=True).max_position_embeddings)

    @cached_property
    def weights_digest(self) -> str:
        """Hash of a sample of every weight, by which checkpoints of the same name differ.

        It depends on the dtype of the weights, but not on their devices. They are read with one transfer.
        """
        samples = []
        for weight in self.model.parameters():
            last, count = weight.numel() - 1, min(weight.numel(), DIGEST_SAMPLES_PER_WEIGHT)
            index = torch.linspace(0, last, count, dtype=torch.float64).long().to(weight.device)
            samples.append(weight.detach().flatten()[index].float().to(self.device))
        return hashlib.sha256(torch.cat(samples).cpu().numpy().tobytes()).hexdigest()[:16]

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """Tokens that end a text."""
        ends = self.model.generation_config.eos_token_id
        return frozenset([ends] if isinstance(ends, int) else ends or ())

    def count_tokens(self, text: str) -> int:
        """Return the number of tokens of a text, without special tokens."""
        return len(self.tokenizer.encode(text, add_special_tokens=False, verbose=False))

    def as_batch(self, ids: Sequence[int] | Int[Tensor, " tokens"]) -> Int[Tensor, "1 tokens"]:
        """Return token ids as one row on the model's device."""
        if isinstance(ids, Tensor):
            return ids.to(self.device)[None]
        return torch.tensor([list(ids)], dtype=torch.long, device=self.device)

    def check_length(
        self, tokens: int, what: str = "a window", remedy: str = "lower --context or --continuation"
    ) -> None:
        """Raise UserError if a window, or whatever `what` names, has more tokens than the model's positions."""
        if tokens > self.max_length:
            raise UserError(
                f"{what} of {tokens} tokens is longer than the {self.max_length} that {self.identity.id} takes; "
                f"{remedy}"
            )

    @classmethod
    def of(cls, model: Any, tokenizer: Any = None, id: str = "local", revision: str | None = None) -> "LoadedModel":
        """Wrap a transformers model and switch its attention to baklava's."""
        attention.register()
        model.set_attn_implementation(attention.ATTN_IMPLEMENTATION)
        # transformers only warns if the attention of a model cannot be chosen.
        if model.config._attn_implementation != attention.ATTN_IMPLEMENTATION:
            raise UserError(
                f"{model.config.model_type} does not attend through transformers' attention interface, so its cache "
                "cannot be budgeted; choose another model"
            )
        # A cache type baked into a checkpoint would make generate() refuse ours.
        model.generation_config.cache_implementation = None
        identity = ModelIdentity.from_config(model.config, id, revision)
        return cls(model.eval(), tokenizer, identity, CacheGeometry.from_config(model.config))


def load(
    name: str, *, device: str | None = None, threads: int | None = None, device_map_auto: bool = False
) -> LoadedModel:
    """Load a model from safetensors, without running code from the checkpoint.

    On the CPU it computes in float32, which is four times faster there than bfloat16; on other devices in the
    checkpoint's own dtype.

    Args:
        name: `demo`, a directory, or the id of a hub model.
        device: A device of PyTorch, such as `cpu`, `cuda:1` or `mps`; by default `cuda` if available, else `cpu`.
        threads: Threads of PyTorch, for the whole process.
        device_map_auto: Distribute the layers over all visible devices, for a model that is larger than one of them.

    Raises:
        UserError: nothing loadable has this name, the model does not fit into memory, its cache cannot be budgeted, or
            the device is not available, or is given together with `device_map_auto`.
    """
    if device and device_map_auto:
        raise UserError(f"device_map_auto chooses the devices itself; leave it out, or leave out device {device!r}")
    if threads:
        torch.set_num_threads(threads)
    target = _available_device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    path = str(demo_model()) if name == DEMO else name
    attention.register()
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        model = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=torch.float32 if target.type == "cpu" else "auto",
            device_map="auto" if device_map_auto else None,
            use_safetensors=True,
            trust_remote_code=False,
            attn_implementation=attention.ATTN_IMPLEMENTATION,
        )
        model = model if device_map_auto else model.to(target)
    except (*_UNLOADABLE, MemoryError) as error:
        raise _load_error(name, target, error) from None
    return LoadedModel.of(model, tokenizer, id=name, revision=_revision(name, model))


def load_config(name: str) -> tuple[ModelIdentity, CacheGeometry]:
    """Return the identity and the geometry of a model from its config, without loading weights."""
    path = str(demo_model()) if name == DEMO else name
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except _UNLOADABLE as error:
        raise _checkpoint_error(name, error) from None
    return ModelIdentity.from_config(config, name), CacheGeometry.from_config(config)


def _revision(name: str, model: Any) -> str | None:
    return DEMO_SHA256 if name == DEMO else getattr(model.config, "_commit_hash", None)


def _available_device(name: str) -> torch.device:
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # what PyTorch raises depends on the device
        raise UserError(
            f"device {name!r} cannot be used ({_first_line(error)}); give a device that PyTorch finds on this machine, "
            "such as cpu, cuda, cuda:1 or mps"
        ) from None


def _load_error(name: str, device: torch.device, error: Exception) -> UserError:
    """Return the error to raise: too little memory is no fault of the checkpoint."""
    out_of_memory = isinstance(error, MemoryError | torch.OutOfMemoryError)
    if out_of_memory or any(part in str(error) for part in _OUT_OF_MEMORY):
        return UserError(
            f"model {name!r} does not fit into the free memory of {device} ({_first_line(error)}); free some of it, or "
            "choose a smaller model or another device"
        )
    return _checkpoint_error(name, error)


def _checkpoint_error(name: str, error: Exception) -> UserError:
    if os.path.isdir(name):
        return UserError(
            f"cannot load a model from directory {name} ({_first_line(error)}); it needs config.json, safetensors and "
            "a tokenizer"
        )
    return UserError(
        f"cannot load model {name!r} ({_first_line(error)}); give `demo`, a directory with safetensors, or the id of a "
        "hub model that this machine can reach"
    )


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
