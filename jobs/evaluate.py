"""Compare plans on text: quality lost against the full cache, and bytes held."""

import argparse
import json
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from baklava.errors import UserError
from baklava.evaluation import Evaluation, evaluate, named_plan
from baklava.model import LoadedModel, load
from baklava.profile import Profile, cached_profile
from baklava.texts import documents
from baklava.windows import Window, read_windows, split, windows

EXAMPLES = """examples:
  python jobs/evaluate.py --plan uniform:0.3 --plan baklava:0.3 --texts ifcraft
  python jobs/evaluate.py --plan runs/2026-11-23/plan.json --texts my-notes.txt --json scores.json
  python jobs/evaluate.py --plan baklava+heavy_hitter:0.125 --model Qwen/Qwen2.5-0.5B-Instruct --texts ifcraft
  python jobs/evaluate.py --plan full --windows windows.json

A plan is a plan.json, `full`, or METHOD[+EVICTION]:BUDGET with METHOD uniform or baklava, EVICTION streaming
(sinks + recent, the default), heavy_hitter, tova, snapkv, key_norm, keydiff, expected_attention or reconstruction, and
BUDGET a share of the full cache's 16-bit bytes."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--plan", action="append", required=True, help="what to compare; repeat for several")
    parser.add_argument("--model", default="demo", help="demo, a directory, or a hub id (default: demo)")
    parser.add_argument("--texts", nargs="+", default=["ifcraft"], help="corpus names or files (default: ifcraft)")
    parser.add_argument("--windows", help="a JSON file of token windows, instead of --texts")
    parser.add_argument("--context", type=_count, default=3072, help="tokens prefilled per window (default: 3072)")
    parser.add_argument("--continuation", type=_count, default=512, help="tokens scored per window (default: 512)")
    parser.add_argument("--limit", type=_count, default=12, help="most windows, one per document (default: 12)")
    parser.add_argument("--calibration", nargs="+", default=["botocore"], help="texts that METHOD:BUDGET profiles on")
    parser.add_argument("--threads", type=_count, help="torch threads (default: torch's own choice)")
    parser.add_argument("--json", type=Path, help="write the scores here")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    if args.json and (args.json.is_dir() or not args.json.absolute().parent.is_dir()):
        raise UserError(f"--json {args.json} is no file that can be written; name a file in a folder that exists")
    loaded = load(args.model, threads=args.threads)
    cut = _windows(args, loaded)

    @cache
    def profile() -> Profile:
        texts, (context, continuation) = documents(args.calibration), (cut[0].context, cut[0].continuation)
        splits = split(texts, loaded.tokenizer, context=context, continuation=continuation, seed=0)
        return cached_profile(loaded, splits.calibration)

    plans = [named_plan(spec, loaded, len(cut[0].ids), profile) for spec in args.plan]
    evaluations = evaluate(loaded, plans, cut)
    print(table(evaluations, len(cut[0].ids)))
    if args.json:
        args.json.write_text(json.dumps(_content(evaluations), indent=1) + "\n")
        print(f"written to {args.json}")


def _count(text: str) -> int:
    if (count := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{count} is not at least 1")
    return count


def _windows(args: argparse.Namespace, loaded: LoadedModel) -> list[Window]:
    if args.windows:
        return read_windows(args.windows, loaded.model.config.vocab_size)
    cut = windows(documents(args.texts), loaded.tokenizer, context=args.context, continuation=args.continuation)
    return cut[: args.limit]


def table(evaluations: Sequence[Evaluation], length: int) -> str:
    """One line a plan: bytes, then means with their 95 % intervals over documents; `length` is a window's tokens."""
    first = evaluations[0]
    gain = first.mean("gain")
    widest = max(len(each.named.name) for each in evaluations)
    lines = [
        f"{gain.windows} windows of {gain.documents} documents; with all of its context instead of 512 tokens a window "
        f"gains {gain.mean:.3f} nats per token",
        f"{'plan':<{widest}}  {'bytes':>7}  {'held':>9}  {'dNLL (nats/token)':>26}  {'KL (nats/token)':>26}",
    ]
    for each in evaluations:
        held = f"{each.allocated_bytes / 2**20:.1f} MiB"
        cells = "  ".join(f"{_cell(each, metric):>26}" for metric in ("dnll", "kl"))
        lines.append(f"{each.named.name:<{widest}}  {each.named.plan.ratio:>7.1%}  {held:>9}  {cells}")
    lines += [
        f"{each.named.name} states its bytes at {each.named.plan.context_length} tokens, these windows have {length}"
        for each in evaluations
        if each.named.plan.context_length != length
    ]
    return "\n".join(lines)


def _cell(evaluation: Evaluation, metric: str) -> str:
    found = evaluation.mean(metric)
    return f"{found.mean:.4f} [{found.low:.4f}, {found.high:.4f}]"


def _content(evaluations: Sequence[Evaluation]) -> dict[str, object]:
    if len(evaluations) == 1:
        return evaluations[0].as_json()
    return {"plans": [each.as_json() for each in evaluations]}


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"evaluate: {error}", file=sys.stderr)
        sys.exit(2)
