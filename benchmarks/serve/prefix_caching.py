"""What automatic prefix caching is worth: questions about documents, and the turns of chats, with it and without it."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import httpx

from baklava.console import log
from baklava.plan.budget_plan import BudgetPlan
from baklava.plan.geometry import full_cache_bytes
from benchmarks.serve.load_generator import GAUGE, Prompt, PromptSampler, run_closed_loop, summarize
from benchmarks.serve.servers import PLAN, RunningServer, ServeBenchmarkConfig, running_server

WITH, WITHOUT = "with prefix caching", "without"
DEFAULT_CHUNK_TOKENS = 512
TOKEN_TIMEOUT_SECONDS = 3600.0


def measure_prefix_caching(sampler: PromptSampler, plan: BudgetPlan, config: ServeBenchmarkConfig) -> dict[str, Any]:
    """Send the same prompts to a server with prefix caching and to one without it.

    `first` has the first question about each document and the first turn of each chat, `later` all others.
    """
    chunk_tokens = config.prefill_chunk or min(DEFAULT_CHUNK_TOKENS, config.document_tokens // 2)
    config = replace(config, prefill_chunk=chunk_tokens)
    prompts = {"documents": _questions(sampler, config), "chats": _turns(sampler, config)}
    warmup = [sampler.sample(min(64, config.document_tokens))]
    results: dict[str, Any] = {}
    for name, options in ((WITH, ()), (WITHOUT, ("--no-prefix-caching",))):
        with running_server(PLAN, config, options=options) as server:
            run_closed_loop(server.address, server.model, warmup, 4, 1, TOKEN_TIMEOUT_SECONDS)
            results[name] = {}
            for kind, (first, later) in prompts.items():
                log(f"prefix caching: {kind} {name}")
                before = _cached_bytes(server)
                loads = {"first": _load(server, config, first)}
                cached_bytes = (_cached_bytes(server) - before) / len(first)
                loads["later"] = _load(server, config, later)
                results[name][kind] = loads | {"cached_bytes_per_prompt": cached_bytes}
    full = full_cache_bytes(plan.geometry, config.document_tokens)
    return results | {"full_bytes_per_document": full}


def _questions(sampler: PromptSampler, config: ServeBenchmarkConfig) -> tuple[list[Prompt], list[Prompt]]:
    """Return the first question about each document, and the others, a question about every document at a time."""
    documents = [sampler.sample(config.document_tokens) for _ in range(config.documents)]
    rounds = [
        [_extended(document, f"\n\nQuestion: {sampler.sample(12).text}?\nAnswer:", 20) for document in documents]
        for _ in range(config.questions)
    ]
    return rounds[0], [prompt for questions in rounds[1:] for prompt in questions]


def _turns(sampler: PromptSampler, config: ServeBenchmarkConfig) -> tuple[list[Prompt], list[Prompt]]:
    """Return the first turn of each chat about a document, and the later ones, a turn of every chat at a time.

    The answers in a history are texts of the sampler: a server does not find what it has generated.
    """
    chats, rounds = [sampler.sample(config.document_tokens) for _ in range(config.chats)], []
    for _ in range(config.turns):
        chats = [_extended(chat, f"\n\nUser: {sampler.sample(24).text}\n\nAssistant:", 32) for chat in chats]
        rounds.append(chats)
        chats = [_extended(chat, f" {sampler.sample(64).text}", 64) for chat in chats]
    return rounds[0], [prompt for turns in rounds[1:] for prompt in turns]


def _extended(prompt: Prompt, text: str, num_tokens: int) -> Prompt:
    return Prompt(prompt.text + text, prompt.num_tokens + num_tokens)


def _load(server: RunningServer, config: ServeBenchmarkConfig, prompts: Sequence[Prompt]) -> dict[str, Any]:
    result = run_closed_loop(
        server.address, server.model, prompts, config.answer_tokens, config.clients, TOKEN_TIMEOUT_SECONDS
    )
    return summarize(result, config.max_ttft, config.max_tpot)


def _cached_bytes(server: RunningServer) -> float:
    gauges = dict(GAUGE.findall(httpx.get(f"{server.address}/metrics").text))
    return float(gauges["kv_cached_prompt_bytes"])
