"""Facts about serving with OpenVINO GenAI: every token is streamed at its step, and they are the model's."""

import json
import multiprocessing
import sys
import threading
import time
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import torch
from byte_model import END, byte_tokenizer

from baklava.data.demo_assets import demo_model
from benchmarks.openvino.engine import (
    Engine,
    EngineConfig,
    EngineOutput,
    EngineRequest,
    properties,
    recent_tokens,
    run_engine,
)
from benchmarks.openvino.server import EngineClient, RequestError, make_handler, parse_args, parse_request
from benchmarks.serve.load_generator import Prompt, run_closed_loop, summarize
from benchmarks.serve.servers import OPENVINO, OPENVINO_ENVIRONMENT, quick_config, running_server

TOKENIZER = byte_tokenizer().backend_tokenizer
CONFIG = EngineConfig(Path("model"), "float32", threads=2, sequences=8, max_tokens=100, kept_tokens=None)


class FakeHandle:
    """A sequence that continues a prompt by its own tokens, one a step; without a prompt it is ignored."""

    def __init__(self, prompt: list[int], max_tokens: int) -> None:
        self.waiting, self.readable = prompt[:max_tokens], list[int]()
        self.status = "RUNNING" if prompt[0] else "IGNORED"

    def step(self) -> None:
        if self.status == "RUNNING":
            self.readable.append(self.waiting.pop(0))
            self.status = "RUNNING" if self.waiting else "FINISHED"

    def get_status(self) -> Any:
        return SimpleNamespace(name=self.status)

    def can_read(self) -> bool:
        return bool(self.readable)

    def read(self) -> dict[int, Any]:
        return {0: SimpleNamespace(generated_ids=[self.readable.pop(0)])}


class FakePipeline:
    """Steps its sequences together once there are enough, and ends the engine at a prompt that says so."""

    def __init__(self) -> None:
        self.handles: list[FakeHandle] = []
        self.min_sequences = 1

    def get_config(self) -> Any:
        return SimpleNamespace(eos_token_id=END)

    def add_request(self, request_id: int, prompt: Any, generation: Any) -> FakeHandle:
        assert (generation.eos_token_id, generation.do_sample) == (END, False)
        if prompt[0].tolist() == [END]:
            raise EOFError
        self.handles.append(FakeHandle(prompt[0].tolist(), generation.max_new_tokens))
        return self.handles[-1]

    def step(self) -> None:
        if len(self.handles) < self.min_sequences:
            return time.sleep(0.001)
        for handle in self.handles:
            handle.step()


@pytest.fixture
def pipeline(monkeypatch: pytest.MonkeyPatch) -> FakePipeline:
    monkeypatch.setitem(sys.modules, "openvino", SimpleNamespace(Tensor=lambda array: array))
    return FakePipeline()


@pytest.fixture
def connections() -> Iterator[tuple["Connection[Any, Any]", "Connection[Any, Any]"]]:
    ours, engines = multiprocessing.Pipe()
    with ours, engines:
        yield ours, engines


def test_a_step_takes_all_that_came_and_sends_a_token_of_each(pipeline, connections) -> None:
    ours, engines = connections
    engine = Engine(pipeline, engines)
    for request in (EngineRequest(0, [5, 6, 7], 2), EngineRequest(1, [8], 9), EngineRequest(2, [0], 9)):
        ours.send(request)
    engine.step()
    assert ours.recv() == [EngineOutput(0, [5], None), EngineOutput(1, [8], "finished"), EngineOutput(2, [], "ignored")]
    engine.step()
    assert ours.recv() == [EngineOutput(0, [6], "finished")]
    ours.close()
    with pytest.raises(EOFError):
        engine.step()


def test_nothing_is_quantized_and_the_precision_is_that_of_products_and_cache() -> None:
    bfloat16 = properties(EngineConfig(**vars(CONFIG) | {"dtype": "bfloat16", "threads": 3}))
    assert properties(CONFIG)["INFERENCE_PRECISION_HINT"] == properties(CONFIG)["KV_CACHE_PRECISION"] == "f32"
    assert bfloat16["INFERENCE_PRECISION_HINT"] == bfloat16["KV_CACHE_PRECISION"] == "bf16"
    assert bfloat16["DYNAMIC_QUANTIZATION_GROUP_SIZE"] == 0
    assert bfloat16["INFERENCE_NUM_THREADS"] == 3


@pytest.mark.parametrize("kept", [96, 128, 512, 2048])
def test_eviction_keeps_whole_blocks_and_leaves_some_to_choose(kept: int) -> None:
    assert parse_args(["--model", "m", "--port", "1", "--kept-tokens", str(kept)]).kept_tokens == kept
    recent = recent_tokens(kept)
    assert recent % 32 == 0
    assert 0 < recent <= 128
    assert 32 + recent < kept


@pytest.mark.parametrize("kept", ["0", "64", "500"])
def test_a_number_of_kept_tokens_that_eviction_cannot_keep_is_refused(kept: str, capsys) -> None:
    with pytest.raises(SystemExit):
        parse_args(["--model", "m", "--port", "1", "--kept-tokens", kept])
    assert "is not a multiple of 32" in capsys.readouterr().err


@pytest.fixture
def address(pipeline, connections, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A server in front of an engine in a thread."""
    monkeypatch.setattr("benchmarks.openvino.engine.load_pipeline", lambda config: pipeline)
    ours, engines = connections

    def run() -> None:
        with engines:
            run_engine(CONFIG, engines)

    def distribute_outputs() -> None:
        with pytest.raises(EOFError):
            client.distribute_outputs()

    threads = [threading.Thread(target=run)]
    threads[0].start()
    assert ours.recv() is None
    client = EngineClient(ours)
    server = ThreadingHTTPServer(("127.0.0.1", 0), make_handler(client, TOKENIZER))
    threads += [threading.Thread(target=distribute_outputs), threading.Thread(target=server.serve_forever)]
    for thread in threads[1:]:
        thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()
    client.submit([END], 1)
    for thread in threads:
        thread.join(30)


def test_the_load_generator_sees_every_token_of_requests_that_run_together(pipeline, address) -> None:
    pipeline.min_sequences = 3
    load = run_closed_loop(address, "m", [Prompt("abcdefgh" * 4, 32)] * 6, 12, 3, 30)
    assert [len(request.token_times) for request in load.requests] == [12] * 6
    assert summarize(load, 60, 60)["completed"] == 6


def completion(address: str, **fields: Any) -> tuple[str, list[dict[str, Any]]]:
    """Return the text of a completion, and its events."""
    body = {"max_tokens": 9, "temperature": 0, "stream": True} | fields
    lines = httpx.post(f"{address}/v1/completions", json=body, timeout=300).text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    events = [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]
    return "".join(choice["text"] for event in events for choice in event.get("choices", ())), events


def test_a_prompt_is_a_text_or_its_token_ids(address) -> None:
    assert completion(address, prompt="grüße")[0] == "grüße"
    assert completion(address, prompt=list("grüße".encode()))[0] == "grüße"


def test_a_sequence_that_the_pool_has_no_room_for_ends_with_an_error(address) -> None:
    assert completion(address, prompt=[0])[1] == [{"error": {"message": "the sequence was ignored"}}]


@pytest.mark.parametrize(
    "changed",
    [
        {"prompt": []},
        {"prompt": [1, "2"]},
        {"prompt": None},
        {"stream": False},
        {"temperature": 1},
        {"max_tokens": "x"},
    ],
)
def test_what_the_server_does_not_do_is_refused(changed: dict[str, Any]) -> None:
    body = {"prompt": "abc", "max_tokens": 4, "temperature": 0, "stream": True}
    assert parse_request(json.dumps(body).encode(), TOKENIZER) == (list(b"abc"), 4)
    with pytest.raises(RequestError):
        parse_request(json.dumps(body | changed).encode(), TOKENIZER)


def test_unknown_paths_and_bad_requests_have_a_status(address) -> None:
    assert httpx.get(f"{address}/health").status_code == 200
    assert httpx.get(f"{address}/metrics").status_code == 404
    assert httpx.post(f"{address}/v1/chat/completions", json={}).status_code == 404
    assert httpx.post(f"{address}/v1/completions", json={"prompt": "abc"}).status_code == 400


@pytest.mark.demo
@pytest.mark.skipif(not (OPENVINO_ENVIRONMENT / "ready").is_file(), reason="needs `make peers`")
def test_greedy_tokens_in_float32_are_those_of_our_model(demo) -> None:
    text = demo_model().joinpath("chat_template.jinja").read_text()
    ids = torch.tensor([demo.tokenizer.encode(text)])
    with torch.inference_mode():
        answer = demo.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False)
    expected = demo.tokenizer.decode(answer[0, ids.shape[1] :], skip_special_tokens=True)
    with running_server(OPENVINO, quick_config()) as server:
        assert completion(server.address, prompt=text, max_tokens=24)[0] == expected
        assert completion(server.address, prompt=ids[0].tolist(), max_tokens=24)[0] == expected
