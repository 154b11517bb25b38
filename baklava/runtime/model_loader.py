"""Load a model whose attention reads a budgeted cache, with the same RoPE in texts of every length."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from types import MethodType
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn import Module
from transformers import DynamicCache, GenerationMixin

from baklava.cache import attention
from baklava.data.demo_assets import DEMO_SHA256, demo_model
from baklava.errors import UserError
from baklava.eviction import build_eviction
from baklava.plan.budget_plan import BudgetPlan
from baklava.plan.geometry import CacheGeometry, ModelIdentity
from baklava.runtime.checkpoint import Checkpoint, first_line
from baklava.runtime.precision import HalfPrecisionLinear, round_linear_layers, weights_dtype
from baklava.runtime.rotary_probe import probe_rotary_shifts

DEMO = "demo"

DIGEST_SAMPLES_PER_WEIGHT = 1024
"""Values of every weight that its digest sees, evenly spread from the first one to the last."""


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
    def dtype(self) -> str:
        """The precision of the products in linear layers, such as `bfloat16`."""
        linear = next((each for each in self.model.modules() if isinstance(each, HalfPrecisionLinear)), None)
        return str(self.model.dtype if linear is None else linear.weight.dtype).removeprefix("torch.")

    @property
    def max_length(self) -> int:
        """The largest number of tokens that the model supports, prompt and completion together."""
        return max_length(self.model.config.get_text_config(decoder=True))

    @cached_property
    def weights_digest(self) -> str:
        """Hash of a sample of every weight and of `dtype`, by which checkpoints of the same name and precisions differ.

        It does not depend on the devices of the weights. They are read with one transfer.
        """
        samples = []
        for weight in self.model.parameters():
            last, count = weight.numel() - 1, min(weight.numel(), DIGEST_SAMPLES_PER_WEIGHT)
            index = torch.linspace(0, last, count, dtype=torch.float64).long().to(weight.device)
            samples.append(weight.detach().flatten()[index].float().to(self.device))
        sample = torch.cat(samples).cpu().numpy().tobytes()
        return hashlib.sha256(sample + self.dtype.encode()).hexdigest()[:16]

    @property
    def num_embeddings(self) -> int:
        """Tokens that the model has an embedding for; its tokenizer may have more."""
        return int(self.model.get_input_embeddings().num_embeddings)

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """Tokens that end a text: those of the generation config and that of the tokenizer, which often differ."""
        ends = self.model.generation_config.eos_token_id
        ids = {ends} if isinstance(ends, int) else set(ends or ())
        if self.tokenizer is not None and self.tokenizer.eos_token_id is not None:
            ids.add(self.tokenizer.eos_token_id)
        return frozenset(each for each in ids if each < self.num_embeddings)

    def count_tokens(self, text: str) -> int:
        """Return the number of tokens of a text, without special tokens."""
        return len(self.tokenizer.encode(text, add_special_tokens=False, verbose=False))

    def as_batch(self, ids: Sequence[int] | Int[Tensor, " tokens"]) -> Int[Tensor, "1 tokens"]:
        """Return token ids as one row on the model's device; raises UserError if a list has one without embedding."""
        if isinstance(ids, Tensor):
            return ids.to(self.device)[None]
        self.check_tokens(ids)
        return torch.tensor([list(ids)], dtype=torch.long, device=self.device)

    def check_tokens(self, ids: Sequence[int]) -> None:
        """Raise UserError if the model has no embedding for one of these tokens."""
        outside = max(ids, default=0)
        if outside >= self.num_embeddings:
            token = self.tokenizer.convert_ids_to_tokens(outside) if self.tokenizer is not None else None
            raise UserError(
                f"token {outside} ({token}) has no embedding in {self.identity.id}, which has {self.num_embeddings:,}; "
                "leave it out of the texts, or give a checkpoint whose embeddings were resized for its tokenizer"
            )

    @property
    def moves_queries(self) -> bool:
        """Whether queries of this model can be moved to other positions, since its RoPE is understood."""
        return attention.moves_all_queries(self.model)

    def check_plan(self, plan: BudgetPlan) -> None:
        """Raise UserError if a plan is for another model, or needs queries to be moved that cannot be."""
        plan.validate_for(self.identity, self.geometry)
        if build_eviction(plan.eviction).num_references and not self.moves_queries:
            raise UserError(attention.UNKNOWN_ROTATION)

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
        """Wrap a transformers model and switch its attention to baklava's.

        If its RoPE depends on the length of a text, the frequencies become those of its maximum length.
        """
        attention.register()
        model.set_attn_implementation(attention.ATTN_IMPLEMENTATION)
        # transformers only warns if the attention of a model cannot be chosen.
        if model.config.get_text_config(decoder=True)._attn_implementation != attention.ATTN_IMPLEMENTATION:
            raise UserError(
                f"{model.config.model_type} does not attend through transformers' attention interface, so its cache "
                "cannot be budgeted; choose another model"
            )
        # A cache type baked into a checkpoint would make generate() refuse ours.
        model.generation_config.cache_implementation = None
        # Without a cache, generate() feeds the whole text again at every step.
        model.config.use_cache = model.generation_config.use_cache = True
        identity = ModelIdentity.from_config(model.config, id, revision)
        loaded = cls(model.eval(), tokenizer, identity, CacheGeometry.from_config(model.config))
        fix_rope_frequencies(model, loaded.max_length)
        if loaded.geometry.states:
            model.register_forward_pre_hook(_count_positions, with_kwargs=True)
            _check_states_continue(loaded)
        probe_rotary_shifts(model, loaded.num_embeddings // 2)
        if loaded.eos_token_ids:
            model.generation_config.eos_token_id = sorted(loaded.eos_token_ids)
        return loaded


def _count_positions(module: Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Count the positions of new tokens from those that the cache has seen: Bamba counts them from 0."""
    cache, new = kwargs.get("past_key_values"), args[0] if args else kwargs.get("input_ids")
    new = kwargs.get("inputs_embeds") if new is None else new
    if cache is None or new is None or kwargs.get("position_ids") is not None:
        return None
    seen = cache.get_seq_length()
    return args, kwargs | {"position_ids": torch.arange(seen, seen + new.shape[1], device=new.device)[None]}


CONTINUATION_CHECK_TOKENS = 32
"""Tokens of the text by which a model with states is checked."""

MAX_CONTINUATION_ERROR = {"float32": 1e-3, "bfloat16": 0.1, "float16": 0.03}
"""Largest difference of its logits by rounding, as a share of the largest one."""


@torch.inference_mode()
def _check_states_continue(loaded: LoadedModel) -> None:
    """Raise UserError if several tokens cannot continue a text in transformers' own cache."""
    if loaded.device.type == "meta":
        return
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(loaded.num_embeddings, (1, CONTINUATION_CHECK_TOKENS), generator=draw).to(loaded.device)
    whole = loaded.model(ids, use_cache=False, logits_to_keep=1).logits.float()
    cache = DynamicCache(config=loaded.model.config)
    for part in ids.chunk(2, 1):
        logits = loaded.model(part, past_key_values=cache, use_cache=True, logits_to_keep=1).logits.float()
    if float((logits - whole).abs().max()) > MAX_CONTINUATION_ERROR[loaded.dtype] * float(whole.abs().max()):
        raise UserError(
            f"the recurrent layers of {loaded.model.config.model_type} forget the text before if several tokens "
            "continue it, in transformers' own cache as well, so it can be neither scored nor asked twice; choose "
            "another model"
        )


def load(
    name: str,
    *,
    dtype: str | None = None,
    device: str | None = None,
    threads: int | None = None,
    device_map_auto: bool = False,
) -> LoadedModel:
    """Load a model from safetensors, without running code from the checkpoint.

    Args:
        name: `demo`, a directory, or the id of a hub model.
        dtype: The precision of its products: `float32`, `bfloat16`, `float16` or `auto`, which is the checkpoint's own
            on a GPU, and on a CPU bfloat16 if that is faster, else float32. None is the same, but float32 on every
            CPU, so that scores compare. On a CPU, only linear layers, without the output layer, and attention to
            prompts multiply in bfloat16; the weights of these layers are frozen.
        device: A device of PyTorch, such as `cpu`, `cuda:1` or `mps`; by default `cuda` if available, else `cpu`.
        threads: Threads of PyTorch, for the whole process.
        device_map_auto: Distribute the layers over all visible devices, for a model that is larger than one of them.

    Raises:
        UserError: nothing loadable has this name, the dtype cannot be had, weights are missing or damaged, the model
            does not fit into memory, its cache cannot be budgeted, or the device is not available, or is given
            together with `device_map_auto`.
    """
    if device and device_map_auto:
        raise UserError(f"device_map_auto chooses the devices itself; leave it out, or leave out device {device!r}")
    if threads:
        torch.set_num_threads(threads)
    target = _available_device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    products = weights_dtype(dtype, target)
    checkpoint = _find(name)
    CacheGeometry.from_config(checkpoint.read_config())  # refuses a shape before the weights are read
    tokenizer = checkpoint.read_tokenizer()
    states = torch.float32 if target.type == "cpu" else products
    model = checkpoint.read_model(states or "auto", target, device_map_auto=device_map_auto)
    if products is not None and products != states and not round_linear_layers(model, products) and dtype != "auto":
        raise UserError(f"dtype {dtype} changes nothing in {name}, which has no plain linear layers; choose float32")
    checkpoint.check_vocabulary(tokenizer, model)
    revision = DEMO_SHA256 if name == DEMO else getattr(model.config, "_commit_hash", None)
    return LoadedModel.of(model, tokenizer, id=name, revision=revision)


def load_config(name: str) -> tuple[ModelIdentity, CacheGeometry]:
    """Return the identity and the geometry of a model, without reading weights.

    Refuse what `load` would refuse, as far as the config, the tokenizer and the names and shapes of the weights tell.
    """
    checkpoint = _find(name)
    config = checkpoint.read_config()
    geometry = CacheGeometry.from_config(config)
    tokenizer = checkpoint.read_tokenizer()
    model = checkpoint.read_empty_model(config)
    checkpoint.check_vocabulary(tokenizer, model)
    LoadedModel.of(model, tokenizer, id=name)  # refuses a model whose cache cannot be budgeted
    return ModelIdentity.from_config(config, name), geometry


def _find(name: str) -> Checkpoint:
    return Checkpoint(name, str(demo_model()) if name == DEMO else name)


def _available_device(name: str) -> torch.device:
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # what PyTorch raises depends on the device
        raise UserError(
            f"device {name!r} cannot be used ({first_line(error)}); give a device that PyTorch finds on this machine, "
            "such as cpu, cuda, cuda:1 or mps"
        ) from None


def max_length(config: Any) -> int:
    """Return the largest number of tokens for which the RoPE of a text config is made.

    Dynamic RoPE stretches `max_position_embeddings` by its factor.
    """
    ropes = config.rope_parameters if isinstance(getattr(config, "rope_parameters", None), dict) else {}
    ropes = [rope for rope in (ropes, *ropes.values()) if isinstance(rope, dict)]
    factors = [rope.get("factor") or 1.0 for rope in ropes if "dynamic" in str(rope.get("rope_type"))]
    return int(config.max_position_embeddings * max(factors, default=1.0))


def fix_rope_frequencies(model: Any, num_positions: int) -> None:
    """Let each position have one RoPE, whatever else is in the forward: the one of a text of `num_positions` tokens.

    transformers chooses the frequencies of `longrope` (Phi-3.5, Phi-4-mini, PhiMoE) and `dynamic` RoPE by the largest
    position of a forward. So rows of a batch would depend on each other, and a cache could mix keys of both kinds;
    Phi models throw a user's cache away instead. vLLM chooses by the model's maximum too.

    Args:
        model: A transformers model, which is changed.
        num_positions: Tokens of the longest text.
    """
    modules = [module for module in model.modules() if _depends_on_length(module)]
    for module in modules:
        module.register_forward_pre_hook(_AppendPosition(num_positions - 1), with_kwargs=True)
        module.register_forward_hook(_drop_last_position)
    if modules:
        # Phi's own drops the cache if a text grows past the length at which the frequencies would change.
        model.prepare_inputs_for_generation = MethodType(GenerationMixin.prepare_inputs_for_generation, model)


def _depends_on_length(module: Module) -> bool:
    rope_type = getattr(module, "rope_type", None)  # a dict if it differs between types of layers
    names = rope_type.values() if isinstance(rope_type, dict) else [rope_type]
    return any(name == "longrope" or "dynamic" in str(name) for name in names)


class _AppendPosition:
    """A hook that appends the last position to those of a forward, from which the frequencies are chosen."""

    def __init__(self, position: int) -> None:
        self.position = position

    def __call__(self, module: Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if len(args) > 1:
            return (args[0], self._append(args[1]), *args[2:]), kwargs
        return args, kwargs | {"position_ids": self._append(kwargs["position_ids"])}

    def _append(self, position_ids: Tensor) -> Tensor:
        return torch.cat([position_ids, torch.full_like(position_ids[..., :1], self.position)], -1)


def _drop_last_position(module: Module, args: Any, output: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    cos, sin = output
    return cos[..., :-1, :], sin[..., :-1, :]
