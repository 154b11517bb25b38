"""Bytes and entries: what is asked of a press, and what the cache behind it costs."""

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from benchmarks.kvpress.loading import UserError, Window

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


SAME_IN_EVERY_LAYER = (
    "at this share kvpress finds no pyramid over the layers, and its PyramidKV keeps the same in every layer, as SnapKV"
)


@dataclass(frozen=True)
class Row:
    """One window under one press. `run` tells the model and the window's ids apart; NLL and KL in nats per token."""

    run: str
    press: str
    compression: str
    window: str
    document: str | None
    nll_full: float
    nll: float
    kl: float
    kept: int  # entries of the context, over all layers and KV heads
    shortest: int  # tokens held by the layer with the fewest, behind the context
    longest: int
    held_bytes: int
    held_dtype: str
    seconds: float

    @property
    def plan(self) -> str:
        """Name of the plan that the row belongs to."""
        return plan_name(self.press, self.compression)

    @property
    def key(self) -> tuple[str, str, str]:
        """What a second run need not do again."""
        return self.run, self.plan, self.window


def plan_name(press: str, compression: str) -> str:
    """A press and how much it keeps, such as snapkv:kept=0.3."""
    return f"{press}:{compression}" if compression else press


class Journal:
    """Finished rows, appended to a file as they come; a line that a kill cut short is dropped.

    Raises:
        UserError: the file can neither be read nor written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            text = path.read_text() if path.exists() else ""
            with path.open("a") as file:
                if text and not text.endswith("\n"):
                    file.write("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path} cannot be kept ({error}); name another file with --json") from None
        self.rows = {row.key: row for line in text.splitlines() if (row := _row(line))}

    def add(self, row: Row) -> None:
        """Keep a row, before the next one is begun."""
        with self.path.open("a") as file:
            file.write(json.dumps(asdict(row)) + "\n")
        self.rows[row.key] = row


def _row(line: str) -> Row | None:
    try:
        found = json.loads(line)
        return Row(**found) if found.keys() == {field.name for field in fields(Row)} else None
    except (ValueError, AttributeError):
        return None


def plan_of(rows: Sequence[Row], geometry: Geometry, window: Window, frees_memory: bool) -> dict[str, Any]:
    """One plan's entry: the keys of `jobs/evaluate.py --json`, and what is particular to kvpress.

    `window` is any of the plan's, which are of equal lengths. Bytes are the most of any window.
    """
    most = max(rows, key=lambda row: row.kept)
    held = max(rows, key=lambda row: row.held_bytes)
    full = geometry.nbytes(len(window.ids) * geometry.heads)
    promised = geometry.nbytes(most.kept + window.continuation * geometry.heads)
    flat = most.press == "pyramidkv" and most.shortest == most.longest < window.context
    return {
        "name": most.plan,
        "press": most.press,
        "compression": most.compression or None,
        "kept": most.kept / (window.context * geometry.heads),
        "frees_memory": frees_memory,
        "note": SAME_IN_EVERY_LAYER if flat else None,
        "layer_lengths": {"shortest": most.shortest, "longest": most.longest},
        "plan": {"bytes_per_sequence": promised, "full_bytes_per_sequence": full, "ratio": promised / full},
        "allocated_bytes": held.held_bytes * 16 // bits_of(held.held_dtype),
        "held_bytes": held.held_bytes,
        "held_dtype": held.held_dtype,
        "seconds": sum(row.seconds for row in rows),
        "windows": [_scores(row) for row in rows],
        "mean": {
            "dnll": sum(row.nll - row.nll_full for row in rows) / len(rows),
            "kl": sum(row.kl for row in rows) / len(rows),
        },
    }


def bits_of(dtype: str) -> int:
    """Bits of a number in a floating-point type, by its name: 32 for float32."""
    return int(dtype.removeprefix("bfloat").removeprefix("float"))


def _scores(row: Row) -> dict[str, Any]:
    found = {
        "name": row.window,
        "nll_full": row.nll_full,
        "nll": row.nll,
        "dnll": row.nll - row.nll_full,
        "kl": row.kl,
    }
    return found if row.document is None else found | {"document": row.document}


def write(path: Path, plans: Sequence[dict[str, Any]], versions: dict[str, str]) -> None:
    """Write the plans so that a reader never sees half of them."""
    content = {"accounting": ACCOUNTING, "versions": versions, "plans": list(plans)}
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    part.write_text(json.dumps(content, indent=1) + "\n")
    part.replace(path)


def table(plans: Sequence[dict[str, Any]]) -> str:
    """One line a plan."""
    widest = max(len(plan["name"]) for plan in plans)
    lines = [
        f"{'plan':<{widest}}  {'kept':>6}  {'bytes':>6}  {'held, 16 bit':>12}  {'frees':>5}  {'dNLL':>8}  {'KL':>8}"
    ]
    for plan in plans:
        held, frees = f"{plan['allocated_bytes'] / 2**20:.1f} MiB", "yes" if plan["frees_memory"] else "no"
        lines.append(
            f"{plan['name']:<{widest}}  {plan['kept']:>6.1%}  {plan['plan']['ratio']:>6.1%}  {held:>12}  {frees:>5}  "
            f"{plan['mean']['dnll']:>8.4f}  {plan['mean']['kl']:>8.4f}"
        )
    return "\n".join(lines)
