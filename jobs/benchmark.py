"""What baklava costs in time, memory and fidelity, next to transformers' own cache and to what others published."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from baklava.console import log, positive_int, run_cli
from baklava.errors import UserError
from baklava.serialization import atomic_write_text
from tuning import configure_environment

EXAMPLES = """examples:
  python jobs/benchmark.py decode
  python jobs/benchmark.py decode --contexts 8192 --batches 1 4 --json runs/decode.json
  python jobs/benchmark.py prefill --contexts 1024 2048 --no-memory
  python jobs/benchmark.py fidelity --workers 2 --json docs/fidelity.json --readme README.md
  python jobs/benchmark.py fidelity --split validation --methods uniform ours --budgets 0.125
  python jobs/benchmark.py search --json docs/search.json --readme README.md --scale docs/scale.md
  python jobs/benchmark.py search --quick --parts dispatch
  python jobs/benchmark.py serve --json docs/serve.json --readme README.md
  python jobs/benchmark.py serve --quick --parts fits closed

Beside the JSON lies a picture with the same name."""

TIMED = (
    """All contestants take turns in one process; figures are medians over rounds, ratios are taken round by round."""
)
STUDIED = """Every method at every budget on the same windows of documents that no search saw. The rows go into a
journal in --out: the same command goes on after a kill, and scores only what is new."""
SEARCHED = """What a search takes beside its scoring: as a script, next to a process per trial, with two replicas
next to one, and with replicas that only sleep. Run it on a machine that does nothing else; about an hour."""

SERVED = """Serving over HTTP: our server inside a plan and with the full cache, and transformers serve, with the same
prompts. Run it on a machine that does nothing else; some hours."""


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="benchmark.py",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--model", default="demo", help="demo, a directory, or a hub id (default: demo)")
    shared.add_argument("--json", type=Path, help="where the figures go (default: runs/benchmark-NAME.json)")
    names = made.add_subparsers(dest="name", required=True, metavar="NAME")
    for name, run, rounds, batches in (("decode", decode, 8, [1, 4, 8]), ("prefill", prefill, 3, [1])):
        timed = names.add_parser(name, parents=[shared], help=f"time {name}", description=TIMED)
        timed.set_defaults(run=run)
        _add_timed(timed, rounds, batches)
        if run is prefill:
            timed.add_argument("--no-memory", action="store_true", help="leave out the peaks of memory")
    studied = names.add_parser("fidelity", parents=[shared], help="loss over bytes", description=STUDIED)
    studied.set_defaults(run=fidelity)
    _add_studied(studied)
    searched = names.add_parser("search", parents=[shared], help="the search itself", description=SEARCHED)
    searched.set_defaults(run=search)
    searched.add_argument("--texts", default="botocore", metavar="NAME|FOLDER", help="what it searches on (botocore)")
    searched.add_argument("--parts", nargs="+", metavar="NAME", help="some of overhead, naive, replicas, dispatch")
    searched.add_argument("--quick", action="store_true", help="small sizes, whose figures mean nothing")
    searched.add_argument("--readme", type=Path, metavar="FILE", help="page to write the tables into")
    searched.add_argument("--scale", type=Path, metavar="FILE", help="page on scale to write its tables into")
    served = names.add_parser("serve", parents=[shared], help="serving over HTTP", description=SERVED)
    served.set_defaults(run=serve)
    served.add_argument(
        "--plan", default="plans/demo-12.5-16bit.json", metavar="PLAN.json", help="the plan that is measured"
    )
    served.add_argument(
        "--texts", default="botocore", metavar="NAME|FOLDER", help="what prompts are cut from (botocore)"
    )
    served.add_argument(
        "--parts", nargs="+", metavar="NAME", help="some of fits, together, overhead, beside, closed, open"
    )
    served.add_argument("--quick", action="store_true", help="small sizes, whose figures mean nothing")
    served.add_argument("--readme", type=Path, metavar="FILE", help="page to write the tables into")
    return made


def _add_timed(to: argparse.ArgumentParser, rounds: int, batches: list[int]) -> None:
    contexts = [1024, 2048, 4096, 8192]
    to.add_argument("--contexts", type=int, nargs="+", metavar="N", default=contexts, help="tokens in cache or prompt")
    to.add_argument("--batches", type=int, nargs="+", metavar="N", default=batches, help="sequences at a time")
    to.add_argument("--share", type=float, default=0.2, help="share of the entries that plans keep (default: 0.2)")
    to.add_argument("--rounds", type=positive_int, default=rounds, help=f"timed rounds (default: {rounds})")
    to.add_argument("--threads", type=int, default=2, help="torch's threads (default: 2)")


def _add_studied(to: argparse.ArgumentParser) -> None:
    to.add_argument("--split", choices=("test", "validation"), default="test", help="validation is for choosing")
    to.add_argument("--windows", type=positive_int, metavar="N", help="windows of each corpus (default: 3, 3 and 1)")
    to.add_argument("--methods", nargs="+", metavar="NAME", help="some contestants (default: all)")
    to.add_argument("--budgets", type=float, nargs="+", metavar="SHARE", help="shares of the full cache's bytes")
    to.add_argument("--context", type=positive_int, default=3072, metavar="TOKENS", help="prefilled per window (3072)")
    to.add_argument("--continuation", type=positive_int, default=512, metavar="TOKENS", help="scored per window (512)")
    to.add_argument("--workers", type=positive_int, default=2, metavar="N", help="processes, which share the cores (2)")
    to.add_argument("--out", type=Path, metavar="DIR", help="folder of the journal (default: runs/fidelity-SPLIT)")
    to.add_argument("--readme", type=Path, metavar="FILE", help="page to write the tables into, between its markers")


def decode(chosen: argparse.Namespace) -> None:
    # The imports are here and below, since they take seconds, and --help should not.
    from baklava.runtime.model_loader import load
    from benchmarks.kernels.decode import benchmark_decode
    from benchmarks.kernels.plot import plot, table

    _check_share(chosen.share)
    loaded = load(chosen.model, threads=chosen.threads)
    figures = benchmark_decode(loaded, chosen.contexts, chosen.batches, chosen.share, chosen.rounds)
    path = _written(chosen, json.dumps(figures, indent=1) + "\n")
    plot(figures, path.with_suffix(".png"))
    print(table(figures))


def prefill(chosen: argparse.Namespace) -> None:
    from baklava.runtime.model_loader import load
    from benchmarks.kernels.plot import plot, table
    from benchmarks.kernels.prefill import benchmark_prefill

    _check_share(chosen.share)
    loaded = load(chosen.model, threads=chosen.threads)
    memory = not chosen.no_memory
    figures = benchmark_prefill(loaded, chosen.contexts, chosen.batches, chosen.share, chosen.rounds, memory)
    path = _written(chosen, json.dumps(figures, indent=1) + "\n")
    plot(figures, path.with_suffix(".png"))
    print(table(figures))


def fidelity(chosen: argparse.Namespace) -> None:
    from benchmarks.fidelity.markdown import check_page, put, table
    from benchmarks.fidelity.plot import picture
    from benchmarks.fidelity.results import dumped, figures
    from benchmarks.fidelity.run import asked, study

    if chosen.readme:
        check_page(chosen.readme)  # before hours are spent
    wanted = asked(
        model=chosen.model,
        split=chosen.split,
        windows=chosen.windows,
        methods=chosen.methods,
        budgets=chosen.budgets,
        context=chosen.context,
        continuation=chosen.continuation,
    )
    found = figures(study(wanted, chosen.out or Path("runs") / f"fidelity-{chosen.split}", chosen.workers))
    path, text = _written(chosen, dumped(found)), table(found)
    atomic_write_text(path.with_suffix(".svg"), picture(found))
    print(text)
    if chosen.readme:
        put(chosen.readme, text)


def search(chosen: argparse.Namespace) -> None:
    from benchmarks.markdown_page import read_checked, write_section
    from benchmarks.search.config import Asked, quick
    from benchmarks.search.markdown import NAME, SCALE, scale, table
    from benchmarks.search.run import PARTS, study

    parts = tuple(chosen.parts or PARTS)
    if chosen.readme:
        read_checked(chosen.readme, NAME)
    if chosen.scale:
        read_checked(chosen.scale, SCALE, "--scale")
        if "dispatch" not in parts:
            raise UserError("--scale tells what dispatch measures, which is not among --parts; add it there")
    found = study((quick if chosen.quick else Asked)(chosen.model, chosen.texts), parts)
    _written(chosen, json.dumps(found, indent=1) + "\n")
    print(table(found))
    if chosen.readme:
        write_section(chosen.readme, NAME, table(found))
    if chosen.scale:
        write_section(chosen.scale, SCALE, scale(found), "--scale")


def serve(chosen: argparse.Namespace) -> None:
    from benchmarks.markdown_page import read_checked, write_section
    from benchmarks.serve.config import Asked, quick
    from benchmarks.serve.markdown import NAME, table
    from benchmarks.serve.plot import draw
    from benchmarks.serve.run import PARTS, study

    if chosen.readme:
        read_checked(chosen.readme, NAME)
    asked = (quick if chosen.quick else Asked)(chosen.model, chosen.plan, chosen.texts)
    found = study(asked, tuple(chosen.parts or PARTS))
    path = _written(chosen, json.dumps(found, indent=1) + "\n")
    if "fits" in found:
        draw(found, path.with_suffix(".svg"))
    print(table(found))
    if chosen.readme:
        write_section(chosen.readme, NAME, table(found))


def _check_share(share: float) -> None:
    if not 0 < share < 1:
        raise UserError(f"--share {share}: the share of the entries kept is between 0 and 1; try 0.2")


def _written(chosen: argparse.Namespace, text: str) -> Path:
    path: Path = chosen.json or Path("runs") / f"benchmark-{chosen.name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_text(path, text)
    log(f"figures: {path}" + ("; beside it a picture" if chosen.name != "search" else ""))
    return path


def main(argv: Sequence[str] | None = None) -> None:
    configure_environment()
    chosen = parser().parse_args(argv)
    chosen.run(chosen)


if __name__ == "__main__":
    sys.exit(run_cli("benchmark", main))
