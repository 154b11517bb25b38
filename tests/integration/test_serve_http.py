"""The real server, as its users meet it: jobs/serve.py as a process, the demo model, OpenAI's own client."""

import json
import os
import signal
import socket
import subprocess

import httpx
import openai
import pytest
import torch
from server_process import PATIENCE, command, serving

from baklava.allocation import Baklava, allocate
from baklava.errors import UserError
from baklava.eviction import HeavyHitter
from baklava.profiling.cosine_importance import CosineImportance
from baklava.profiling.profile import Profile
from serve_app.cli import load_served_plan

KEY = "a key of the test"
HELLO = [{"role": "user", "content": "Name three rivers of Europe."}]

pytestmark = [pytest.mark.demo, pytest.mark.ray]


@pytest.fixture(scope="module")
def plan(demo):
    """A searched-like plan: BaKlaVa's allocation at 30 % of 256 tokens, so that a chat soon outgrows it."""
    ids = demo.tokenizer("The rivers of Europe are long, and there are many of them. " * 20)["input_ids"][:192]
    importance = CosineImportance(demo)
    with importance.measuring(), torch.inference_mode():
        demo.model(demo.as_batch(ids), use_cache=False, logits_to_keep=1)
    measured = Profile(
        model=demo.identity,
        geometry=demo.geometry,
        windows="rivers",
        # All that this allocation reads of a profile.
        importance={
            source: [(1 - layer).tolist() for layer in layers]
            for source, layers in importance.head_similarity().items()
        },
        layer_importance=(1 - importance.layer_similarity()).tolist(),
    )
    return allocate(
        measured, budget=0.3, context_length=256, method=Baklava(), eviction=HeavyHitter(eviction_interval=8)
    )


@pytest.fixture(scope="module")
def plan_file(plan, tmp_path_factory):
    path = tmp_path_factory.mktemp("plans") / "plan.json"
    plan.write(path)
    return path


@pytest.fixture(scope="module")
def server(plan, plan_file):
    keys = plan_file.with_name("keys")
    keys.write_text(f"another\n{KEY}\n")
    arguments = ("--plan", plan_file, "--model", "demo", "--api-keys", keys, "--pool", "2GiB")
    with serving(*arguments, folder=plan_file.parent, key=KEY) as running:
        yield running


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.base}/v1", api_key=KEY, max_retries=0, timeout=PATIENCE) as client:
        yield client


def test_the_welcome_says_where_what_and_how_much(server, plan):
    assert f"listens on {server.base}" in server.welcome
    assert plan.digest in server.welcome
    assert f"{plan.bytes_per_sequence / 2**20:.1f} MiB per sequence" in server.welcome
    assert "curl -N" in server.welcome
    assert KEY not in server.welcome


def test_the_welcome_says_how_many_sequences_fit(server):
    lengths, full, budgeted = (
        [int(word.replace(",", "")) for word in line.split()[3:]]
        for line in server.welcome.splitlines()
        if line.startswith(("  tokens per", "  sequences,"))
    )
    assert lengths == [1024, 4096, 8192]
    assert all(many >= 3 * few for few, many in zip(full, budgeted, strict=True))
    assert full[0] > full[1] > full[2] > 0


def test_the_openai_client_lists_the_model(client):
    assert [model.id for model in client.models.list()] == ["demo"]
    assert client.models.retrieve("demo").max_model_len == 8192
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.models.retrieve("other/model")


def test_the_openai_client_chats_streamed_and_not(client):
    asked = {"model": "demo", "messages": HELLO, "max_tokens": 12, "temperature": 0}
    whole = client.chat.completions.create(**asked)
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert whole.choices[0].finish_reason == "length"
    assert whole.choices[0].message.content.strip()
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1]) == whole.choices[0].message.content
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    assert whole.usage.completion_tokens == 12


def test_the_openai_client_completes_streamed_and_not(client):
    asked = {"model": "demo", "prompt": "The capital of France is", "temperature": 0, "max_tokens": 10}
    whole = client.completions.create(**asked)
    chunks = list(client.completions.create(**asked, stream=True))
    assert "Paris" in whole.choices[0].text
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    stopped = client.completions.create(**asked, stop="aris")
    assert stopped.choices[0].finish_reason == "stop"
    assert stopped.choices[0].text == whole.choices[0].text.split("aris")[0]


def test_a_seed_gives_the_same_text_again(client):
    asked = {"model": "demo", "prompt": "Once", "max_tokens": 8, "seed": 11}
    texts = [client.completions.create(**asked).choices[0].text for _ in range(2)]
    assert texts[0] == texts[1]


def test_a_long_prompt_stays_within_the_plan(server, client, plan):
    prompt = "The rivers of Europe are long, and there are many of them. " * 24
    usage = client.completions.create(model="demo", prompt=prompt, max_tokens=12, extra_body={"ignore_eos": True}).usage
    (state,) = server.states().values()
    assert usage.prompt_tokens > plan.context_length
    assert usage.completion_tokens == 12
    assert state["plan"] == plan.digest
    assert 0 < state["peak_bytes"] <= state["pool_bytes"]


def test_errors_have_the_shape_that_clients_read(server):
    wrong = server.post("/v1/chat/completions", messages=HELLO, model="other")
    assert (wrong.status_code, wrong.json()["error"]["param"]) == (404, "model")
    tools = server.post("/v1/chat/completions", messages=HELLO, tools=[{"type": "function"}])
    assert (tools.status_code, tools.json()["error"]["param"]) == (400, "tools")
    long = server.post("/v1/completions", prompt="x", max_tokens=8192)
    assert (long.status_code, long.json()["error"]["code"]) == (400, "context_length_exceeded")
    large = server.post("/v1/completions", prompt="x" * 2**21)
    assert (large.status_code, set(large.json()["error"])) == (413, {"message", "type", "param", "code"})


def test_without_a_key_only_health_answers(server):
    assert httpx.get(f"{server.base}/health", timeout=PATIENCE).status_code == 200
    for path in ("/health", "/health/"):
        head = httpx.head(f"{server.base}{path}", timeout=PATIENCE)
        assert (head.status_code, head.content) == (200, b"")
    for headers in ({}, {"Authorization": "Bearer wrong"}):
        refused = httpx.post(
            f"{server.base}/v1/chat/completions", json={"messages": HELLO}, headers=headers, timeout=PATIENCE
        )
        assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_api_key")


def test_clients_that_go_away_leave_the_server_free(server):
    endless = {"prompt": "Once", "max_tokens": 2000, "ignore_eos": True}
    headers = {"Authorization": f"Bearer {KEY}"}
    url, stream = f"{server.base}/v1/completions", endless | {"stream": True}
    with httpx.stream("POST", url, json=stream, headers=headers, timeout=PATIENCE) as one:
        next(one.iter_lines())
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(url, json=endless, headers=headers, timeout=1)
    # Either of the two would take minutes, and this waits for its turn behind them.
    assert server.post("/v1/completions", prompt="Once", max_tokens=1).status_code == 200


@pytest.fixture(scope="module")
def invalid_plans(plan, plan_file):
    """Plans that cannot be served, by what is wrong with them."""
    damaged, foreign = plan_file.with_name("damaged.json"), plan_file.with_name("foreign.json")
    damaged.write_text(plan_file.read_text()[:-40])
    other = plan.model.model_copy(update={"config_hash": "0" * 16, "id": "another"})
    plan.model_copy(update={"model": other}).write(foreign)
    return {"damaged": damaged, "foreign": foreign, "missing": plan_file.with_name("missing.json")}


@pytest.mark.parametrize(
    ("kind", "words"),
    [("damaged", "not a valid plan"), ("foreign", "was made for another"), ("missing", "cannot read plan")],
)
def test_a_plan_that_cannot_be_served_is_rejected_in_one_sentence(invalid_plans, kind, words):
    with pytest.raises(UserError, match=words) as rejected:
        load_served_plan(str(invalid_plans[kind]), "demo", [])
    assert "\n" not in str(rejected.value)


def test_a_port_in_use_is_rejected_in_one_sentence(server, plan_file):
    port = httpx.URL(server.base).port
    assert "already in use" in error_line("--plan", plan_file, "--model", "demo", "--port", port)


def test_an_open_address_without_keys_is_rejected_in_one_sentence(plan_file):
    assert "API keys" in error_line("--plan", plan_file, "--model", "demo", "--host", "0.0.0.0")


def error_line(*arguments):
    environment = {name: value for name, value in os.environ.items() if name != "BAKLAVA_API_KEYS"}
    done = subprocess.run(command(*arguments), capture_output=True, text=True, env=environment)
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert "Traceback" not in done.stderr
    return done.stderr


def test_sigterm_to_the_process_group_lets_a_stream_end_and_then_ends_the_server(server):
    """The last test of the file: it ends the server."""
    body = {"prompt": "Once", "max_tokens": 40, "ignore_eos": True, "stream": True}
    headers = {"Authorization": f"Bearer {KEY}"}
    with httpx.stream("POST", f"{server.base}/v1/completions", json=body, headers=headers, timeout=PATIENCE) as stream:
        lines = filter(None, stream.iter_lines())
        first = next(lines)
        os.killpg(server.process.pid, signal.SIGTERM)
        rest = list(lines)
    assert len([first, *rest]) == 40 + 2
    assert rest[-1] == "data: [DONE]"
    assert json.loads(rest[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
    assert server.process.wait(timeout=PATIENCE) == 0
    with socket.socket() as again:
        again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        again.bind(("127.0.0.1", httpx.URL(server.base).port))
