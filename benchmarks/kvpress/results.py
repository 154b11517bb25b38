"""Scores as they are kept: a line per finished (press, compression, window), and the JSON that sums them up."""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from benchmarks.kvpress.accounting import ACCOUNTING, Geometry
from benchmarks.kvpress.windows import UserError, Window

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
