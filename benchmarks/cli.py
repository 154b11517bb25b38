"""Measure what baklava costs in time, memory and fidelity, compared with transformers and with published methods."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from baklava.console import PREFILL_CHUNK_HELP, log, positive_float, positive_int, run_cli
from baklava.errors import UserError
from baklava.runtime.dtypes import DTYPE_HELP, DTYPES
from baklava.serialization import atomic_write_text
from tuning import configure_environment

EXAMPLES = """examples:
  baklava-benchmark decode
  baklava-benchmark decode --contexts 8192 --batches 1 4 --json runs/decode.json
  baklava-benchmark decode --contexts 4096 --batches 8 --plans plans/demo-12.5.json
  baklava-benchmark prefill --contexts 1024 2048 --no-memory
  baklava-benchmark fidelity --json docs/benchmarks/fidelity.json --page docs/benchmarks/fidelity.md
  baklava-benchmark fidelity --split validation --methods uniform searched --budgets 0.125
  baklava-benchmark search --json docs/benchmarks/search.json --page docs/benchmarks/search.md
  baklava-benchmark search --quick --parts dispatch
  baklava-benchmark serve --json docs/benchmarks/serve.json --page docs/benchmarks/serving.md
  baklava-benchmark serve --quick --parts pool_capacity closed_loop
  baklava-benchmark serve --parts prefix_caching --plan plans/demo-12.5.json

Plots are written next to the JSON, under the same name."""

TIMING_DESCRIPTION = """Time all plans in one process, one after the other in each round. Times are medians over rounds;
ratios are taken within a round."""
FIDELITY_DESCRIPTION = """Score every method at every budget on the same windows, from documents that no search has
seen. Rows go to a journal in --out: after a kill, the same command continues and scores only what is missing."""
SEARCH_DESCRIPTION = """Measure the time that a search takes besides its scoring: as a script, compared with one process
per trial, with two workers compared with one, and with workers that only sleep. Run it on an otherwise idle machine;
it takes about an hour."""
SERVE_DESCRIPTION = """Measure serving over HTTP: our server under a plan and with the full cache, transformers serve,
and in the closed loop OpenVINO GenAI if `make peers` has installed it, all with the same prompts. Run it on an
otherwise idle machine; it takes half an hour."""


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="baklava-benchmark",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--model", default="demo", help="demo, a directory, or a hub id (default: demo)")
    shared.add_argument("--json", type=Path, metavar="FILE", help="file of results (default: runs/benchmark-NAME.json)")
    names = parser.add_subparsers(dest="name", required=True, metavar="NAME")

    for name, rounds, batches in (("decode", 33, [1, 4, 8]), ("prefill", 3, [1])):
        timing = names.add_parser(name, parents=[shared], help=f"time {name}", description=TIMING_DESCRIPTION)
        timing.set_defaults(run=run_decode if name == "decode" else run_prefill)
        _add_timing_options(timing, rounds, batches)
        timing.add_argument("--dtype", choices=DTYPES, help=DTYPE_HELP)
        if name == "decode":
            timing.add_argument(
                "--plans", type=Path, nargs="*", default=[], metavar="FILE", help="plans to time instead of made ones"
            )
        if name == "prefill":
            timing.add_argument("--no-memory", action="store_true", help="do not measure peak memory")

    fidelity = names.add_parser(
        "fidelity", parents=[shared], help="loss at each budget", description=FIDELITY_DESCRIPTION
    )
    fidelity.set_defaults(run=run_fidelity)
    _add_fidelity_options(fidelity)

    search = names.add_parser("search", parents=[shared], help="overhead of a search", description=SEARCH_DESCRIPTION)
    search.set_defaults(run=run_search)
    search.add_argument("--texts", default="botocore", metavar="NAME|FOLDER", help="texts to search on (botocore)")
    _add_part_options(search, "overhead, baseline, scaling, dispatch")

    serve = names.add_parser("serve", parents=[shared], help="serving over HTTP", description=SERVE_DESCRIPTION)
    serve.set_defaults(run=run_serve)
    serve.add_argument("--plan", default="plans/demo-12.5-16bit.json", metavar="PLAN.json", help="plan to measure")
    serve.add_argument("--prefill-chunk", type=positive_int, metavar="TOKENS", help=PREFILL_CHUNK_HELP)
    serve.add_argument("--dtype", choices=DTYPES, help=f"{DTYPE_HELP}; of all servers")
    serve.add_argument("--texts", default="botocore", metavar="NAME|FOLDER", help="source of the prompts (botocore)")
    _add_part_options(
        serve,
        "pool_capacity, concurrent_sequences, engine_overhead, decode_alongside_prefill, pinned_prefix, "
        "prefix_caching, closed_loop, open_loop",
    )
    return parser


def _add_timing_options(parser: argparse.ArgumentParser, rounds: int, batches: list[int]) -> None:
    add = parser.add_argument
    contexts = [1024, 2048, 4096, 8192]
    add("--contexts", type=positive_int, nargs="+", metavar="N", default=contexts, help="tokens in cache or prompt")
    add("--batches", type=positive_int, nargs="+", metavar="N", default=batches, help="sequences of a batch")
    add("--share", type=positive_float, default=0.2, help="share of the entries that plans keep (default: 0.2)")
    add("--rounds", type=positive_int, default=rounds, help=f"timed rounds (default: {rounds})")
    add("--threads", type=positive_int, default=2, help="torch's threads (default: 2)")


def _add_fidelity_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--split", choices=("test", "validation"), default="test", help="use validation to choose among methods")
    add("--windows", type=positive_int, metavar="N", help="windows of each corpus (default: 8, 4 and 1)")
    add("--methods", nargs="+", metavar="NAME", help="methods to score (default: all)")
    add("--budgets", type=positive_float, nargs="+", metavar="SHARE", help="shares of the full cache's bytes")
    add("--context", type=positive_int, default=3072, metavar="TOKENS", help="tokens prefilled per window (3072)")
    add("--continuation", type=positive_int, default=512, metavar="TOKENS", help="tokens scored per window (512)")
    add("--workers", type=positive_int, default=2, metavar="N", help="processes, which share the cores (2)")
    add("--out", type=Path, metavar="DIR", help="folder of the journal (default: runs/fidelity-SPLIT)")
    add("--page", type=Path, metavar="FILE", help="Markdown page to write the tables to, between its markers")


def _add_part_options(parser: argparse.ArgumentParser, parts: str) -> None:
    parser.add_argument("--parts", nargs="+", metavar="NAME", help=f"some of {parts} (default: all)")
    parser.add_argument("--quick", action="store_true", help="small sizes that show that it runs, but measure nothing")
    parser.add_argument(
        "--page", type=Path, metavar="FILE", help="Markdown page to write the tables to, between its markers"
    )


def run_decode(args: argparse.Namespace) -> None:
    """Time decode steps."""
    # Imported here and below, since it takes seconds and --help should not.
    from baklava.plan.budget_plan import BudgetPlan
    from baklava.runtime.model_loader import load
    from benchmarks.kernels import benchmark_decode, plot, table

    _check_share(args.share)
    loaded = load(args.model, dtype=args.dtype, threads=args.threads)
    plans = {path.stem: BudgetPlan.read(path) for path in args.plans}
    for plan in plans.values():
        loaded.check_plan(plan)
    results = benchmark_decode(loaded, args.contexts, args.batches, args.share, args.rounds, plans)
    plot(results, _write_json(args, json.dumps(results, indent=1) + "\n").with_suffix(".png"))
    print(table(results))


def run_prefill(args: argparse.Namespace) -> None:
    """Time prefills, and measure their peak memory."""
    from baklava.runtime.model_loader import load
    from benchmarks.kernels import benchmark_prefill, plot, table

    _check_share(args.share)
    loaded = load(args.model, dtype=args.dtype, threads=args.threads)
    results = benchmark_prefill(loaded, args.contexts, args.batches, args.share, args.rounds, not args.no_memory)
    plot(results, _write_json(args, json.dumps(results, indent=1) + "\n").with_suffix(".png"))
    print(table(results))


def run_fidelity(args: argparse.Namespace) -> None:
    """Score every method at every budget."""
    from benchmarks.fidelity.report import SECTION, format_tables, plot
    from benchmarks.fidelity.results import summarize, to_json
    from benchmarks.fidelity.run import run_study, study_config
    from benchmarks.markdown_page import read_page, write_section

    if args.page:
        read_page(args.page, SECTION)  # fail now rather than after an hour of scoring
    config = study_config(
        model=args.model,
        split=args.split,
        windows=args.windows,
        methods=args.methods,
        budgets=args.budgets,
        context=args.context,
        continuation=args.continuation,
    )
    results = summarize(run_study(config, args.out or Path("runs") / f"fidelity-{args.split}", args.workers))
    tables = format_tables(results)
    atomic_write_text(_write_json(args, to_json(results)).with_suffix(".svg"), plot(results))
    print(tables)
    if args.page:
        write_section(args.page, SECTION, tables)


def run_search(args: argparse.Namespace) -> None:
    """Measure the overhead of a search."""
    from benchmarks.markdown_page import read_page, write_section
    from benchmarks.search.run import PARTS, SCALE_SECTION, SECTION, format_scale, format_tables, run_benchmark
    from benchmarks.search.timed_search import SearchBenchmarkConfig, quick_config

    parts = tuple(args.parts or PARTS)
    if args.page:
        read_page(args.page, SECTION)
        if "dispatch" in parts:
            read_page(args.page, SCALE_SECTION)
    config = (quick_config if args.quick else SearchBenchmarkConfig)(args.model, args.texts)
    results = run_benchmark(config, parts)
    _write_json(args, json.dumps(results, indent=1) + "\n")
    print(format_tables(results))
    if args.page:
        write_section(args.page, SECTION, format_tables(results))
        if "dispatch" in parts:
            write_section(args.page, SCALE_SECTION, format_scale(results))


def run_serve(args: argparse.Namespace) -> None:
    """Measure serving over HTTP."""
    from benchmarks.markdown_page import read_page, write_section
    from benchmarks.serve.report import SECTION, format_tables, plot
    from benchmarks.serve.run import PARTS, run_benchmark
    from benchmarks.serve.servers import ServeBenchmarkConfig, quick_config

    if args.page:
        read_page(args.page, SECTION)
    config = (quick_config if args.quick else ServeBenchmarkConfig)(args.model, args.plan, args.texts)
    config = replace(config, dtype=args.dtype, prefill_chunk=args.prefill_chunk)
    results = run_benchmark(config, tuple(args.parts or PARTS))
    path = _write_json(args, json.dumps(results, indent=1) + "\n")
    if "pool_capacity" in results:
        plot(results, path.with_suffix(".svg"))
    print(format_tables(results))
    if args.page:
        write_section(args.page, SECTION, format_tables(results))


def _check_share(share: float) -> None:
    if share >= 1:
        raise UserError(f"--share {share:g} is not a share of the entries below 1; try 0.2")


def _write_json(args: argparse.Namespace, text: str) -> Path:
    path: Path = args.json or Path("runs") / f"benchmark-{args.name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_text(path, text)
    log(f"results: {path}")
    return path


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    configure_environment()
    args = build_parser().parse_args(argv)
    return run_cli("baklava-benchmark", lambda: args.run(args))
