"""Find the best KV-cache plan for a model inside a budget of bytes."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from baklava.console import reject_settings_on_resume, replica_count, run_cli
from baklava.errors import UserError
from baklava.evaluation.formatting import share
from tuning.study.journal import new_run_dir

if TYPE_CHECKING:
    from tuning.selection.result import SearchResult

EXAMPLES = """what is looked for is one of
  --budget SHARE     the best plan of that size (default 0.30)
  --max-dnll NATS    the smallest plan that loses no more than that, per token on validation windows
  --front            plans of all sizes: front/plan-*.json and front.json; the knee becomes plan.json, or the point
                     nearest to --budget

writes plan.json, trials.jsonl and report.html to --out, and every trial to MLflow

examples:
  python jobs/search.py                                          the demo model at 30 %, 32 trials
  python jobs/search.py --model ./my-model --texts ./my-docs --budget 0.25
  python jobs/search.py --max-dnll 0.01 --trials 64              as small as 1 % of perplexity allows
  python jobs/search.py --front --trials 96                      a plan for every budget, in one run
  python jobs/search.py --budget 0.125 --refine 24 --trials 48   half of the trials refine the best of the others
  python jobs/search.py --bits 16 8                              nothing below 8 bits
  python jobs/search.py --sampler nsga2 --front --warm-start runs/20260101T120000Z
  python jobs/search.py --replicas 2 --gpus-per-replica 4 --memory 20      a model that no GPU holds alone
  python jobs/search.py --resume runs/20260101T120000Z           go on after a kill
  ray job submit --working-dir . -- python jobs/search.py --replicas 8"""

DEFAULTS = {
    "model": "demo",
    "texts": ["botocore"],
    "context": 3072,
    "continuation": 512,
    "trials": 32,
    "objective": "kl",
    "replicas": "auto",
    "seed": 0,
}

BUDGET = 0.30
"""What is searched for where no goal is given."""

SAMPLERS = "tpe cmaes nsga2 random qmc"
BITS = "16 8 k8v4 k6v5 k6v4 k5v4 4 k4v3 k4v2 3 k3v2 2 curves"


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="search.py",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    made.add_argument("--model", metavar="demo|DIR|HUB_ID", help="what to search a plan for (default demo)")
    made.add_argument(
        "--texts", nargs="+", metavar="NAME|FILE", help="demo texts, files, folders or hub data sets (default botocore)"
    )
    made.add_argument("--budget", type=float, help="share of the 16-bit full cache's bytes (default 0.30)")
    made.add_argument("--max-dnll", type=float, metavar="NATS", help="most loss over the full cache, in nats per token")
    made.add_argument("--front", action="store_true", help="a front of bytes and loss instead of one size")
    made.add_argument("--latency", action="store_true", help="seconds of decoding as a third side of the front")
    made.add_argument("--context", type=int, metavar="TOKENS", help="tokens prefilled per window (default 3072)")
    made.add_argument("--continuation", type=int, metavar="TOKENS", help="tokens scored per window (default 512)")
    made.add_argument("--trials", type=int, metavar="N", help="plans to try (default 32)")
    made.add_argument("--refine", type=int, metavar="N", help="how many of them refine the best (default a third)")
    made.add_argument(
        "--bits", nargs="+", choices=BITS.split(), metavar="BITS", help=f"to store in, some of {BITS} (default all)"
    )
    made.add_argument("--objective", choices=["kl", "ppl"], help="KL to the full cache, or perplexity (default kl)")
    made.add_argument("--replicas", type=replica_count, metavar="auto|N", help="copies of the model (default auto)")
    made.add_argument(
        "--gpus-per-replica", type=int, metavar="K", help="GPUs that one copy is spread over (default 1, where any are)"
    )
    made.add_argument("--memory", type=float, metavar="GIB", help="most that a replica's windows may take (no limit)")
    made.add_argument("--concurrent", type=int, metavar="N", help="trials at a time (default: for that many replicas)")
    made.add_argument("--sampler", choices=SAMPLERS.split(), help="what draws the trials (default tpe)")
    made.add_argument("--warm-start", metavar="RUN", help="the folder of an earlier search of this model to learn from")
    made.add_argument("--seed", type=int, help="of the windows and of the draws (default 0)")
    made.add_argument("--out", type=Path, metavar="DIR", help="a new folder (default runs/ and the UTC time)")
    made.add_argument("--resume", type=Path, metavar="RUN", help="the folder of a killed search, with its own settings")
    made.add_argument("--json", type=Path, metavar="FILE", help="write the result for machines, too")
    return made


def run(given: dict[str, Any]) -> "SearchResult":
    # Here, since they take seconds, and --help should not.
    from tuning.search.runner import resume, search
    from tuning.study.settings import SearchSettings

    earlier, out = given.pop("resume", None), given.pop("out", None)
    if earlier is None:
        return search(SearchSettings.from_options(**{**DEFAULTS, **_goal(given), **given}), out or new_run_dir())
    reject_settings_on_resume(earlier, given, out)
    return resume(earlier)


def _goal(given: dict[str, Any]) -> dict[str, float]:
    """The usual budget, unless another goal is given."""
    return {} if {"max_dnll", "front"} & given.keys() else {"budget": BUDGET}


def show(outcome: "SearchResult") -> None:
    metrics = outcome.winner.metrics
    print(
        f"\nwinner: {outcome.winner.candidate.name}, {share(outcome.plan.ratio)} of the bytes, "
        f"KL {metrics['kl']:.4f}, {metrics['dnll']:+.4f} nats per token on validation\n"
    )
    width = max(len(entry.candidate.name) for entry in outcome.ranking)
    print(f"{'plan':{width}}  {'KL geom.':>8}  {'KL mean':>8}  {'dNLL':>8}  {'bytes':>6}")
    for entry in outcome.ranking:
        name, scores, ratio = entry.candidate.name, entry.metrics, entry.candidate.plan.ratio
        kls = f"{scores['kl_geometric']:8.4f}  {scores['kl']:8.4f}"
        print(f"{name:{width}}  {kls}  {scores['dnll']:+8.4f}  {share(ratio):>6}")
    print("", *outcome.ablation_summary, sep="\n")
    if outcome.validation.front:
        print(f"\nfront   {outcome.out / 'front.json'}, {len(outcome.validation.front)} plans")
    print(f"\nplan    {outcome.out / 'plan.json'}\nreport  {outcome.out / 'report.html'}\n\nnext steps")
    for what, command in outcome.next_steps.items():
        print(f"  {what:12} {command}")


def answer(argv: Sequence[str] | None) -> None:
    given = vars(parser().parse_args(argv))
    machine = given.pop("json", None)
    if machine and not machine.absolute().parent.is_dir():
        raise UserError(f"--json {machine} lies in a folder that does not exist; make the folder first")
    outcome = run(given)
    show(outcome)
    if machine:
        machine.write_text(json.dumps(outcome.summary(), indent=1) + "\n")


def main(argv: Sequence[str] | None = None) -> int:
    return run_cli("search", lambda: answer(argv))


if __name__ == "__main__":
    sys.exit(main())
