"""Search for the best KV-cache plan for a model."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from baklava.console import PREFILL_CHUNK_HELP, reject_settings_on_resume, replica_count, run_cli, share
from baklava.evaluation.intervals import format_share
from baklava.runtime.dtypes import DTYPE_HELP, DTYPES
from tuning import configure_environment
from tuning.study.journal import check_json_file, new_run_dir
from tuning.study.objective import Objective
from tuning.study.settings import ALL_BITS, SamplerName, SearchSettings

if TYPE_CHECKING:
    from tuning.selection.result import SearchResult

EXAMPLES = """the goal is one of
  --budget SHARE     the best plan of that size (default 0.30)
  --max-dnll NATS    the smallest plan that loses at most that much per token on validation windows
  --front            plans of all sizes: front/plan-*.json and front.json; the knee becomes plan.json, or the point
                     nearest to --budget

writes plan.json, trials.jsonl and report.html to --out, and every trial to MLflow

examples:
  baklava-search                                          the demo model at 30 %, 32 trials
  baklava-search --model ./my-model --texts ./my-docs --budget 0.25
  baklava-search --max-dnll 0.01 --trials 64              the smallest plan that costs 1 % of perplexity
  baklava-search --front --trials 96                      a plan for every budget, in one run
  baklava-search --budget 0.125 --refine 24 --trials 48   half of the trials refine the best of the others
  baklava-search --bits 16 8                              nothing below 8 bits
  baklava-search --sampler nsga2 --front --warm-start runs/20260101T120000Z
  baklava-search --replicas 2 --gpus-per-replica 4 --memory 20      a model too large for one GPU
  baklava-search --resume runs/20260101T120000Z           continue after a kill

jobs/search.py is the same command as a script, for a job on a Ray cluster:
  ray job submit --working-dir . -- python jobs/search.py --replicas 8

guides: docs/guide/search.md, and docs/guide/cluster.md for several machines"""

DEFAULTS = {
    "model": "demo",
    "texts": ["botocore"],
    "context": 3072,
    "continuation": 512,
    "trials": 32,
}

DEFAULT_BUDGET = 0.30
"""The goal if no option gives one."""


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line; options that are not given are absent from its result."""
    parser = argparse.ArgumentParser(
        prog="baklava-search",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    add = parser.add_argument
    add("--model", metavar="demo|DIR|HUB_ID", help="model to search plans for (default demo)")
    add("--dtype", choices=DTYPES, help=DTYPE_HELP)
    add(
        "--texts", nargs="+", metavar="NAME|FILE", help="demo texts, files, folders or hub data sets (default botocore)"
    )
    add(
        "--budget",
        type=share,
        metavar="SHARE",
        help="share of the 16-bit full cache's bytes, as 0.25 or 25%% (default 0.30)",
    )
    add("--max-dnll", type=float, metavar="NATS", help="maximum loss over the full cache, in nats per token")
    add("--front", action="store_true", help="search a Pareto front of bytes and loss instead of one size")
    add("--latency", action="store_true", help="decode time as a third objective of the front")
    add("--context", type=int, metavar="TOKENS", help="tokens prefilled per window (default 3072)")
    add("--continuation", type=int, metavar="TOKENS", help="tokens scored per window (default 512)")
    add("--trials", type=int, metavar="N", help="number of plans to try (default 32)")
    add("--refine", type=int, metavar="N", help="trials that refine the best of the others (default: a third)")
    bits = " ".join(ALL_BITS)
    add(
        "--bits",
        nargs="+",
        choices=ALL_BITS,
        metavar="BITS",
        help=f"bits of keys and values, some of {bits} (default all)",
    )
    add("--objective", choices=get_args(Objective), help="KL to the full cache, or perplexity (default kl)")
    add("--prefill-chunk", type=int, metavar="TOKENS", help=PREFILL_CHUNK_HELP)
    add("--replicas", type=replica_count, metavar="auto|N", help="copies of the model (default auto)")
    add("--gpus-per-replica", type=int, metavar="K", help="GPUs of each replica (default: 1 if there are any)")
    add("--memory", type=float, metavar="GIB", help="maximum GiB of prefilled windows per replica (default: no limit)")
    add("--concurrent", type=int, metavar="N", help="trials that run at once (default: enough for all replicas)")
    add("--sampler", choices=get_args(SamplerName), help="sampler that proposes trials (default tpe)")
    add("--warm-start", metavar="RUN", help="folder of an earlier search of this model to learn from")
    add("--seed", type=int, help="seed of the windows and of the sampler (default 0)")
    add("--out", type=Path, metavar="DIR", help="new folder (default: runs/ and the UTC time)")
    add("--resume", type=Path, metavar="RUN", help="folder of an interrupted search, to continue it")
    add("--json", type=Path, metavar="FILE", help="also write the result as JSON")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    configure_environment()
    return run_cli("baklava-search", lambda: _main(argv))


def _main(argv: Sequence[str] | None) -> None:
    options = vars(build_parser().parse_args(argv))
    json_file = options.pop("json", None)
    if json_file:
        check_json_file(json_file)
    result = _run(options)
    _print_result(result)
    if json_file:
        json_file.write_text(json.dumps(result.summary(), indent=1) + "\n")


def _run(options: dict[str, Any]) -> "SearchResult":
    # Imported here, since it takes seconds and --help should not.
    from tuning.search.runner import resume, search

    earlier, out = options.pop("resume", None), options.pop("out", None)
    if earlier is not None:
        reject_settings_on_resume(earlier, options, out)
        return resume(earlier)
    goal = {} if {"max_dnll", "front"} & options.keys() else {"budget": DEFAULT_BUDGET}
    return search(SearchSettings.from_options(**{**DEFAULTS, **goal, **options}), out or new_run_dir())


def _print_result(result: "SearchResult") -> None:
    winner, metrics = result.winner.candidate.name, result.winner.metrics
    print(
        f"\nwinner: {winner}, {format_share(result.plan.ratio)} of the bytes, KL {metrics['kl']:.4f}, "
        f"{metrics['dnll']:+.4f} nats per token on validation\n"
    )
    width = max(len(entry.candidate.name) for entry in result.ranking)
    print(f"{'plan':{width}}  {'KL geom.':>8}  {'KL mean':>8}  {'dNLL':>8}  {'bytes':>6}")
    for entry in result.ranking:
        name, scores, ratio = entry.candidate.name, entry.metrics, entry.candidate.plan.ratio
        kls = f"{scores['kl_geometric']:8.4f}  {scores['kl']:8.4f}"
        print(f"{name:{width}}  {kls}  {scores['dnll']:+8.4f}  {format_share(ratio):>6}")
    print("", *result.ablation_summary, sep="\n")
    if result.validation.front:
        print(f"\nfront   {result.out / 'front.json'}, {len(result.validation.front)} plans")
    print(f"\nplan    {result.out / 'plan.json'}\nreport  {result.out / 'report.html'}\n\nnext steps")
    for purpose, command in result.next_steps.items():
        print(f"  {purpose:12} {command}")
