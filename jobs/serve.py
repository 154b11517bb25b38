"""Serve a model inside its budget plan over HTTP, as OpenAI's clients speak it."""

import argparse
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from baklava.plan import BudgetPlan
from baklava.progress import say
from baklava.script import exit_code
from serve_app.listen import api_keys, check_address, key_digest

EXAMPLES = """examples:
  python jobs/serve.py --plan runs/my-search/plan.json --model demo
  python jobs/serve.py --plan models:/baklava-demo@champion --model demo --port 8080
  python jobs/serve.py --plan full --model HuggingFaceTB/SmolLM2-360M-Instruct
  BAKLAVA_API_KEYS=secret1,secret2 python jobs/serve.py --plan plan.json --model demo --host 0.0.0.0

Requests that name no temperature are sampled at 1.0, as with OpenAI; give 0 for greedy decoding.
Ctrl-C or SIGTERM ends the server once the requests under way have ended; a second one ends it at once."""

MEBIBYTE = 2**20


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    return exit_code("serve", lambda: run(arguments))


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
    parser.add_argument("--replicas", type=_count, default=1, metavar="N", help="copies of the model (default: 1)")
    parser.add_argument(
        "--api-keys",
        type=Path,
        metavar="FILE",
        help="file with one accepted API key a line; or set BAKLAVA_API_KEYS to keys with commas between them",
    )
    return parser.parse_args(argv)


def run(arguments: argparse.Namespace) -> None:
    """Check what can be checked in a moment, start the server, and wait for its end."""
    keys = api_keys(arguments.api_keys)
    check_address(arguments.host, arguments.port, guarded=bool(keys))
    plan = checked_plan(arguments.plan, arguments.model)
    from serve_app.app import Settings, deployed, session

    threads = max(1, (os.cpu_count() or 1) // arguments.replicas)
    settings = Settings(arguments.model, plan, int(time.time()), threads, frozenset(map(key_digest, keys)))
    say(f"starting {arguments.replicas} replica(s) of {arguments.model}")
    with session(arguments.replicas):
        end_by_signals()
        with deployed(settings, arguments.host, arguments.port, arguments.replicas) as about:
            print(welcome(about, arguments.host, arguments.port, guarded=bool(keys)), flush=True)
            wait_for_the_end()


def checked_plan(source: str, model: str) -> BudgetPlan | None:
    """The plan that `source` names, if it fits the model; None for the full cache."""
    from serve_app.plans import resolve

    plan = None if source == "full" else resolve(source)
    from baklava.eviction import eviction_of
    from baklava.model import describe

    identity, geometry = describe(model)
    if plan:
        plan.check_fits(identity, geometry)
        eviction_of(plan.eviction)
    return plan


def welcome(about: dict[str, Any], host: str, port: int, *, guarded: bool) -> str:
    """What is served where, and how to ask it something."""
    plan, model = about["plan"], about["model"]["id"]
    tokens = plan["context_length"]
    held, full = plan["bytes_per_sequence"] / MEBIBYTE, plan["full_bytes_per_sequence"] / MEBIBYTE
    base = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    key = '-H "Authorization: Bearer $KEY" ' if guarded else ""
    body = f'{{"model": "{model}", "messages": [{{"role": "user", "content": "Hello!"}}], "stream": true}}'
    return f"""
baklava listens on {base}
  model        {model}, up to {about["model"]["max_model_len"]:,} tokens
  plan         {plan["digest"]}, {plan["eviction"]["method"]} eviction
  memory       {held:,.1f} MiB per sequence; the full cache of {tokens:,} tokens has {full:,.1f} ({plan["ratio"]:.1%})
  base_url     {base}/v1

curl -N {base}/v1/chat/completions -H "Content-Type: application/json" {key}\\
  -d '{body}'
"""


def end_by_signals() -> None:
    """Make SIGTERM end the server as Ctrl-C does. Ray sets handlers of its own when it starts, so this comes after."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)


def wait_for_the_end() -> None:
    """Wait for Ctrl-C or SIGTERM."""
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        say("stopping: requests under way may end")


def _port(text: str) -> int:
    if not text.isdecimal() or not 0 < int(text) < 65536:
        raise argparse.ArgumentTypeError(f"{text} is no port; give a number from 1 to 65535")
    return int(text)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is no number of replicas; give 1 or more")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
