"""The precision in which a model computes its products, and what is fastest on this CPU."""

import ctypes
import functools
import logging
import time
from contextlib import suppress

import torch
from torch import Tensor, nn

from baklava.errors import UserError
from baklava.runtime.dtypes import DTYPES

logger = logging.getLogger(__name__)

PROBE_SHAPE = (576, 1536)
PROBE_TOKENS = 256
PROBE_ROUNDS = 5
MIN_SPEEDUP = 1.2
"""bfloat16 must be this many times as fast as float32, or it is not chosen."""


GATED_MLP = ("gate_proj", "up_proj", "down_proj")
"""The names of an MLP's linear layers in most models, in the order of computation."""


class HalfPrecisionLinear(nn.Linear):
    """A linear layer with weights in half precision, whose output is cast to `output_dtype`.

    Inputs and outputs are rounded; sums are in 32 bits.
    """

    output_dtype: torch.dtype

    def forward(self, input: Tensor) -> Tensor:
        """Return the product."""
        return nn.functional.linear(input.to(self.weight.dtype), self.weight, self.bias).to(self.output_dtype)


def weights_dtype(dtype: str | None, device: torch.device) -> torch.dtype | None:
    """Return the dtype of the weights of linear layers on this device; None for the checkpoint's own.

    Raises:
        UserError: there is no precision of this name.
    """
    if dtype is None:
        return torch.float32 if device.type == "cpu" else None
    if dtype == "auto":
        return fastest_cpu_dtype() if device.type == "cpu" else None
    if dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r} is none of {', '.join(DTYPES)}; choose one of them")
    if dtype == "float16" and device.type == "cpu":
        raise UserError("dtype float16 overflows in the linear layers of a CPU; choose bfloat16 or float32")
    named: torch.dtype = getattr(torch, dtype)
    return named


def resolve_dtype(dtype: str | None) -> str | None:
    """Return what `auto` stands for on this machine's CPU, so that it is recorded and all workers do the same."""
    if dtype != "auto" or torch.cuda.is_available():
        return dtype
    return str(fastest_cpu_dtype()).removeprefix("torch.")


@functools.cache
def fastest_cpu_dtype() -> torch.dtype:
    """Return bfloat16 if this CPU multiplies it faster than float32, which takes instructions of its own."""
    return torch.bfloat16 if bfloat16_speedup() >= MIN_SPEEDUP else torch.float32


@torch.inference_mode()
def bfloat16_speedup() -> float:
    """Time products of a prompt on this CPU, and return how many times as fast bfloat16 is as float32.

    One thread does it, since several would wait for each other if the machine is busy. The products of single tokens
    are not timed: they take as long as reading the weights, of which bfloat16 has half as many bytes.
    """
    states, weight, threads = torch.ones(PROBE_TOKENS, PROBE_SHAPE[1]), torch.ones(PROBE_SHAPE), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _seconds(states, weight) / _seconds(states.bfloat16(), weight.bfloat16())
    finally:
        torch.set_num_threads(threads)


def _seconds(states: Tensor, weight: Tensor) -> float:
    seconds = []
    for _ in range(PROBE_ROUNDS):
        started = time.perf_counter()
        nn.functional.linear(states, weight)
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def round_linear_layers(model: nn.Module, dtype: torch.dtype) -> int:
    """Give plain linear layers weights of this dtype, except for the output layer, and return how many there are.

    Between the linear layers of a gated MLP, states have this dtype, too: converting them took a tenth of a prompt.
    Everything else stays as it is: the cache and decoding, whose kernels are for float32, experts in one tensor, and
    layers that multiply in their own way. Attention to prompts rounds the factors of its products alike.

    Logits in bfloat16 would have 8 bits, and tripled the loss (KL to float32 .0007 instead of .0002).
    """
    output = model.get_output_embeddings()  # type: ignore[operator]
    embedding = model.get_input_embeddings().weight  # type: ignore[operator]
    own_dtypes = {module: module.weight.dtype for module in model.modules() if type(module) is nn.Linear}
    rounded, others = [], 0
    for module in model.modules():
        own = [parameter for parameter in module.parameters(recurse=False) if parameter is not embedding]
        if type(module) is not nn.Linear or module is output or not module.weight.is_floating_point():
            others += 0 if module is output else sum(parameter.numel() for parameter in own)
            continue
        for parameter in own:
            parameter.data = parameter.data.to(dtype)
            parameter.requires_grad_(False)
        module.__class__ = HalfPrecisionLinear
        assert isinstance(module, HalfPrecisionLinear)
        module.output_dtype = own_dtypes[module]  # several layers may share weights, which are rounded by now
        rounded.append(module)
    for module in model.modules():
        gate, up, down = (getattr(module, name, None) for name in GATED_MLP)
        if all(isinstance(layer, HalfPrecisionLinear) for layer in (gate, up, down)):
            gate.output_dtype = up.output_dtype = dtype  # type: ignore[union-attr]
    numbers = sum(module.weight.numel() for module in rounded)
    if rounded and numbers < others:
        share = numbers / (numbers + others)
        name = str(dtype).removeprefix("torch.")
        logger.warning("only %.0f %% of the weights are in linear layers, which compute in %s", 100 * share, name)
    _return_freed_memory()
    return len(rounded)


def _return_freed_memory() -> None:
    """Return what the wider weights took to the system: GNU's allocator keeps pieces of this size."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
