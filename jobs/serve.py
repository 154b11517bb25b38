"""Serve a model inside its budget plan over HTTP, as OpenAI's clients speak it."""

import argparse
import contextlib
import os
import queue
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from baklava.console import log, run_cli
from baklava.errors import UserError
from baklava.plan.budget_plan import BudgetPlan
from serve_app.api.network import ApiKeys, check_listen_address, read_api_keys
from serve_app.engine.chunk_size import DEFAULT_PREFILL_DECODE_RATIO

EXAMPLES = """examples:
  python jobs/serve.py --plan runs/my-search/plan.json --model demo
  python jobs/serve.py --plan models:/baklava-demo@champion --model demo --port 8080 --pool 2GiB
  python jobs/serve.py --plan full --model HuggingFaceTB/SmolLM2-360M-Instruct
  python jobs/serve.py --plan plan.json --model demo --prefix system-prompt.txt --replicas 2 --autoscale 4
  BAKLAVA_API_KEYS=secret1,secret2 python jobs/serve.py --plan plan.json --model demo --host 0.0.0.0

Requests that name no temperature are sampled at 1.0, as with OpenAI; give 0 for greedy decoding.
SIGHUP reads --plan again, a file or an alias of the registry, and swaps it in: requests under way end in the old one.
Ctrl-C or SIGTERM ends the server once the requests under way have ended; a second one ends it at once."""

MEBIBYTE = 2**20


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    return run_cli("serve", lambda: run(arguments))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="serve.py", description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--plan",
        required=True,
        metavar="PLAN",
        help="a plan.json, models:/NAME@ALIAS from MLflow's registry, or full to keep every entry",
    )
    parser.add_argument("--model", required=True, help="demo, a directory, or the id of a hub model")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    parser.add_argument("--port", type=_port, default=8000, help="port to listen on (default: 8000)")
    _add_capacity(parser)
    _add_access(parser)
    return parser.parse_args(argv)


def _add_capacity(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--pool",
        default="50%",
        metavar="SIZE",
        help="memory for KV caches, per replica in bytes (2GiB), or of all on a device in share of what is free there "
        "(default: 50%%)",
    )
    parser.add_argument(
        "--waiting", type=_count, default=64, metavar="N", help="requests that may wait in a replica (default: 64)"
    )
    parser.add_argument(
        "--prefill-share",
        type=_positive,
        default=DEFAULT_PREFILL_DECODE_RATIO,
        metavar="X",
        help="time that a step gives to the prompt that enters, in that of its decode batch: more lets prompts in "
        "sooner, less keeps the others' tokens coming (default: %(default)s)",
    )
    parser.add_argument("--replicas", type=_count, default=1, metavar="N", help="copies of the model (default: 1)")
    parser.add_argument(
        "--autoscale", type=_count, metavar="N", help="add replicas, up to so many, while the pools are nearly full"
    )
    parser.add_argument(
        "--timeout", type=_count, default=600, metavar="S", help="longest life of a request, seconds (default: 600)"
    )
    parser.add_argument(
        "--prefix",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="a prompt that many requests begin with, kept in the cache: a system prompt as text, or messages as .json",
    )


def _add_access(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--api-keys",
        type=Path,
        metavar="FILE",
        help="file with one accepted API key a line; or set BAKLAVA_API_KEYS to keys with commas between them",
    )
    parser.add_argument(
        "--admin-keys",
        type=Path,
        metavar="FILE",
        help="the same for keys that may also change the plan; or set BAKLAVA_ADMIN_KEYS",
    )
    parser.add_argument("--logs", metavar="FOLDER", help="write a JSON line per request there, without what was said")


def run(arguments: argparse.Namespace) -> None:
    """Check what can be checked in a moment, start the server, and wait for its end."""
    keys = ApiKeys.from_keys(read_api_keys(arguments.api_keys), read_api_keys(arguments.admin_keys, "admin"))
    check_listen_address(arguments.host, arguments.port, has_keys=keys.required)
    most = max(arguments.replicas, arguments.autoscale or 0)
    plan = checked_plan(arguments.plan, arguments.model)
    settings, scale = _settings(arguments, plan, keys, most)
    from serve_app.deployment.app import deployed, session

    log(f"starting {arguments.replicas} replica(s) of {arguments.model}")
    with session(most, quiet=scale.logs is not None):
        signals = taken_signals()
        with deployed(settings, arguments.host, arguments.port, scale) as server:
            print(welcome(server.about, arguments.host, arguments.port, has_keys=keys.required), flush=True)
            wait(signals, lambda: reload(arguments, server.board))


def _settings(arguments: argparse.Namespace, plan: BudgetPlan | None, keys: ApiKeys, most: int) -> tuple[Any, Any]:
    from serve_app.engine.memory import PoolSize
    from serve_app.openai.tokenization import PinnedPrefix

    pool = PoolSize.parse(arguments.pool)
    declared = tuple(PinnedPrefix.read(path) for path in arguments.prefix)
    logs = str(Path(arguments.logs).absolute()) if arguments.logs else None
    from serve_app.deployment.app import Scale
    from serve_app.deployment.replica import Settings

    settings = Settings(
        model=arguments.model,
        plan=plan,
        created=int(time.time()),
        threads=max(1, (os.cpu_count() or 1) // most),
        pool=pool,
        waiting=arguments.waiting,
        declared=declared,
        keys=keys,
        seconds=float(arguments.timeout),
        host=arguments.host,
        beside=arguments.prefill_share,
    )
    return settings, Scale(arguments.replicas, most, logs)


def checked_plan(source: str, model: str) -> BudgetPlan | None:
    """The plan that `source` names, if it fits the model; None for the full cache."""
    from baklava.plan.registry import load_plan

    plan = None if source == "full" else load_plan(source)
    from baklava.eviction import build_eviction
    from baklava.runtime.model_loader import load_config

    identity, geometry = load_config(model)
    if plan:
        plan.validate_for(identity, geometry)
        build_eviction(plan.eviction)
    return plan


def welcome(about: dict[str, Any], host: str, port: int, *, has_keys: bool) -> str:
    """What is served where, how many sequences fit, and how to ask it something."""
    plan, model = about["plan"], about["model"]["id"]
    tokens = plan["context_length"]
    held, full = plan["bytes_per_sequence"] / MEBIBYTE, plan["full_bytes_per_sequence"] / MEBIBYTE
    base = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    key = '-H "Authorization: Bearer $KEY" ' if has_keys else ""
    body = f'{{"model": "{model}", "messages": [{{"role": "user", "content": "Hello!"}}], "stream": true}}'
    return f"""
baklava listens on {base}
  model        {model}, up to {about["model"]["max_model_len"]:,} tokens
  plan         {plan["digest"]}, {plan["eviction"]["method"]} eviction
  memory       {held:,.1f} MiB per sequence; the full cache of {tokens:,} tokens has {full:,.1f} ({plan["ratio"]:.1%})
  pool         {about["pool_bytes"] / MEBIBYTE:,.0f} MiB of KV caches per replica
{fits(about["fits"])}
  base_url     {base}/v1
  status page  {base}/

curl -N {base}/v1/chat/completions -H "Content-Type: application/json" {key}\\
  -d '{body}'
"""


def fits(rows: Sequence[tuple[int, int, int]]) -> str:
    """How many sequences fit into the pool, by their length, with the full cache and inside the plan."""
    head = f"  {'tokens per sequence':<22}" + "".join(f"{tokens:>9,}" for tokens, _, _ in rows)
    full = f"  {'sequences, full cache':<22}" + "".join(f"{dense:>9,}" for _, dense, _ in rows)
    plan = f"  {'sequences, this plan':<22}" + "".join(f"{budgeted:>9,}" for _, _, budgeted in rows)
    return "\n".join((head, full, plan))


def taken_signals() -> "queue.SimpleQueue[int]":
    """Signals as they come. Ray sets handlers of its own when it starts, so this comes after.

    SIGTERM does what Ctrl-C does; SIGHUP is put into the queue.
    """
    taken: queue.SimpleQueue[int] = queue.SimpleQueue()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    signal.signal(signal.SIGHUP, lambda number, _: taken.put(number))
    return taken


def wait(signals: "queue.SimpleQueue[int]", hung_up: Callable[[], None]) -> None:
    """Wait for Ctrl-C or SIGTERM; until then, do at every SIGHUP what it asks for."""
    with contextlib.suppress(KeyboardInterrupt):
        while signals.get():
            hung_up()
    log("stopping: requests under way may end")


def reload(arguments: argparse.Namespace, board: Any) -> None:
    """Read the plan again and say what has come of it; whatever is wrong with it, the server goes on."""
    from serve_app.replication.plan_rollout import put_in_force

    try:
        plan = checked_plan(arguments.plan, arguments.model)
    except UserError as error:
        log(f"the plan stays as it is: {error}")
    else:
        log(put_in_force(board, plan) if plan else "the plan stays as it is: --plan full has nothing to read again")


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is no number above 0; try {DEFAULT_PREFILL_DECODE_RATIO}")
    return value


def _port(text: str) -> int:
    if not text.isdecimal() or not 0 < int(text) < 65536:
        raise argparse.ArgumentTypeError(f"{text} is no port; give a number from 1 to 65535")
    return int(text)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is no number; give 1 or more")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
