"""Bytes and entries: what is asked of a press, and what the cache behind it costs."""

import math
from dataclasses import dataclass
from typing import Any, Literal

from benchmarks.kvpress.windows import UserError

BYTES_PER_NUMBER = 2
"""Caches are counted in 16 bits, as baklava counts its plans, whatever type the model runs in here."""

ACCOUNTING = (
    "kvpress compresses the context once and evicts nothing afterwards, so the continuation's entries come on top. "
    "bytes_per_sequence counts the kept context + all continuation entries in 16 bits, full_bytes_per_sequence the "
    "whole window. held_bytes is the most that the cache's storages were measured to occupy, behind the compressed "
    "context or the scored continuation (whose last token is never fed), in held_dtype; allocated_bytes is the same in "
    "16 bits. Where frees_memory is false, kvpress hides entries from the attention but keeps them: "
    "bytes_per_sequence is then what a cache that dropped them would need, allocated_bytes what kvpress occupies."
)


@dataclass(frozen=True)
class Geometry:
    """What shapes the cache. An entry is one token's key and value in one KV head of one layer."""

    layers: int
    kv_heads: int
    head_dim: int

    @classmethod
    def of(cls, config: Any) -> "Geometry":
        """Read from a transformers configuration."""
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return cls(config.num_hidden_layers, config.num_key_value_heads, head_dim)

    @property
    def heads(self) -> int:
        """KV heads of all layers: what a token has entries in."""
        return self.layers * self.kv_heads

    def nbytes(self, entries: int) -> int:
        """Bytes of keys and values of so many entries, in 16 bits."""
        return entries * 2 * self.head_dim * BYTES_PER_NUMBER


@dataclass(frozen=True)
class Compression:
    """How much to keep: a share of the context's entries, or of the bytes that the full window takes at its end."""

    unit: Literal["kept", "bytes"]
    share: float

    def __str__(self) -> str:
        return f"{self.unit}={self.share:g}"

    def entries(self, context: int, continuation: int) -> int:
        """Entries of the context to keep, a mean per KV head.

        Raises:
            UserError: the share is not in (0, 1], or leaves nothing for the context.
        """
        if not 0 < self.share <= 1:
            raise UserError(f"--{self.unit} {self.share:g} is no share above 0 and up to 1; try 0.3")
        if self.unit == "kept":
            entries = _whole(self.share * context)
            remedy = f"keep at least {_above(1 / context)}"
        else:
            entries = _whole(self.share * (context + continuation)) - continuation
            remedy = f"give at least {_above((continuation + 1) / (context + continuation))}"
        if entries < 1:
            raise UserError(
                f"--{self.unit} {self.share:g} leaves {entries} entries per KV head for a context of {context} tokens "
                f"(kvpress evicts none of the {continuation} that follow), but at least 1 has to stay; {remedy}"
            )
        return entries


def _whole(value: float) -> int:
    """Rounded down, but not below a whole number that binary fractions just miss."""
    return math.floor(value + 1e-9)


def _above(share: float) -> str:
    """Three decimals, rounded up, so that the advice itself is not refused."""
    return f"{math.ceil(share * 1000) / 1000:g}"
