"""Entries and bytes: what a press is to keep, what its cache takes, and the output of the scores."""

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from benchmarks.kvpress.loading import UserError, Window

BYTES_PER_NUMBER = 2
"""Caches are counted in 16 bits, as baklava's plans are, whatever the dtype of the model."""

ACCOUNTING = (
    "kvpress compresses the context once and evicts nothing afterwards, so the continuation's entries come on top. "
    "bytes_per_sequence counts the kept context + all continuation entries in 16 bits, full_bytes_per_sequence the "
    "whole window. storage_bytes is the measured peak of the cache's storages after the compressed context or after "
    "the scored continuation (whose last token is not fed), in storage_dtype; allocated_bytes is the same in 16 bits. "
    "If frees_memory is false, kvpress hides entries from the attention but keeps them: bytes_per_sequence is then "
    "what a cache without them would need, and allocated_bytes what kvpress occupies."
)


@dataclass(frozen=True)
class Geometry:
    """The shape of the cache. An entry is the key and value of a token in a KV head of a layer."""

    layers: int
    kv_heads: int
    head_dim: int

    @classmethod
    def from_config(cls, config: Any) -> "Geometry":
        """Read from a transformers configuration."""
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return cls(config.num_hidden_layers, config.num_key_value_heads, head_dim)

    @property
    def heads(self) -> int:
        """KV heads of all layers; a token has one entry in each."""
        return self.layers * self.kv_heads

    def nbytes(self, entries: int) -> int:
        """Return the bytes of this many entries in 16 bits."""
        return entries * 2 * self.head_dim * BYTES_PER_NUMBER


@dataclass(frozen=True)
class Compression:
    """How much a press keeps: a share of the context's entries, or of the full cache's bytes at the window's end."""

    unit: Literal["kept", "bytes"]
    share: float

    def __str__(self) -> str:
        return f"{self.unit}={self.share:g}"

    def entries(self, context: int, continuation: int) -> int:
        """Return the entries of the context to keep, as a mean per KV head.

        Raises:
            UserError: the share is not in (0, 1], or leaves no entry for the context.
        """
        if not 0 < self.share <= 1:
            raise UserError(f"--{self.unit} {self.share:g} is not a share above 0 and up to 1; try 0.3")
        if self.unit == "kept":
            entries = _floor(self.share * context)
            remedy = f"keep at least {_rounded_up(1 / context)}"
        else:
            entries = _floor(self.share * (context + continuation)) - continuation
            remedy = f"give at least {_rounded_up((continuation + 1) / (context + continuation))}"
        if entries < 1:
            raise UserError(
                f"--{self.unit} {self.share:g} leaves {entries} entries per KV head for a context of {context} tokens "
                f"(kvpress evicts none of the {continuation} that follow), but needs at least 1; {remedy}"
            )
        return entries


def _floor(value: float) -> int:
    """Round down, except from just below a whole number, which is a rounding error of floats."""
    return math.floor(value + 1e-9)


def _rounded_up(share: float) -> str:
    """Return three decimals, rounded up, so that the remedy itself is valid."""
    return f"{math.ceil(share * 1000) / 1000:g}"


SAME_IN_EVERY_LAYER = (
    "at this share PyramidKV of kvpress keeps the same number of entries in every layer, as SnapKV does"
)


@dataclass(frozen=True)
class Row:
    """The scores of a press on a window; `run` is a digest of model and window, NLL and KL are in nats per token."""

    run: str
    press: str
    compression: str
    window: str
    document: str | None
    nll_full: float
    nll: float
    kl: float
    kept: int  # entries of the context, over all layers and KV heads
    shortest: int  # tokens in the layer with the fewest, after the context
    longest: int
    storage_bytes: int
    storage_dtype: str
    seconds: float

    @property
    def plan(self) -> str:
        """The name of the row's plan."""
        return plan_name(self.press, self.compression)

    @property
    def key(self) -> tuple[str, str, str]:
        """What identifies a score; a key in the journal is not scored again."""
        return self.run, self.plan, self.window


def plan_name(press: str, compression: str) -> str:
    """Return the name of a press at a compression, such as snapkv:kept=0.3."""
    return f"{press}:{compression}" if compression else press


class Journal:
    """Finished rows in a file, appended one by one; a line that was cut off by a kill is ignored.

    Raises:
        UserError: the file cannot be read or written.
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
            raise UserError(f"the journal {path} cannot be opened ({error}); name another file with --json") from None
        self.rows = {row.key: row for line in text.splitlines() if (row := _parse_row(line))}

    def add(self, row: Row) -> None:
        """Append a row."""
        with self.path.open("a") as file:
            file.write(json.dumps(asdict(row)) + "\n")
        self.rows[row.key] = row


def _parse_row(line: str) -> Row | None:
    try:
        found = json.loads(line)
        return Row(**found) if found.keys() == {field.name for field in fields(Row)} else None
    except (ValueError, AttributeError):
        return None


def summarize_plan(rows: Sequence[Row], geometry: Geometry, window: Window, frees_memory: bool) -> dict[str, Any]:
    """Return a plan's entry in the output: the keys of `jobs/evaluate.py --json`, and those of kvpress alone.

    `window` is any of the plan's windows, which have equal lengths. Bytes are the maximum over windows.
    """
    fullest = max(rows, key=lambda row: row.kept)
    largest = max(rows, key=lambda row: row.storage_bytes)
    full = geometry.nbytes(len(window.ids) * geometry.heads)
    reserved = geometry.nbytes(fullest.kept + window.continuation * geometry.heads)
    flat = fullest.press == "pyramidkv" and fullest.shortest == fullest.longest < window.context
    return {
        "name": fullest.plan,
        "press": fullest.press,
        "compression": fullest.compression or None,
        "kept": fullest.kept / (window.context * geometry.heads),
        "frees_memory": frees_memory,
        "note": SAME_IN_EVERY_LAYER if flat else None,
        "layer_lengths": {"shortest": fullest.shortest, "longest": fullest.longest},
        "plan": {"bytes_per_sequence": reserved, "full_bytes_per_sequence": full, "ratio": reserved / full},
        "allocated_bytes": largest.storage_bytes * 16 // dtype_bits(largest.storage_dtype),
        "storage_bytes": largest.storage_bytes,
        "storage_dtype": largest.storage_dtype,
        "seconds": sum(row.seconds for row in rows),
        "windows": [_scores(row) for row in rows],
        "mean": {
            "dnll": sum(row.nll - row.nll_full for row in rows) / len(rows),
            "kl": sum(row.kl for row in rows) / len(rows),
        },
    }


def dtype_bits(dtype: str) -> int:
    """Return the bits of a floating-point type by its name: 32 for float32."""
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
    """Write the plans atomically."""
    content = {"accounting": ACCOUNTING, "versions": versions, "plans": list(plans)}
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    part.write_text(json.dumps(content, indent=1) + "\n")
    part.replace(path)


def table(plans: Sequence[dict[str, Any]]) -> str:
    """Return an aligned text table with one line per plan."""
    name_width = max(len(plan["name"]) for plan in plans)
    lines = [
        f"{'plan':<{name_width}}  {'kept':>6}  {'bytes':>6}  {'allocated':>12}  {'frees':>5}  {'dNLL':>8}  {'KL':>8}"
    ]
    for plan in plans:
        allocated, frees = f"{plan['allocated_bytes'] / 2**20:.1f} MiB", "yes" if plan["frees_memory"] else "no"
        lines.append(
            f"{plan['name']:<{name_width}}  {plan['kept']:>6.1%}  {plan['plan']['ratio']:>6.1%}  {allocated:>12}  "
            f"{frees:>5}  {plan['mean']['dnll']:>8.4f}  {plan['mean']['kl']:>8.4f}"
        )
    return "\n".join(lines)
