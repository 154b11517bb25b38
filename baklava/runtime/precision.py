"""The precision in which a model computes its products, and what is fastest on this CPU."""

import functools
import time

import torch
from torch import Tensor, nn

from baklava.errors import UserError
from baklava.runtime.dtypes import DTYPES

PROBE_SHAPE = (576, 1536)
PROBE_TOKENS = 256
PROBE_ROUNDS = 5
MIN_SPEEDUP = 1.2
"""bfloat16 must be this many times as fast as float32, or it is not chosen."""


class HalfPrecisionLinear(nn.Linear):
    """A linear layer with weights in half precision, whose inputs and outputs have the precision of the model.

    Inputs and outputs are rounded; sums are in 32 bits.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Return the product in the dtype of the input."""
        return nn.functional.linear(input.to(self.weight.dtype), self.weight, self.bias).to(input.dtype)


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
    named: torch.dtype = getattr(torch, dtype)
    return named


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


def round_linear_layers(model: nn.Module, dtype: torch.dtype) -> None:
    """Give the linear layers weights of this dtype, except for the output layer, whose rounding would be seen.

    Everything else stays as it is, attention and its cache included: they take little of the time, and kernels for
    float32. Logits in bfloat16 would have 8 bits, and tripled the loss (KL to float32 .0007 instead of .0002).
    """
    output = model.get_output_embeddings()  # type: ignore[operator]
    for module in model.modules():
        if type(module) is nn.Linear and module is not output:
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.to(dtype)
                parameter.requires_grad_(False)
            module.__class__ = HalfPrecisionLinear
