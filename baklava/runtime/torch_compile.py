"""Decoding as one compiled graph, where there is a compiler."""

import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

from baklava.runtime.model_loader import LoadedModel

MOST_GRAPHS = 64
"""Graphs before decoding goes on uncompiled: a few per batch size, and per kind of state that a cache can be in."""


@contextmanager
def compiled(loaded: LoadedModel) -> Iterator[None]:
    """Within it, forwards of one token per row run as one compiled graph; prompts run as they are.

    The first two tokens wait for the compiler: half a minute to two for 30 layers on two CPU cores. The second graph
    takes lengths as variables and serves from then on. Where nothing can be compiled (no C++ compiler, padded rows),
    one warning is given and the rest runs uncompiled, with the same tokens.
    """
    model = loaded.model
    before = vars(model).get("forward")
    model.forward = _Decoder(model.forward).wrapped()
    try:
        with torch._dynamo.config.patch(recompile_limit=MOST_GRAPHS):
            yield
    finally:
        del model.forward
        if before is not None:
            model.forward = before


class _Decoder:
    """Sends single tokens to the compiled forward for as long as that works."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        self.eager, self.works = forward, True
        self.fast = torch.compile(forward, fullgraph=True)

    def wrapped(self) -> Callable[..., Any]:
        """The forward, with the signature that `generate()` looks at."""

        @functools.wraps(self.eager)
        def forward(input_ids: Any = None, *args: Any, **options: Any) -> Any:
            single = input_ids is not None and input_ids.shape[1] == 1
            return (self.step if single and self.works else self.eager)(input_ids, *args, **options)

        return forward

    def step(self, *args: Any, **options: Any) -> Any:
        """One token; what fails to compile has not run yet, so the cache is as it was."""
        try:
            return self.fast(*args, **options)
        except (TorchDynamoException, FailOnRecompileLimitHit) as error:
            self.works = False
            reason = str(error).strip().splitlines()[0]
            warnings.warn(f"decoding goes on uncompiled, because compiling failed: {reason}", stacklevel=3)
            return self.eager(*args, **options)
