"""Run the serving benchmark, one part after the other."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from baklava.console import log
from baklava.errors import UserError
from baklava.evaluation.speed import machine_info
from baklava.plan.budget_plan import BudgetPlan, full_cache_plan
from baklava.runtime.cpu_threads import run_on_ending_thread
from baklava.runtime.model_loader import LoadedModel, load
from benchmarks.serve.engine_overhead import (
    concurrent_sequences,
    decode_alongside_prefill,
    engine_overhead,
    pool_capacity,
)
from benchmarks.serve.load_generator import (
    Prompt,
    PromptSampler,
    failed_load,
    run_closed_loop,
    run_open_loop,
    summarize,
)
from benchmarks.serve.prefix_caching import measure_prefix_caching
from benchmarks.serve.servers import (
    FULL,
    OURS,
    PEERS,
    PLAN,
    TRANSFORMERS,
    RunningServer,
    ServeBenchmarkConfig,
    last_lines,
    running_server,
)

PARTS = (
    "pool_capacity",
    "concurrent_sequences",
    "engine_overhead",
    "decode_alongside_prefill",
    "pinned_prefix",
    "prefix_caching",
    "closed_loop",
    "open_loop",
)
"""The engine by itself (the first four), then servers over HTTP under four kinds of load."""

TOKEN_TIMEOUT_SECONDS = 3600.0
"""How long a client waits for the next token."""


def run_benchmark(config: ServeBenchmarkConfig, parts: Sequence[str] = PARTS) -> dict[str, Any]:
    """Return the results of these parts; the open loop includes the closed one, from which it takes its rate.

    Raises:
        UserError: a part is unknown, the plan is for another model, or one of our servers does not start.
    """
    if unknown := [part for part in parts if part not in PARTS]:
        raise UserError(f"--parts {unknown[0]}: no such part; choose among {', '.join(PARTS)}")
    loaded = run_on_ending_thread(lambda: load(config.model, dtype=config.dtype, threads=config.threads))
    config = replace(config, dtype=loaded.dtype)
    plan = _read_plan(loaded, config.plan)
    if config.prefill_chunk:
        plan = plan.with_prefill_chunk(config.prefill_chunk)
    results: dict[str, Any] = {
        "benchmark": "serve",
        "config": asdict(config),
        "machine": machine_info(),
        "ratio": plan.ratio,
    }
    results |= _measure_engine(loaded, plan, config, parts)
    if "pinned_prefix" in parts:
        results["pinned_prefix"] = _measure_pinned_prefix(_sampler(loaded, config), config)
    if "prefix_caching" in parts:
        results["prefix_caching"] = measure_prefix_caching(_sampler(loaded, config), plan, config)
    if {"closed_loop", "open_loop"} & set(parts):
        sampler = _sampler(loaded, config)
        prompts = [sampler.sample(config.prompt_tokens) for _ in range(config.closed_loop_requests)]
        warmup = [sampler.sample(min(64, config.prompt_tokens))]
        closed_loop = measure_closed_loops(config, warmup, prompts)
        results["closed_loop"] = closed_loop
        if "open_loop" in parts:
            results["open_loop"] = _measure_open_loop(sampler, config, closed_loop, warmup)
    return results


def _sampler(loaded: LoadedModel, config: ServeBenchmarkConfig) -> PromptSampler:
    return PromptSampler(loaded, config.texts, config.seed)


def _read_plan(loaded: LoadedModel, path: str) -> BudgetPlan:
    plan = BudgetPlan.read(path)
    loaded.check_plan(plan)
    return plan


def _measure_engine(
    loaded: LoadedModel, plan: BudgetPlan, config: ServeBenchmarkConfig, parts: Sequence[str]
) -> dict[str, Any]:
    """Run the parts without HTTP."""
    full = full_cache_plan(loaded.identity, loaded.geometry, loaded.max_length)
    plans = {PLAN: plan, FULL: full}
    other_plans = {Path(path).name: _read_plan(loaded, path) for path in config.other_plans}
    sampler = _sampler(loaded, config)
    results: dict[str, Any] = {}

    def sample_ids(num_tokens: int) -> list[int]:
        return loaded.tokenizer.encode(sampler.sample(num_tokens).text, verbose=False)[:num_tokens]

    if "pool_capacity" in parts:
        results["pool_capacity"] = pool_capacity(loaded, plan, full, config)
    if "concurrent_sequences" in parts:
        results["concurrent_sequences"] = {}
        for name, candidate in plans.items():
            log(f"concurrent sequences: {name}")
            prompt = sample_ids(config.prompt_tokens)
            results["concurrent_sequences"][name] = concurrent_sequences(loaded, candidate, config, prompt)
    if "engine_overhead" in parts:
        results["engine_overhead"] = {}
        for name, candidate in (plans | other_plans).items():
            log(f"engine overhead: {name}")
            prompt = sample_ids(config.prompt_tokens)
            results["engine_overhead"][name] = engine_overhead(loaded, candidate, config, prompt)
    if "decode_alongside_prefill" in parts:
        results["decode_alongside_prefill"] = {}
        for name, candidate in plans.items():
            log(f"decode alongside prefill: {name}")
            prompt, long_prompt = sample_ids(config.prompt_tokens), sample_ids(config.long_prompt_tokens)
            results["decode_alongside_prefill"][name] = decode_alongside_prefill(
                loaded, candidate, config, prompt, long_prompt
            )
    return results


def _measure_pinned_prefix(sampler: PromptSampler, config: ServeBenchmarkConfig) -> dict[str, Any]:
    """Send requests that share a pinned prefix and differ at their end, so that all of them decode together."""
    prefix = sampler.sample(config.prompt_tokens)
    text = prefix.text.rstrip()  # a word after a space starts a token of its own
    prompts = [Prompt(f"{text} Item {index} is", prefix.num_tokens) for index in range(config.concurrency)]
    results: dict[str, Any] = {}
    for name in (PLAN, FULL):
        with running_server(name, config, text) as server:
            log(f"pinned prefix: {name}")
            # The first answer shows that the prefix is in the cache.
            run_closed_loop(server.address, server.model, prompts[:1], 2, 1, TOKEN_TIMEOUT_SECONDS)
            results[name] = _measure_closed_loop(server, config, prompts[:1], prompts)
    return results


def measure_closed_loops(
    config: ServeBenchmarkConfig, warmup: Sequence[Prompt], prompts: Sequence[Prompt]
) -> dict[str, Any]:
    """Send all servers the same prompts, one server after the other; a peer that does not start has failed.

    For our plan, `prompts_per_second` is the rate with one token after each prompt: no load can be answered faster.

    Raises:
        UserError: one of our servers does not start.
    """
    results: dict[str, Any] = {}
    for name in (*OURS, *PEERS):
        log(f"closed loop: {name}")
        try:
            with running_server(name, config) as server:
                results[name] = _measure_closed_loop(server, config, warmup, prompts)
                if name == PLAN:
                    alone = run_closed_loop(
                        server.address, server.model, prompts, 1, config.concurrency, TOKEN_TIMEOUT_SECONDS
                    )
                    answered = sum(request.status == 200 and bool(request.token_times) for request in alone.requests)
                    results[name]["prompts_per_second"] = answered / alone.seconds
        except UserError as error:
            if name not in PEERS:
                raise
            log(f"failed: {error}")
            results[name] = failed_load(str(error), len(prompts))
    return results


def _measure_closed_loop(
    server: RunningServer, config: ServeBenchmarkConfig, warmup: Sequence[Prompt], prompts: Sequence[Prompt]
) -> dict[str, Any]:
    run_closed_loop(server.address, server.model, warmup, 4, 1, TOKEN_TIMEOUT_SECONDS)
    rss_before = server.rss_bytes
    load_result = run_closed_loop(
        server.address,
        server.model,
        prompts,
        config.output_tokens,
        config.concurrency,
        TOKEN_TIMEOUT_SECONDS,
        config.closed_loop_seconds,
    )
    summary = summarize(load_result, config.max_ttft, config.max_tpot)
    if server.has_ended:
        summary["error"] = f"the server ended: {last_lines(server.log_file)}"
    elif not summary["completed"]:
        summary["error"] = f"no answer was complete after {load_result.seconds:.0f} s"
    return summary | {"rss_bytes_before": rss_before, "rss_bytes_after": server.rss_bytes}


def _measure_open_loop(
    sampler: PromptSampler, config: ServeBenchmarkConfig, closed_loop: dict[str, Any], warmup: Sequence[Prompt]
) -> list[dict[str, Any]]:
    """Send every server that did not fail in the closed loop the same prompts at the same times."""
    prompts = [sampler.sample_between(*config.prompt_token_range) for _ in range(config.open_loop_requests)]
    rows = []
    servers = (PLAN, FULL, TRANSFORMERS)  # with continuous batching, transformers would take an hour
    for name in (name for name in servers if "error" not in closed_loop[name]):
        with running_server(name, config) as server:
            run_closed_loop(server.address, server.model, warmup, 4, 1, TOKEN_TIMEOUT_SECONDS)
            for multiple in config.open_loop_rates:
                log(f"open loop at {multiple:g} of the plan's rate in the closed loop: {name}")
                rate = multiple * closed_loop[PLAN]["requests_per_second"]
                load_result = run_open_loop(
                    server.address,
                    server.model,
                    prompts,
                    config.output_tokens,
                    rate,
                    config.seed,
                    TOKEN_TIMEOUT_SECONDS,
                )
                summary = summarize(load_result, config.max_ttft, config.max_tpot)
                rows.append({"server": name, "multiple_of_closed_loop": multiple, "rate": rate} | summary)
    return rows
