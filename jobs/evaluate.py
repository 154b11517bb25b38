"""Say what plans cost in quality and gain in memory and speed, on your own text."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from baklava.console import log, positive_int, reject_settings_on_resume, replica_count, run_cli
from baklava.errors import UserError
from tuning.study.journal import new_run_dir

if TYPE_CHECKING:
    from tuning.evaluation.runner import EvaluationResult

EXAMPLES = """A plan is a plan.json, `full`, or METHOD[+EVICTION][@BITS]:BUDGET with METHOD one of uniform, baklava,
pyramid, squeeze, duo, head_adaptive, heavy_hitter_counts, reconstruction_counts, greedy and blended, EVICTION one of
streaming (sinks + recent, the default), heavy_hitter, tova, snapkv, key_norm, keydiff, expected_attention and
reconstruction, BITS 16 (the default), 8, 6, 5, 4, 3, 2 or such as k5v4, and BUDGET a share of the full cache's 16-bit
bytes. Methods take knobs: greedy(bits=any)+heavy_hitter(sinks=1,centroids=4):0.125.

A task is `all`, or one of passkey, needle, multi_needle, kv_retrieval, multi_value, multi_query, variable_tracking,
common_words, frequent_words, copy and few_shot, which are made from --texts; or a published benchmark:
longbench:qasper, longbench_v2, ruler:niah_single_1@4096, with =FILE behind it for rows of a file of your own.

writes report.html, scores.json and windows.json to --out, and a run per plan to MLflow

examples:
  python jobs/evaluate.py --plan uniform:0.3 --plan baklava:0.3 --texts ifcraft
  python jobs/evaluate.py --plan full --plan runs/mine/plan.json --tasks all --texts my-notes.txt
  python jobs/evaluate.py --plan runs/mine/plan.json --tasks needle kv_retrieval --lengths 1024 4096 --prompts 20
  python jobs/evaluate.py --plan baklava+heavy_hitter:0.125 --model Qwen/Qwen2.5-0.5B-Instruct --tasks longbench:qasper
  python jobs/evaluate.py --plan full --windows windows.json --json scores.json
  python jobs/evaluate.py --resume runs/evaluation-20260101T120000Z"""


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="evaluate.py",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    made.add_argument("--plan", action="append", dest="plans", help="what to compare; repeat for several")
    made.add_argument("--model", metavar="demo|DIR|HUB_ID", help="what the plans are for (default demo)")
    made.add_argument(
        "--texts", nargs="+", metavar="NAME|FILE", help="what windows and tasks are made of (default ifcraft)"
    )
    made.add_argument("--windows", metavar="FILE", help="a JSON file of token windows, instead of those of --texts")
    made.add_argument("--context", type=positive_int, metavar="TOKENS", help="tokens prefilled per window (default 3072)")
    made.add_argument("--continuation", type=positive_int, metavar="TOKENS", help="tokens scored per window (default 512)")
    made.add_argument("--limit", type=positive_int, metavar="N", help="most windows (default 12 of texts, all of a file)")
    made.add_argument("--tasks", nargs="+", metavar="NAME", help="all, or tasks and benchmarks by name (default none)")
    made.add_argument(
        "--lengths", nargs="+", type=positive_int, metavar="TOKENS", help="tokens of a prompt (default: those of a window)"
    )
    made.add_argument("--prompts", type=positive_int, metavar="N", help="prompts of each task and length (default 3)")
    made.add_argument(
        "--calibration", nargs="+", metavar="NAME|FILE", help="texts that METHOD:BUDGET profiles on (default botocore)"
    )
    made.add_argument("--no-speed", dest="speed", action="store_false", help="leave out speed and peak memory")
    made.add_argument("--replicas", type=replica_count, metavar="auto|N", help="copies of the model, on Ray (default auto)")
    made.add_argument("--threads", type=positive_int, metavar="N", help="torch threads of one process (default: torch's own)")
    made.add_argument("--seed", type=int, help="of the prompts (default 0)")
    made.add_argument(
        "--out", type=Path, metavar="DIR", help="a new folder (default runs/evaluation- and the UTC time)"
    )
    made.add_argument("--resume", type=Path, metavar="DIR", help="the folder of a killed evaluation, with its settings")
    made.add_argument("--json", type=Path, metavar="FILE", help="write the scores here, too")
    return made


def run(given: dict[str, Any]) -> "Evaluated":
    # Here, since they take seconds, and --help should not.
    from baklava.evaluation.speed.latency import measure_speeds
    from tuning.evaluation.run_dir import EvaluationSettings
    from tuning.evaluation.runner import evaluate, resume

    earlier, out = given.pop("resume", None), given.pop("out", None)
    if earlier is not None:
        reject_settings_on_resume(earlier, given, out)
        return resume(earlier, measure_speeds)
    if "plans" not in given:
        raise UserError("no plan was named; give --plan full, --plan baklava:0.3 or the plan.json of a search")
    settings = EvaluationSettings.of(**given)
    return evaluate(settings, out or new_run_dir("evaluation-"), measure_speeds)


def show(evaluated: "Evaluated") -> None:
    from baklava.evaluation.summary import verdict
    from tuning.evaluation.report import format_tables

    print("\n" + format_tables(evaluated.evaluations))
    print("\n" + "\n".join(f"- {each}" for each in verdict(evaluated.evaluations, evaluated.settings.texts)))
    folder = evaluated.folder
    print(f"\nreport   {folder.report}\nscores   {folder.scores}\nwindows  {folder.windows}")
    advice = "--prompts 20 narrows the tasks' intervals" if evaluated.settings.tasks else "--tasks all asks questions"
    print(f"\nnext steps: open the report; `make ui` compares evaluations; {advice}")


def answer(argv: Sequence[str] | None) -> None:
    given = vars(parser().parse_args(argv))
    machine = given.pop("json", None)
    if machine and (machine.is_dir() or not os.access(machine.absolute().parent, os.W_OK)):
        raise UserError(f"--json {machine} is no file that can be written; name a file in a folder that exists")
    evaluated = run(given)
    if machine:
        machine.write_text(json.dumps(evaluated.as_json(), indent=1, allow_nan=False) + "\n")
        log(f"scores: {machine}")
    show(evaluated)


def main(argv: Sequence[str] | None = None) -> int:
    return run_cli("evaluate", lambda: answer(argv))


if __name__ == "__main__":
    sys.exit(main())
