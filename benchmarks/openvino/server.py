"""Serve an exported model with OpenVINO GenAI's continuous batching over HTTP, as the load generator asks for it.

POST /v1/completions streams a greedy completion of a text, or of token ids, in OpenAI's format. GET /health answers
once the model is loaded.

Example:
  benchmarks/openvino/.venv/bin/python -m benchmarks.openvino.server --model path/to/exported --port 8001
"""

import argparse
import json
import multiprocessing
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from benchmarks.openvino.engine import (
    BLOCK_TOKENS,
    FINISHED,
    PRECISIONS,
    EngineConfig,
    EngineOutput,
    EngineRequest,
    run_engine,
)


class RequestError(ValueError):
    """What is wrong with a request, for its client."""


class EngineClient:
    """Sends requests to the engine, and gives each of them its outputs."""

    def __init__(self, connection: "Connection[Any, Any]") -> None:
        self._connection = connection
        self._lock = threading.Lock()
        self._request_ids = count()
        self._outputs: dict[int, SimpleQueue[EngineOutput]] = {}

    def submit(self, prompt_ids: list[int], max_tokens: int) -> Iterator[EngineOutput]:
        """Send a request from any thread; yield its outputs."""
        outputs: SimpleQueue[EngineOutput] = SimpleQueue()
        with self._lock:
            request_id = next(self._request_ids)
            self._outputs[request_id] = outputs
            self._connection.send(EngineRequest(request_id, prompt_ids, max_tokens))
        return self._until_finished(outputs)

    def _until_finished(self, outputs: "SimpleQueue[EngineOutput]") -> Iterator[EngineOutput]:
        while True:
            output = outputs.get()
            yield output
            if output.finish_reason:
                return

    def distribute_outputs(self) -> None:
        """Distribute outputs forever.

        Raises:
            EOFError: the engine has ended.
        """
        while True:
            for output in self._connection.recv():
                take = self._outputs.pop if output.finish_reason else self._outputs.__getitem__
                take(output.request_id).put(output)


def make_handler(client: EngineClient, tokenizer: Any) -> type[BaseHTTPRequestHandler]:
    """Return the handler of a connection, which takes one request."""

    class Handler(BaseHTTPRequestHandler):
        disable_nagle_algorithm = True  # a token must not wait until the one before is acknowledged

        def do_GET(self) -> None:
            self._answer(200 if self.path == "/health" else 404, {})

        def do_POST(self) -> None:
            if self.path != "/v1/completions":
                return self._answer(404, {})
            try:
                prompt_ids, max_tokens = parse_request(self.rfile.read(int(self.headers["Content-Length"])), tokenizer)
            except RequestError as error:
                return self._answer(400, {"error": {"message": str(error)}})
            outputs = client.submit(prompt_ids, max_tokens)
            self._start(200, "text/event-stream")
            for event in stream_events(outputs, tokenizer):
                self.wfile.write(b"data: " + event.encode() + b"\n\n")

        def _answer(self, status: int, content: dict[str, Any]) -> None:
            self._start(status, "application/json")
            self.wfile.write(json.dumps(content).encode())

        def _start(self, status: int, media_type: str) -> None:
            self.send_response(status)
            self.send_header("Content-Type", media_type)
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            """Log nothing, so that the last lines of the log are those of an error."""

    return Handler


def parse_request(body: bytes, tokenizer: Any) -> tuple[list[int], int]:
    """Return the token ids of the prompt, and the number of tokens to generate.

    Raises:
        RequestError: the body is no request, or asks for what this server does not do.
    """
    try:
        content = json.loads(body)
        prompt, max_tokens = content["prompt"], int(content["max_tokens"])
        is_greedy_stream = content["stream"] is True and content["temperature"] == 0
    except (ValueError, KeyError, TypeError) as error:
        raise RequestError(f"not a request for a completion ({type(error).__name__}: {error})") from None
    if not is_greedy_stream:
        raise RequestError("only streams at temperature 0 are served; set stream to true and temperature to 0")
    ids = tokenizer.encode(prompt).ids if isinstance(prompt, str) else prompt
    if not isinstance(ids, list) or not ids or not all(type(token) is int for token in ids):
        raise RequestError("a prompt is a text or a list of token ids, and not empty")
    return ids, max_tokens


def stream_events(outputs: Iterator[EngineOutput], tokenizer: Any) -> Iterator[str]:
    """Yield the data of an event for each token that completes a text, and then the end of the stream."""
    from tokenizers.decoders import DecodeStream

    decoder = DecodeStream(skip_special_tokens=True)
    for output in outputs:
        for token in output.token_ids:
            if text := decoder.step(tokenizer, token):
                yield json.dumps({"choices": [{"index": 0, "text": text}]})
        if output.finish_reason not in (None, FINISHED):
            yield json.dumps({"error": {"message": f"the sequence was {output.finish_reason}"}})
    yield "[DONE]"


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.openvino.server",
        description=(__doc__ or "").split("\n\n")[0],
        epilog=(__doc__ or "").partition("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", type=Path, required=True, help="folder of a model that benchmarks.openvino.export wrote")
    add("--port", type=int, required=True, help="port on 127.0.0.1")
    add("--dtype", choices=tuple(PRECISIONS), default="float32", help="precision of products and cache (float32)")
    add("--threads", type=int, default=2, help="threads of the inference (default: 2)")
    add("--sequences", type=int, default=8, help="sequences that the KV pool holds (default: 8)")
    add("--max-tokens", type=int, default=4224, help="tokens of each of them, prompt and answer (default: 4224)")
    add("--kept-tokens", type=int, metavar="N", help="tokens that eviction leaves of each (default: no eviction)")
    args = parser.parse_args(argv)
    if args.kept_tokens is not None and (args.kept_tokens % BLOCK_TOKENS or args.kept_tokens < 3 * BLOCK_TOKENS):
        parser.error(
            f"--kept-tokens {args.kept_tokens} is not a multiple of {BLOCK_TOKENS}, the tokens of a block, from "
            f"{3 * BLOCK_TOKENS} on; try {16 * BLOCK_TOKENS}"
        )
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Serve until the process is ended, or the engine has ended."""
    args = parse_args(argv)
    from tokenizers import Tokenizer

    signal.signal(signal.SIGTERM, lambda *_: sys.exit())  # an exit ends the engine as well
    config = EngineConfig(
        args.model, args.dtype, args.threads, args.sequences, args.max_tokens, kept_tokens=args.kept_tokens
    )
    context = multiprocessing.get_context("spawn")
    connection, engine_connection = context.Pipe()
    context.Process(target=run_engine, args=(config, engine_connection), daemon=True).start()
    engine_connection.close()  # the engine's copy is the last one, so its end is the end of the connection
    try:
        connection.recv()
        client = EngineClient(connection)
        handler = make_handler(client, Tokenizer.from_file(str(args.model / "tokenizer.json")))
        server = ThreadingHTTPServer(("127.0.0.1", args.port), handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        client.distribute_outputs()
    except EOFError:
        sys.exit(1)  # the engine has written what happened


if __name__ == "__main__":
    main()
