"""Measure what plans cost in quality and gain in memory and speed, on your own text."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from baklava.console import PREFILL_CHUNK_HELP, log, positive_int, reject_settings_on_resume, replica_count, run_cli
from baklava.errors import UserError
from baklava.runtime.dtypes import DTYPE_HELP, DTYPES
from tuning import configure_environment
from tuning.study.journal import check_json_file, new_run_dir

if TYPE_CHECKING:
    from tuning.evaluation.runner import EvaluationResult

EXAMPLES = """A plan is a plan.json, models:/NAME@ALIAS or models:/NAME/VERSION in MLflow's registry, `full`, or
METHOD[+EVICTION][@BITS]:BUDGET with METHOD one of uniform, baklava, pyramidkv, squeeze_attention, duo_attention, adakv,
heavy_hitter_counts, reconstruction_counts, greedy and blended, EVICTION one of streaming_llm (sinks + recent, the
default), heavy_hitter, attention_matching, tova, snapkv, key_norm, keydiff, expected_attention and kvzip, BITS 16 (the
default), 8, 6, 5, 4, 3, 2, or keys and values apart such as k5v4, and BUDGET a share of the full cache's 16-bit bytes.
Methods take parameters: greedy(bits=any)+heavy_hitter(sinks=1,centroids=4):0.125.

A task is `all`, or one of passkey, needle, multi_needle, kv_retrieval, multi_value, multi_query, variable_tracking,
common_words, frequent_words, copy and few_shot, which are made from --texts; or a published benchmark:
longbench:qasper, longbench_v2, ruler:niah_single_1@4096; append =FILE to read the rows from your own file.

writes report.html, scores.json and windows.json to --out, and a run per plan to MLflow

examples:
  baklava-evaluate --plan uniform:0.3 --plan baklava:0.3 --texts ifcraft
  baklava-evaluate --plan full --plan runs/mine/plan.json --tasks all --texts my-notes.txt
  baklava-evaluate --plan models:/baklava-demo@champion --plan uniform:0.3
  baklava-evaluate --plan runs/mine/plan.json --tasks needle kv_retrieval --lengths 1024 4096 --prompts 20
  baklava-evaluate --plan baklava+heavy_hitter:0.125 --model Qwen/Qwen2.5-0.5B-Instruct --tasks longbench:qasper
  baklava-evaluate --plan full --windows windows.json --json scores.json
  baklava-evaluate --resume runs/evaluation-20260101T120000Z

jobs/evaluate.py is the same command as a script, for a job on a Ray cluster:
  ray job submit --working-dir . -- python jobs/evaluate.py --plan plans/demo-30.json --replicas 8

guides: docs/guide/evaluate.md, and docs/guide/cluster.md for several machines"""


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line; options that are not given are absent from its result."""
    parser = argparse.ArgumentParser(
        prog="baklava-evaluate",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    add = parser.add_argument
    add("--plan", action="append", dest="plans", metavar="PLAN", help="a plan to compare; repeat for several")
    add("--model", metavar="demo|DIR|HUB_ID", help="the model of the plans (default demo)")
    add("--dtype", choices=DTYPES, help=DTYPE_HELP)
    add("--texts", nargs="+", metavar="NAME|FILE", help="texts of the windows and tasks (default ifcraft)")
    add("--windows", metavar="FILE", help="a JSON file of token windows, instead of those of --texts")
    add("--context", type=positive_int, metavar="TOKENS", help="tokens prefilled per window (default 3072)")
    add("--continuation", type=positive_int, metavar="TOKENS", help="tokens scored per window (default 512)")
    add("--limit", type=positive_int, metavar="N", help="maximum number of windows (default: 12, or all of --windows)")
    add("--tasks", nargs="+", metavar="NAME", help="all, or tasks and benchmarks by name (default none)")
    add(
        "--lengths",
        nargs="+",
        type=positive_int,
        metavar="TOKENS",
        help="tokens per prompt (default: those of a window)",
    )
    add("--prompts", type=positive_int, metavar="N", help="prompts of each task and length (default 3)")
    add("--prefill-chunk", type=positive_int, metavar="TOKENS", help=PREFILL_CHUNK_HELP)
    add("--calibration", nargs="+", metavar="NAME|FILE", help="texts to profile the model on (default botocore)")
    add("--no-speed", dest="speed", action="store_false", help="do not measure speed and peak memory")
    add("--replicas", type=replica_count, metavar="auto|N", help="copies of the model, on Ray (default auto)")
    add("--threads", type=positive_int, metavar="N", help="torch threads of one process (default: torch's choice)")
    add("--seed", type=int, help="seed of the prompts (default 0)")
    add("--out", type=Path, metavar="DIR", help="new folder (default: runs/evaluation- and the UTC time)")
    add("--resume", type=Path, metavar="DIR", help="folder of an interrupted evaluation, to continue it")
    add("--json", type=Path, metavar="FILE", help="also write the scores to this file")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    configure_environment()
    return run_cli("baklava-evaluate", lambda: _main(argv))


def _main(argv: Sequence[str] | None) -> None:
    options = vars(build_parser().parse_args(argv))
    json_file = options.pop("json", None)
    if json_file:
        check_json_file(json_file)
    result = _run(options)
    if json_file:
        json_file.write_text(json.dumps(result.as_json(), indent=1, allow_nan=False) + "\n")
        log(f"scores: {json_file}")
    _print_result(result)


def _run(options: dict[str, Any]) -> "EvaluationResult":
    # Imported here, since it takes seconds and --help should not.
    from tuning.evaluation.run_dir import EvaluationSettings
    from tuning.evaluation.runner import evaluate, resume

    earlier, out = options.pop("resume", None), options.pop("out", None)
    if earlier is not None:
        reject_settings_on_resume(earlier, options, out)
        return resume(earlier)
    if "plans" not in options:
        raise UserError("no plan is given; add --plan full, --plan baklava:0.3 or the plan.json of a search")
    settings = EvaluationSettings.from_options(**options)
    return evaluate(settings, out or new_run_dir("evaluation-"))


def _print_result(result: "EvaluationResult") -> None:
    from baklava.evaluation.results import summarize
    from tuning.evaluation.report import format_tables

    print("\n" + format_tables(result.evaluations))
    print("\n" + "\n".join(f"- {sentence}" for sentence in summarize(result.evaluations, result.settings.texts)))
    run_dir = result.run_dir
    print(f"\nreport   {run_dir.report_path}\nscores   {run_dir.scores_path}\nwindows  {run_dir.windows_path}")
    advice = "--prompts 20 narrows the tasks' intervals" if result.settings.tasks else "--tasks all adds tasks"
    print(f"\nnext steps: open the report; `make ui` compares evaluations; {advice}")
