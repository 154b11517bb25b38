"""A process that steps OpenVINO GenAI's continuous batching: requests come and tokens go through a connection.

`step()` holds Python's global lock, so the HTTP server runs in another process, or tokens would wait for it.
"""

from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

BLOCK_TOKENS = 32
"""Tokens of a KV block on the CPU."""

MAX_RECENT_TOKENS = 128

PRECISIONS = {"float32": "f32", "bfloat16": "bf16"}
"""OpenVINO's names of the precisions."""

FINISHED = "finished"


@dataclass(frozen=True)
class EngineConfig:
    """What the pipeline loads, and how it runs.

    Attributes:
        model: folder of an exported model.
        dtype: precision of the products and of the KV cache.
        sequences: sequences that the KV pool holds.
        max_tokens: tokens of each of them, prompt and answer.
        kept_tokens: tokens that eviction leaves of each; None for no eviction.
    """

    model: Path
    dtype: str
    threads: int
    sequences: int
    max_tokens: int
    kept_tokens: int | None


@dataclass(frozen=True)
class EngineRequest:
    """A prompt to continue greedily."""

    request_id: int
    prompt_ids: list[int]
    max_tokens: int


@dataclass(frozen=True)
class EngineOutput:
    """Tokens of a step, and "finished" or another status once there will be no more."""

    request_id: int
    token_ids: list[int]
    finish_reason: str | None


def run_engine(config: EngineConfig, connection: "Connection[Any, Any]") -> None:
    """Load the pipeline, say so by sending None, and step until the other end of the connection is closed."""
    engine = Engine(load_pipeline(config), connection)
    connection.send(None)
    try:
        while True:
            engine.step()
    except (EOFError, BrokenPipeError):
        pass


class Engine:
    """Steps a pipeline for the requests that come through a connection."""

    def __init__(self, pipeline: Any, connection: "Connection[Any, Any]") -> None:
        self._pipeline = pipeline
        self._connection = connection
        self._running: dict[int, Any] = {}

    def step(self) -> None:
        """Wait for a request if there is none, step all of them once, and send their tokens."""
        while not self._running or self._connection.poll():
            request: EngineRequest = self._connection.recv()
            self._running[request.request_id] = self._add_to_pipeline(request)
        self._pipeline.step()
        outputs = [_read_output(request_id, handle) for request_id, handle in self._running.items()]
        for output in outputs:
            if output.finish_reason:
                del self._running[output.request_id]
        self._connection.send(outputs)

    def _add_to_pipeline(self, request: EngineRequest) -> Any:
        import numpy as np
        import openvino

        generation = self._pipeline.get_config()  # has the end tokens of the model
        generation.max_new_tokens = request.max_tokens
        generation.do_sample = False
        prompt = openvino.Tensor(np.array([request.prompt_ids], dtype=np.int64))
        return self._pipeline.add_request(request.request_id, prompt, generation)


def _read_output(request_id: int, handle: Any) -> EngineOutput:
    tokens: list[int] = []
    while handle.can_read():
        for output in handle.read().values():
            tokens += output.generated_ids
    status = handle.get_status().name.lower()  # such as "ignored", if the pool has no room for the sequence
    return EngineOutput(request_id, tokens, None if status == "running" else status)


def load_pipeline(config: EngineConfig) -> Any:
    """Return the pipeline."""
    import openvino_genai as genai

    scheduler = genai.SchedulerConfig()
    scheduler.num_kv_blocks = config.sequences * (config.max_tokens // BLOCK_TOKENS + 2)
    scheduler.enable_prefix_caching = False  # it would keep the blocks of finished sequences
    if config.kept_tokens:
        scheduler.use_cache_eviction = True
        scheduler.cache_eviction_config = genai.CacheEvictionConfig(
            start_size=BLOCK_TOKENS,
            recent_size=recent_tokens(config.kept_tokens),
            max_cache_size=config.kept_tokens,
            aggregation_mode=genai.AggregationMode.NORM_SUM,
        )
    return genai.ContinuousBatchingPipeline(str(config.model), scheduler, "CPU", properties(config))


def properties(config: EngineConfig) -> dict[str, str | int]:
    """Return OpenVINO's properties: nothing is quantized, neither the cache, which is in 8 bits by default."""
    precision = PRECISIONS[config.dtype]
    return {
        "INFERENCE_PRECISION_HINT": precision,
        "KV_CACHE_PRECISION": precision,
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
        "INFERENCE_NUM_THREADS": config.threads,
    }


def recent_tokens(kept_tokens: int) -> int:
    """Return how many of a sequence's kept tokens are its latest: half of them in whole blocks, at most 128."""
    return min(MAX_RECENT_TOKENS, kept_tokens // 2 // BLOCK_TOKENS * BLOCK_TOKENS)
