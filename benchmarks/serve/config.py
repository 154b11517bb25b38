"""Sizes of the serving benchmark."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ServeBenchmarkConfig:
    """What is served, and under which load.

    Attributes:
        other_plans: plans of the same size, of which only a decode step is timed.
        prompt_tokens: tokens of a prompt, except in the open loop.
        prompt_token_range: shortest and longest prompt of the open loop.
        output_tokens: generated per request.
        concurrency: clients of the closed loop; each sends its next request when the last one is answered.
        closed_loop_requests: requests of a closed loop.
        closed_loop_seconds: after which a closed loop ends, finished or not.
        open_loop_requests: requests of an open loop, which come at random times.
        open_loop_rates: requests per second of open loops, as multiples of what the plan served in the closed loop.
        pool_bytes: KV pool into which as many sequences as possible are packed.
        load_pool_bytes: KV pool of servers under load, in which all clients' sequences run together even with the
            full cache, together with a pinned prefix.
        contexts: sequence lengths for the capacity of the pool.
        batch_size: sequences that decode together in the engine's timed steps.
        decode_steps: timed steps of the engine.
        long_prompt_tokens: tokens of the prompt that is prefilled alongside a decoding sequence.
        max_ttft: seconds to the first token that a request may take to count towards goodput.
        max_tpot: seconds per token after the first that it may take.
        threads: torch's threads in each server.
    """

    model: str = "demo"
    plan: str = "plans/demo-12.5-16bit.json"
    texts: str = "botocore"
    other_plans: tuple[str, ...] = ("plans/demo-12.5.json",)
    prompt_tokens: int = 4096
    prompt_token_range: tuple[int, int] = (2048, 6144)
    output_tokens: int = 64
    concurrency: int = 8
    closed_loop_requests: int = 8
    closed_loop_seconds: float = 360.0
    open_loop_requests: int = 8
    open_loop_rates: tuple[float, ...] = (0.8,)
    pool_bytes: int = 640 << 20
    load_pool_bytes: int = 1200 << 20
    contexts: tuple[int, ...] = (1024, 2048, 4096, 8192)
    batch_size: int = 8
    decode_steps: int = 64
    long_prompt_tokens: int = 6144
    max_ttft: float = 60.0
    max_tpot: float = 1.0
    seed: int = 0
    threads: int = 2


def quick_config(
    model: str = "demo", plan: str = ServeBenchmarkConfig.plan, texts: str = "botocore"
) -> ServeBenchmarkConfig:
    """Return sizes that show that the benchmark runs; their results mean nothing."""
    return ServeBenchmarkConfig(
        model,
        plan,
        texts,
        other_plans=(),
        prompt_tokens=256,
        prompt_token_range=(128, 384),
        output_tokens=8,
        concurrency=2,
        closed_loop_requests=4,
        open_loop_requests=4,
        open_loop_rates=(0.5,),
        pool_bytes=256 << 20,
        load_pool_bytes=256 << 20,
        contexts=(1024, 2048),
        batch_size=2,
        decode_steps=6,
        long_prompt_tokens=512,
    )
