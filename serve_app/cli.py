"""Serve a model under a budget plan over HTTP, for OpenAI's clients."""

import argparse
import contextlib
import gc
import os
import queue
import signal
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from baklava.console import PREFILL_CHUNK_HELP, log, port, positive_float, positive_int, run_cli
from baklava.errors import UserError
from baklava.plan.budget_plan import BudgetPlan
from baklava.plan.registry import load_plan
from baklava.runtime.cpu_threads import configure_threads
from baklava.runtime.dtypes import DTYPES
from baklava.runtime.ray_session import configure_ray_environment
from serve_app.api.network import (
    PROXY_MIDDLEWARE_PATH,
    PROXY_MIDDLEWARE_VARIABLE,
    ApiKeys,
    check_listen_address,
    read_api_keys,
)
from serve_app.engine.chunk_size import DEFAULT_MAX_BATCHED_TOKENS, DEFAULT_PREFILL_DECODE_RATIO

EXAMPLES = """A plan is a plan.json, models:/NAME@ALIAS or models:/NAME/VERSION in MLflow's registry, `full` to keep
every entry, or METHOD[+EVICTION][@BITS]:BUDGET as in `baklava-evaluate --help`; some methods profile the model first.

examples:
  baklava-serve --plan runs/my-search/plan.json --model demo
  baklava-serve --plan models:/baklava-demo@champion --model demo --port 8080 --pool 2GiB
  baklava-serve --plan full --model HuggingFaceTB/SmolLM2-360M-Instruct
  baklava-serve --plan baklava+heavy_hitter:0.3 --model HuggingFaceTB/SmolLM2-360M-Instruct
  baklava-serve --plan plan.json --model demo --pinned-prefix system-prompt.txt --replicas 2 --autoscale 4
  BAKLAVA_API_KEYS=secret1,secret2 baklava-serve --plan plan.json --model demo --host 0.0.0.0

Requests without a temperature are sampled at 1.0, as with OpenAI; give 0 for greedy decoding.
SIGHUP reads --plan again, a file or an alias of the registry, and swaps it in: running requests end under the old one.
Ctrl-C, SIGTERM or the end of its terminal ends the server after its running requests; a second one ends it at once.
jobs/serve.py is the same command as a script."""

# The windows that `baklava-evaluate` profiles on by default; its budgets hold at the length of one.
PROFILE_CONTEXT_TOKENS = 3072
PROFILE_CONTINUATION_TOKENS = 512

MEBIBYTE = 2**20


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="baklava-serve",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--plan", required=True, help="what bounds every KV cache, see below")
    add("--model", required=True, metavar="demo|DIR|HUB_ID", help="the model to serve")
    add(
        "--dtype",
        choices=DTYPES,
        default="auto",
        help="precision of the model's products (default: auto, the checkpoint's on a GPU, the fastest on a CPU)",
    )
    add("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    add("--port", type=port, default=8000, help="port to listen on (default: 8000)")
    add(
        "--pool",
        default="50%",
        metavar="SIZE",
        help="memory for KV caches: bytes per replica such as 2GiB, or a share of the memory that is free on a device, "
        "divided between its replicas (default: 50%%)",
    )
    add(
        "--max-waiting",
        type=positive_int,
        default=64,
        metavar="N",
        help="requests that may wait in a replica's queue (default: 64)",
    )
    add(
        "--prefill-decode-ratio",
        type=positive_float,
        default=DEFAULT_PREFILL_DECODE_RATIO,
        metavar="X",
        help="time that a prompt adds to a step, relative to its decode batch: a higher one admits prompts sooner, a "
        "lower one delays running requests less (default: %(default)s)",
    )
    add(
        "--tpot-target",
        type=positive_float,
        metavar="SECONDS",
        help="time that a step which also decodes may take, instead of the ratio; a prompt goes on with what is left "
        "of it (default: as the ratio says)",
    )
    add(
        "--max-batched-tokens",
        type=positive_int,
        default=DEFAULT_MAX_BATCHED_TOKENS,
        metavar="TOKENS",
        help="most prompt tokens of a step that also decodes (default: %(default)s)",
    )
    add("--prefill-chunk", type=positive_int, metavar="TOKENS", help=PREFILL_CHUNK_HELP)
    add(
        "--prefix-caching",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="let a prompt continue the cache of an earlier one that begins as it does; only plans that prefill in "
        "chunks do (default: yes)",
    )
    add("--replicas", type=positive_int, default=1, metavar="N", help="copies of the model (default: 1)")
    add(
        "--autoscale",
        type=positive_int,
        metavar="N",
        help="add replicas, up to N in all, while the pools are nearly full",
    )
    add(
        "--timeout",
        type=positive_int,
        default=600,
        metavar="SECONDS",
        help="limit of a request, its wait included (default: 600)",
    )
    add(
        "--pinned-prefix",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="start of many prompts, kept in the prefix cache: a system prompt as text, or messages as .json; repeat "
        "for several",
    )
    add(
        "--calibration",
        nargs="+",
        default=["botocore"],
        metavar="NAME|FILE",
        help="texts METHOD:BUDGET profiles on (default: botocore)",
    )
    add(
        "--api-keys",
        type=Path,
        metavar="FILE",
        help="file with one accepted API key per line; or set BAKLAVA_API_KEYS to keys with commas between them",
    )
    add(
        "--admin-keys",
        type=Path,
        metavar="FILE",
        help="the same for keys that may also change the plan; or set BAKLAVA_ADMIN_KEYS",
    )
    add("--logs", metavar="DIR", help="write logs there, with a JSON line per request, without prompts and answers")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    options = build_parser().parse_args(argv)
    configure_ray_environment()
    configure_threads()
    os.environ.setdefault(PROXY_MIDDLEWARE_VARIABLE, PROXY_MIDDLEWARE_PATH)
    return run_cli("baklava-serve", lambda: _serve(options))


def _serve(options: argparse.Namespace) -> None:
    """Check what can be checked in a moment, start the server, and wait for its end."""
    hangups = _queue_hangups()
    keys = ApiKeys.from_keys(read_api_keys(options.api_keys), read_api_keys(options.admin_keys, "admin"))
    check_listen_address(options.host, options.port, has_keys=keys.required)
    # Imported here, since it takes seconds and --help should not.
    from serve_app.engine.memory import PoolSize
    from serve_app.openai.tokenization import PinnedPrefix

    pool = PoolSize.parse(options.pool)
    prefixes = tuple(PinnedPrefix.read(path) for path in options.pinned_prefix)
    plan = load_served_plan(options.plan, options.model, options.calibration, options.prefill_chunk)
    from serve_app.deployment.app import ScalingConfig, run_server, serving_session
    from serve_app.deployment.replica import ReplicaConfig

    max_replicas = max(options.replicas, options.autoscale or 0)
    config = ReplicaConfig(
        model=options.model,
        dtype=options.dtype,
        plan=plan,
        created=int(time.time()),
        pool=pool,
        max_waiting=options.max_waiting,
        pinned_prefixes=prefixes,
        keys=keys,
        timeout_seconds=float(options.timeout),
        host=options.host,
        prefill_decode_ratio=options.prefill_decode_ratio,
        tpot_target=options.tpot_target,
        max_batched_tokens=options.max_batched_tokens,
        prefix_caching=options.prefix_caching,
    )
    scaling = ScalingConfig(
        options.replicas, max_replicas, str(Path(options.logs).absolute()) if options.logs else None
    )
    log(f"starting {options.replicas} replica(s) of {options.model}")
    with (
        serving_session(max_replicas, quiet=scaling.log_dir is not None),
        run_server(config, options.host, options.port, scaling) as server,
    ):
        print(welcome(server.description, options.host, options.port, needs_key=keys.required), flush=True)
        if plan and (warning := plan.length_warning(server.description["model"]["max_model_len"])):
            log(f"{warning}; for longer texts, search with --context")
        _wait_for_end(hangups, lambda: reload_plan(options, server.group))


def load_served_plan(
    source: str, model: str, calibration: Sequence[str], prefill_chunk: int | None = None
) -> BudgetPlan | None:
    """Return the plan that `--plan` names, if it fits the model; None for the full cache.

    With a `prefill_chunk`, it processes prompts in chunks of so many tokens, whatever the plan says.

    Raises:
        UserError: there is no such plan or model, the plan is invalid, or it was made for another model.
    """
    from baklava.allocation.plan_spec import is_plan_spec, parse_spec
    from baklava.eviction import build_eviction
    from baklava.runtime.model_loader import load_config

    if source == "full":
        if prefill_chunk is not None:
            raise UserError(f"--prefill-chunk {prefill_chunk} compresses, and --plan full does not; leave one out")
        load_config(model)  # raises if there is no such model, before Ray starts
        return None
    if is_plan_spec(source):
        parse_spec(source)  # raises if it is misspelt, before the weights are read
        return _allocate(source, model, calibration).with_prefill_chunk(prefill_chunk)
    plan = load_plan(source).with_prefill_chunk(prefill_chunk)
    plan.validate_for(*load_config(model))
    build_eviction(plan.eviction)
    return plan


def _allocate(spec: str, model: str, calibration: Sequence[str]) -> BudgetPlan:
    import torch

    from baklava.allocation.plan_spec import resolve_plan
    from baklava.data.documents import load_documents
    from baklava.data.windows import make_splits
    from baklava.profiling.profile import Profile
    from baklava.profiling.profiler import cached_profile
    from baklava.runtime.model_loader import load

    log(f"making plan {spec} for {model}")
    loaded = load(model)
    tokens = min(PROFILE_CONTEXT_TOKENS + PROFILE_CONTINUATION_TOKENS, loaded.max_length)
    continuation = min(PROFILE_CONTINUATION_TOKENS, tokens // 7)

    def load_profile() -> Profile:
        log(f"profiling {model} on {', '.join(calibration)}, since {spec} needs it")
        documents = load_documents(calibration)
        splits = make_splits(
            documents, loaded.tokenizer, context=tokens - continuation, continuation=continuation, seed=0
        )
        return cached_profile(loaded, splits.calibration)

    plan = resolve_plan(spec, loaded, tokens, load_profile).plan
    # The replicas size their pools by the memory that is free.
    uses_cuda = loaded.device.type == "cuda"
    del loaded
    gc.collect()
    if uses_cuda:
        torch.cuda.empty_cache()
    return plan


def reload_plan(options: argparse.Namespace, group: Any) -> None:
    """Read the plan again, send it to the replicas and log the result; if it is invalid, the server goes on."""
    from baklava.allocation.plan_spec import is_plan_spec
    from serve_app.replication.replica_sync import rollout_plan

    if options.plan == "full" or is_plan_spec(options.plan):
        log(f"the plan stays as it is: --plan {options.plan} has nothing to read again")
        return
    try:
        plan = load_served_plan(options.plan, options.model, options.calibration, options.prefill_chunk)
    except UserError as error:
        log(f"the plan stays as it is: {error}")
    else:
        assert plan is not None  # --plan is a file or a registry address
        log(rollout_plan(group, plan))


def welcome(description: dict[str, Any], host: str, port: int, *, needs_key: bool) -> str:
    """Return what is served where, how many sequences fit, and how to send a request."""
    plan, model = description["plan"], description["model"]["id"]
    tokens = plan["context_length"]
    per_sequence, full = plan["bytes_per_sequence"] / MEBIBYTE, plan["full_bytes_per_sequence"] / MEBIBYTE
    if host in ("0.0.0.0", "::"):  # any address of this machine
        host = _reachable_name()
    base = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    key = '-H "Authorization: Bearer $KEY" ' if needs_key else ""
    body = f'{{"model": "{model}", "messages": [{{"role": "user", "content": "Hello!"}}], "stream": true}}'
    return f"""
baklava listens on {base}
  model        {model}, in {description["model"]["dtype"]}, up to {description["model"]["max_model_len"]:,} tokens
  plan         {plan["digest"]}, {plan["eviction"]["method"]} eviction
  memory       {per_sequence:,.1f} MiB per sequence; full cache of {tokens:,} tokens {full:,.1f} ({plan["ratio"]:.1%})
  pool         {description["pool_bytes"] / MEBIBYTE:,.0f} MiB of KV caches per replica
{format_capacity(description["capacity"])}
  base_url     {base}/v1
  status page  {base}/

curl -N {base}/v1/chat/completions -H "Content-Type: application/json" {key}\\
  -d '{body}'
"""


def _reachable_name() -> str:
    """Return a name of this machine that it finds itself."""
    try:
        socket.getaddrinfo(name := socket.gethostname(), None)
    except OSError:
        return "127.0.0.1"
    return name


def format_capacity(rows: Sequence[tuple[int, int, int]]) -> str:
    """Format how many sequences fit into the pool by their length, with the full cache and under the plan."""
    labels = ("tokens per sequence", "sequences, full cache", "sequences, this plan")
    columns = zip(*rows, strict=True)
    return "\n".join(
        f"  {label:<22}" + "".join(f"{number:>9,}" for number in numbers)
        for label, numbers in zip(labels, columns, strict=True)
    )


def _queue_hangups() -> "queue.SimpleQueue[bool]":
    """Return the queue of SIGHUPs from now on, each with whether it came since the server's terminal has closed.

    A server that `nohup` started does not end with its terminal.
    """
    hangups: queue.SimpleQueue[bool] = queue.SimpleQueue()
    needs_terminal = _has_terminal() and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN
    signal.signal(signal.SIGHUP, lambda *_: hangups.put(needs_terminal and not _has_terminal()))
    # A shell that starts the server in the background has it ignore Ctrl-C, and `kill -INT` should end it all the same.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    return hangups


def _has_terminal() -> bool:
    """Return whether this process has a controlling terminal."""
    try:
        os.close(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY))
    except OSError:
        return False
    return True


def _wait_for_end(hangups: "queue.SimpleQueue[bool]", on_hangup: Callable[[], None]) -> None:
    """Wait for Ctrl-C, SIGTERM or the end of the terminal; handle other SIGHUPs until then."""
    with contextlib.suppress(KeyboardInterrupt):
        while not hangups.get():
            on_hangup()
    log("stopping: waiting for running requests; a second signal stops at once")
