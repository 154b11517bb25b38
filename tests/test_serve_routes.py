import asyncio
import json
import threading

import httpx
import pytest
from byte_model import byte_model
from serve_app.turns import Turns

from baklava.plan import full_plan
from serve_app.engine import Engine
from serve_app.errors import ApiError
from serve_app.listen import key_digest
from serve_app.prompts import Prompts
from serve_app.replies import CHAT, Reply
from serve_app.routes import BODY_LIMIT, Replica, create_app
from serve_app.schema import StreamOptions
from serve_app.text import Piece

HELLO = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 6, "temperature": 0}
ONCE = {"prompt": "Once", "max_tokens": 6, "temperature": 0}


@pytest.fixture(scope="module")
def replica(tiny):
    loaded = byte_model(tiny)
    engine = Engine(loaded, full_plan(loaded.identity, loaded.geometry, 256, bits=32))
    return Replica(engine, Prompts.of(loaded), Turns(waiting=4, timeout=60), "tiny", created=1)


def ask(app, method, path, **options):
    async def send():
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.request(method, path, **options)

    return asyncio.run(send())


@pytest.fixture
def get(replica):
    return lambda path, **options: ask(create_app(replica), "GET", path, **options)


@pytest.fixture
def post(replica):
    return lambda path, body, **options: ask(create_app(replica), "POST", path, json=body, **options)


def events(response):
    lines = [line for line in response.text.split("\n\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def test_the_model_is_listed_and_found_by_name(get):
    card = get("/v1/models").json()["data"][0]
    assert set(card) == {"id", "object", "created", "owned_by", "root", "parent", "max_model_len"}
    assert card["max_model_len"] == 256
    assert get("/v1/models/tiny").json() == card
    assert get("/v1/models/other/name").json()["error"]["code"] == "model_not_found"


def test_the_plan_is_told_with_what_is_really_held(get, post, replica):
    post("/v1/completions", ONCE)
    told = get("/v1/plan").json()
    assert told["digest"] == replica.engine.plan.digest
    assert told["ratio"] == 2.0  # 32 bits
    assert 0 < told["held_bytes"]["last"] <= told["held_bytes"]["max"] <= told["bytes_per_sequence"]


def test_a_stream_has_the_same_text_as_the_answer_at_once(post):
    whole = post("/v1/completions", ONCE).json()
    stream = events(post("/v1/completions", ONCE | {"stream": True}))
    assert "".join(event["choices"][0]["text"] for event in stream) == whole["choices"][0]["text"]
    assert [event["choices"][0]["finish_reason"] for event in stream] == [None] * 6 + ["length"]
    assert whole["usage"] == {"prompt_tokens": 4, "completion_tokens": 6, "total_tokens": 10}


def test_a_chat_stream_opens_with_the_role_and_has_one_event_per_token(post):
    whole = post("/v1/chat/completions", HELLO).json()
    response = post("/v1/chat/completions", HELLO | {"stream": True})
    deltas = [event["choices"][0]["delta"] for event in events(response)]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert deltas[-1] == {}
    assert len(deltas) == 8
    assert "".join(delta.get("content", "") for delta in deltas) == whole["choices"][0]["message"]["content"]
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["x-accel-buffering"] == "no"


def test_usage_comes_last_in_an_event_without_choices_and_only_when_asked_for(post):
    asked = events(post("/v1/completions", ONCE | {"stream": True, "stream_options": {"include_usage": True}}))
    assert asked[-1]["choices"] == []
    assert asked[-1]["usage"]["completion_tokens"] == 6
    assert not any("usage" in event for event in asked[:-1])
    assert not any("usage" in event for event in events(post("/v1/completions", ONCE | {"stream": True})))


def test_every_form_of_the_prompt_gives_the_same_answer(post):
    ids = list(b"Once")
    texts = {
        post("/v1/completions", ONCE | {"prompt": prompt}).json()["choices"][0]["text"]
        for prompt in ("Once", ["Once"], ids, [ids])
    }
    assert len(texts) == 1


def test_a_chat_without_a_maximum_ends_with_the_context(post):
    long = {"messages": [{"role": "user", "content": "x" * 240}]}
    usage = post("/v1/chat/completions", HELLO | long | {"max_tokens": None}).json()["usage"]
    assert usage == {"prompt_tokens": 243, "completion_tokens": 13, "total_tokens": 256}


@pytest.mark.parametrize(
    ("body", "status", "param", "words"),
    [
        (ONCE | {"model": "other"}, 404, "model", "does not exist"),
        (ONCE | {"n": 2}, 400, "n", "not support"),
        (ONCE | {"temperature": 3}, 400, "temperature", "less than or equal"),
        ({"max_tokens": 2}, 400, "prompt", "required"),
        (ONCE | {"prompt": [5, 128]}, 400, "prompt", "0 to 127"),
        (ONCE | {"prompt": [-1]}, 400, "prompt", "0 to 127"),
        (ONCE | {"prompt": ""}, 400, "prompt", "no tokens"),
        (ONCE | {"stop_token_ids": [4000]}, 400, "stop_token_ids", "0 to 127"),
        (ONCE | {"min_tokens": 7}, 400, "min_tokens", "maximum of 6"),
        ([1, 2], 400, None, "JSON object"),
    ],
)
def test_a_request_that_cannot_be_answered_is_refused_in_one_shape(post, body, status, param, words):
    response = post("/v1/completions", body)
    error = response.json()["error"]
    assert response.status_code == status
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param
    assert words in error["message"]


def test_messages_that_the_template_refuses_are_the_clients_fault(post):
    response = post("/v1/chat/completions", HELLO | {"messages": [{"role": "assistant", "content": "x"}]})
    assert response.status_code == 400
    assert "begin with a user" in response.json()["error"]["message"]


def test_a_text_that_is_too_long_is_refused_in_the_known_words(post):
    error = post("/v1/completions", {"prompt": "x" * 200, "max_tokens": 57}).json()["error"]
    assert error["code"] == "context_length_exceeded"
    assert error["message"] == (
        "This model's maximum context length is 256 tokens. However, you requested 257 tokens (200 in the messages, "
        "57 in the completion). Please reduce the length of the messages or completion."
    )
    assert (
        post("/v1/chat/completions", HELLO | {"messages": [{"role": "user", "content": "x" * 300}]}).status_code == 400
    )


def test_bodies_that_are_no_json_are_refused(replica):
    headers = {"Content-Type": "application/json"}
    for content in (b"{", b"\xff\xfe", b"[" * 100_000):
        response = ask(create_app(replica), "POST", "/v1/completions", content=content, headers=headers)
        assert response.status_code == 400
        assert "error" in response.json()


def test_a_body_is_bounded_by_what_comes_not_by_what_is_announced(replica):
    async def chunks():
        for _ in range(BODY_LIMIT // 2**16 + 1):
            yield b" " * 2**16

    response = ask(create_app(replica), "POST", "/v1/completions", content=chunks())
    assert response.status_code == 413
    assert response.json()["error"]["type"] == "invalid_request_error"


def test_with_keys_every_route_but_health_asks_for_one(replica):
    app = create_app(replica, frozenset({key_digest("first"), key_digest("second")}))
    routes = [(method, route.path) for route in app.routes for method in route.methods]
    assert len(routes) >= 6
    for method, path in [*routes, ("GET", "/nowhere")]:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic first"}):
            status = ask(app, method, path.replace("{name:path}", "tiny"), headers=headers).status_code
            assert status == (200 if path == "/health" else 401)
    for key in ("first", "second"):
        assert ask(app, "GET", "/v1/models", headers={"Authorization": f"Bearer {key}"}).status_code == 200


def test_there_are_no_docs(get):
    assert {get(path).status_code for path in ("/docs", "/redoc", "/openapi.json")} == {404}


def gated(gate):
    yield Piece("a")
    gate.wait(timeout=60)
    yield Piece("b", "stop")


def test_a_full_line_refuses_and_frees_its_places(replica):
    async def scene():
        gate, turns = threading.Event(), Turns(waiting=1, timeout=60)
        streams = [turns.stream(lambda: gated(gate)) for _ in range(3)]
        first = await anext(streams[0])
        second = asyncio.create_task(anext(streams[1]))
        await asyncio.sleep(0)
        with pytest.raises(ApiError) as full:
            await anext(streams[2])
        gate.set()
        rest = [piece async for piece in streams[0]]
        served = [await second, *[piece async for piece in streams[1]]]
        again = [piece async for piece in turns.stream(lambda: gated(gate))]
        return full.value, [first, *rest], served, again

    full, *answers = asyncio.run(scene())
    assert full.status == 429
    assert int(full.headers["Retry-After"]) > 0
    assert all("".join(piece.text for piece in answer) == "ab" for answer in answers)


def test_a_request_that_takes_too_long_is_told_so():
    async def scene():
        gate, turns = threading.Event(), Turns(waiting=1, timeout=0.05)
        try:
            with pytest.raises(ApiError) as late:
                [piece async for piece in turns.stream(lambda: gated(gate))]
        finally:
            gate.set()
        return late.value

    assert asyncio.run(scene()).status == 408


def test_a_client_that_goes_away_stops_its_generation(replica):
    """Calls the app as a server does, and cancels it after the first event."""
    forwards = 0

    def count(*_):
        nonlocal forwards
        forwards += 1

    async def scene():
        body = json.dumps(ONCE | {"max_tokens": 200, "stream": True}).encode()
        scope = {
            "type": "http",
            "method": "POST",
            "path": "/v1/completions",
            "query_string": b"",
            "http_version": "1.1",
        }
        scope |= {
            "headers": [(b"content-type", b"application/json")],
            "asgi": {"version": "3.0", "spec_version": "2.4"},
        }
        first, messages = asyncio.Event(), [{"type": "http.request", "body": body}]

        async def receive():
            return messages.pop() if messages else await asyncio.Future()

        async def send(message):
            if message.get("body"):
                first.set()

        app = create_app(replica)
        task = asyncio.create_task(app(scope, receive, send))
        await first.wait()
        task.cancel()
        await asyncio.wait([task])
        async for _ in replica.turns.stream(lambda: iter_once()):  # waits until the worker is free
            pass

    def iter_once():
        yield Piece("", "stop")

    model = replica.engine._loaded.model
    hook = model.register_forward_hook(count)
    try:
        asyncio.run(scene())
    finally:
        hook.remove()
    assert forwards < 100


def test_an_error_in_the_middle_of_a_stream_is_an_event_before_the_end():
    async def broken():
        yield Piece("a")
        raise ApiError("The request took longer than 5 seconds.", 408)

    async def scene():
        reply = Reply(CHAT, "tiny", "print", prompt_tokens=3)
        return [event async for event in reply.events(broken(), StreamOptions())]

    *_, error, done = asyncio.run(scene())
    assert json.loads(error.removeprefix("data: "))["error"]["type"] == "timeout_error"
    assert done == "data: [DONE]\n\n"


def test_a_fault_of_ours_is_a_500_that_tells_nothing_of_the_inside(replica, monkeypatch, caplog):
    monkeypatch.setattr("baklava.cache.BudgetedCache.promised_bytes", property(lambda cache: 100))
    response = ask(create_app(replica), "POST", "/v1/completions", json=ONCE)
    assert response.status_code == 500
    assert response.json()["error"]["type"] == "server_error"
    assert "promises" not in response.text
