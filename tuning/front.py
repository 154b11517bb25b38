"""The front as files: every plan on it, and what each of them holds and loses."""

from collections.abc import Sequence
from pathlib import Path

from baklava.files import write_whole
from baklava.plan import BudgetPlan
from baklava.records import Record
from tuning.validate import Validated

FILE, FOLDER = "front.json", "front"


class Point(Record):
    """A plan that no other one beats in bytes and loss, and in seconds of a decoding step where those are counted.

    The losses are means on the validation windows.

    `plan` is its file, as seen from the folder of the search; `chosen` marks the one that became plan.json.
    """

    plan: str
    name: str
    ratio: float
    bytes_per_sequence: int
    kl: float
    kl_geometric: float
    dnll: float
    ppl: float
    decode_seconds: float | None = None
    chosen: bool


class Front(Record):
    """The points by size, the smallest first."""

    points: tuple[Point, ...]


def write_front(out: Path, entries: Sequence[Validated], plans: Sequence[BudgetPlan], winner: Validated) -> None:
    """Write a plan file per point, then the list of them."""
    folder = out / FOLDER
    folder.mkdir(exist_ok=True)
    for stale in folder.glob("plan-*.json"):
        stale.unlink()
    names = [f"{FOLDER}/plan-{number:02}.json" for number in range(1, len(entries) + 1)]
    for name, plan in zip(names, plans, strict=True):
        plan.write(out / name)
    points = tuple(_point(name, entry, entry is winner) for name, entry in zip(names, entries, strict=True))
    write_whole(out / FILE, Front(points=points).model_dump_json(indent=1) + "\n")


def _point(file: str, entry: Validated, chosen: bool) -> Point:
    plan, metrics = entry.candidate.plan, entry.metrics
    losses = {name: metrics[name] for name in ("kl", "kl_geometric", "dnll", "ppl")}
    size = {"ratio": plan.ratio, "bytes_per_sequence": plan.bytes_per_sequence}
    timed = metrics.get("decode_seconds")
    return Point(plan=file, name=entry.candidate.name, chosen=chosen, decode_seconds=timed, **size, **losses)
