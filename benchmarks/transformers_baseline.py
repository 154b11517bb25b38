"""The peer: the same weights with transformers' own attention."""

from collections.abc import Iterator
from contextlib import contextmanager

from baklava.cache import attention
from baklava.runtime.model_loader import LoadedModel

PEER = "DynamicCache, sdpa"


@contextmanager
def as_peer(loaded: LoadedModel) -> Iterator[None]:
    """Within it, the model attends as transformers does, which reads the choice at every forward."""
    loaded.model.config._attn_implementation = "sdpa"
    try:
        yield
    finally:
        loaded.model.config._attn_implementation = attention.NAME
