import asyncio
import base64
import json
import threading
from dataclasses import replace

import pytest
from fake_engine import STATE
from inprocess_replica import LOCAL, ask, byte_loaded, events, make_replica

from baklava.plan.budget_plan import BudgetPlan
from serve_app.api.network import ApiKeys
from serve_app.api.routes import MAX_BODY_BYTES, create_app

HELLO = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 6, "temperature": 0}
ONCE = {"prompt": "Once", "max_tokens": 6, "temperature": 0}


@pytest.fixture(scope="module")
def replica(tiny):
    return make_replica(byte_loaded(tiny))


@pytest.fixture
def get(replica):
    return lambda path, **options: ask(create_app(replica), "GET", path, **options)


@pytest.fixture
def post(replica):
    return lambda path, body, **options: ask(create_app(replica), "POST", path, json=body, **options)


def test_the_model_is_listed_and_found_by_name(get):
    card = get("/v1/models").json()["data"][0]
    assert {"id", "object", "created", "owned_by", "root", "parent", "max_model_len"} <= card.keys()
    assert card["max_model_len"] == card["validated_context"] == 256
    assert get("/v1/models/tiny").json() == card
    assert get("/v1/models/other/name").json()["error"]["code"] == "model_not_found"


def test_the_plan_route_has_the_bytes_really_allocated(get, post, replica):
    post("/v1/completions", ONCE)
    told = get("/v1/plan").json()
    state = told["replicas"]["one"]
    assert told["digest"] == state["plan"] == replica.engine.plan.digest
    assert told["ratio"] == 2.0  # 32 bits
    assert BudgetPlan.model_validate(replica.engine.plan).tokens == told["tokens"]
    assert 0 < state["peak_bytes"] <= told["bytes_per_sequence"]


def test_a_stream_has_the_same_text_as_the_answer_at_once(post):
    whole = post("/v1/completions", ONCE).json()
    stream = events(post("/v1/completions", ONCE | {"stream": True}))
    assert "".join(event["choices"][0]["text"] for event in stream) == whole["choices"][0]["text"]
    assert [event["choices"][0]["finish_reason"] for event in stream] == [None] * 6 + ["length"]
    assert whole["usage"]["total_tokens"] == whole["usage"]["prompt_tokens"] + 6 == 10


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
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (243, 13, 256)


@pytest.mark.parametrize(
    ("body", "status", "param", "words"),
    [
        (ONCE | {"model": "other"}, 404, "model", "does not exist"),
        (ONCE | {"n": 129}, 400, "n", "less than or equal to 128"),
        (ONCE | {"tools": [{}]}, 400, "tools", "not support"),
        (ONCE | {"prompt": ["a"] * 129}, 400, "prompt", "129 prompts"),
        (ONCE | {"prompt": ["a"] * 33, "n": 4}, 400, "n", "128 at most"),
        (ONCE | {"best_of": 2}, 400, "best_of", "equal to n"),
        (ONCE | {"logprobs": 21}, 400, "logprobs", "less than or equal to 20"),
        (ONCE | {"logit_bias": {"400": 1}}, 400, "logit_bias", "0 to 127"),
        (ONCE | {"max_tokens": 0}, 400, "max_tokens", "echo"),
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
def test_errors_have_one_format(post, body, status, param, words):
    response = post("/v1/completions", body)
    error = response.json()["error"]
    assert response.status_code == status
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param
    assert words in error["message"]


def test_messages_that_the_template_rejects_are_the_clients_fault(post):
    response = post("/v1/chat/completions", HELLO | {"messages": [{"role": "assistant", "content": "x"}]})
    assert response.status_code == 400
    assert "begin with a user" in response.json()["error"]["message"]


def test_a_text_that_is_too_long_is_rejected_in_openais_words(post):
    error = post("/v1/completions", {"prompt": "x" * 200, "max_tokens": 57}).json()["error"]
    assert error["code"] == "context_length_exceeded"
    assert error["message"] == (
        "This model's maximum context length is 256 tokens. However, you requested 257 tokens (200 in the messages, "
        "57 in the completion). Please reduce the length of the messages or completion."
    )
    assert (
        post("/v1/chat/completions", HELLO | {"messages": [{"role": "user", "content": "x" * 300}]}).status_code == 400
    )


HALF = "\ud83d"  # of a pair that would be one character


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", ONCE | {"prompt": HALF}),
        ("/v1/completions", ONCE | {"prompt": ["whole", HALF], "echo": True}),
        ("/v1/completions", ONCE | {"model": HALF}),
        ("/v1/completions", ONCE | {"stop": HALF}),
        ("/v1/completions", ONCE | {"logit_bias": {HALF: 1}}),
        ("/v1/completions", ONCE | {HALF: 1}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": HALF}]}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": [{"type": "text", "text": HALF}]}]}),
        ("/v1/chat/completions", {"messages": [{"role": HALF, "content": ""}]}),
        ("/v1/chat/completions", HELLO | {"chat_template_kwargs": {"name": HALF}}),
        ("/v1/chat/completions", HELLO | {"chat_template_kwargs": {HALF: "x"}}),
        ("/tokenize", {"prompt": HALF}),
        ("/tokenize", {"prompt": "whole", "model": HALF}),
        ("/detokenize", {"tokens": [1], "model": HALF}),
        ("/v1/plan", {"plan": HALF}),
        ("/v1/plan", {HALF: {}}),
    ],
)
def test_half_a_character_is_the_clients_fault(replica, path, body):
    headers = {"Content-Type": "application/json"}
    response = ask(create_app(replica), "POST", path, content=json.dumps(body), headers=headers)
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "invalid_request_error"


def test_a_plan_with_half_a_character_is_the_clients_fault(replica):
    plan = replica.engine.plan.model_dump(mode="json")
    headers = {"Content-Type": "application/json"}
    for name in ("id", "config_hash"):
        body = json.dumps({"plan": plan | {"model": plan["model"] | {name: HALF}}})
        response = ask(create_app(replica), "POST", "/v1/plan", content=body, headers=headers)
        assert response.status_code == 400
        assert "not a valid plan" in response.json()["error"]["message"]


def test_bodies_that_are_not_json_are_rejected(replica):
    headers = {"Content-Type": "application/json"}
    for content in (b"{", b"\xff\xfe", b"[" * 100_000):
        response = ask(create_app(replica), "POST", "/v1/completions", content=content, headers=headers)
        assert response.status_code == 400
        assert "error" in response.json()


def test_the_body_limit_counts_received_bytes(replica):
    async def chunks():
        for _ in range(MAX_BODY_BYTES // 2**16 + 1):
            yield b" " * 2**16

    response = ask(create_app(replica), "POST", "/v1/completions", content=chunks())
    assert response.status_code == 413
    assert response.json()["error"]["type"] == "invalid_request_error"


KEYS = ApiKeys.from_keys(["first", "second"], ["admin"])


def test_with_keys_every_route_but_health_requires_one(replica):
    app = create_app(replica, KEYS)
    routes = [(method, route.path) for route in app.routes for method in route.methods]
    assert len(routes) >= 14
    refused = [{}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic first"}, {"Authorization": "Bearer"}]
    for method, path in [*routes, ("GET", "/nowhere"), ("POST", "/v1/embeddings")]:
        for headers in refused:
            status = ask(app, method, path.replace("{name:path}", "tiny"), headers=headers).status_code
            assert status == (200 if path == "/health" else 401), path
    for key in ("first", "second", "admin"):
        assert ask(app, "GET", "/v1/models", headers={"Authorization": f"Bearer {key}"}).status_code == 200


def basic(key):
    return {"Authorization": f"Basic {base64.b64encode(f'me:{key}'.encode()).decode()}"}


def test_a_browser_is_asked_for_a_key_and_may_only_read_with_it(replica):
    app = create_app(replica, KEYS)
    assert ask(app, "GET", "/").headers["www-authenticate"].startswith("Basic")
    assert ask(app, "GET", "/v1/models").headers["www-authenticate"] == "Bearer"
    assert ask(app, "GET", "/", headers=basic("first")).status_code == 200
    assert ask(app, "GET", "/", headers=basic("wrong")).status_code == 401
    assert ask(app, "POST", "/v1/completions", json=ONCE, headers=basic("first")).status_code == 401
    for garbage in (b"\xe9", b"=", b"/w=="):
        assert ask(app, "GET", "/", headers={"Authorization": b"Basic " + garbage}).status_code == 401


def test_without_keys_only_this_machines_own_names_are_answered(replica):
    app = create_app(replica)
    for base in (LOCAL, "http://127.0.0.1:8000", "http://[::1]:8000", "http://a.localhost"):
        assert ask(app, "GET", "/v1/models", base=base).status_code == 200
    for base in ("http://evil.example", "http://127.0.0.1.evil.example:8000", "http://10.0.0.7"):
        assert ask(app, "POST", "/v1/completions", base=base, json=ONCE).json()["error"]["code"] == "unknown_host"
    named = create_app(replica, host="box.lan")
    assert ask(named, "GET", "/v1/models", base="http://box.lan:8000").status_code == 200
    keyed = create_app(replica, KEYS)
    headers = {"Authorization": "Bearer first"}
    assert ask(keyed, "GET", "/v1/models", base="http://model.example", headers=headers).status_code == 200


def test_a_form_of_another_site_cannot_ask_for_anything(replica):
    """Browsers send such a body without asking first; JSON they would ask for, and no answer allows it."""
    app = create_app(replica)
    plan = {"plan": replica.engine.plan.model_dump(mode="json")}
    for path, body in (("/v1/completions", ONCE), ("/v1/plan", plan)):
        assert ask(app, "POST", path, json=body).status_code == 200
        for headers in ({"Content-Type": "text/plain"}, {}):
            response = ask(app, "POST", path, content=json.dumps(body), headers=headers)
            assert response.status_code == 400
    asked = {"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"}
    assert "access-control-allow-origin" not in ask(app, "OPTIONS", "/v1/completions", headers=asked).headers


def test_a_wrong_method_is_a_405_with_the_allowed_ones(get):
    refused = get("/v1/completions")
    assert (refused.status_code, refused.headers["allow"]) == (405, "POST")
    assert refused.json()["error"]["type"] == "invalid_request_error"


READ_ROUTES = ("/", "/health", "/ready", "/metrics", "/version", "/v1/models", "/v1/plan", "/tokenizer_info")


@pytest.mark.parametrize("path", READ_ROUTES)
def test_a_monitor_may_ask_with_head_and_with_a_trailing_slash(replica, path):
    app = create_app(replica)
    answer = ask(app, "GET", path)
    for asked in (path, path.rstrip("/") + "/"):
        head = ask(app, "HEAD", asked)
        assert (head.status_code, head.content) == (200, b"")
        assert head.headers["content-type"] == answer.headers["content-type"]
        assert ask(app, "GET", asked).status_code == 200


def test_the_name_of_a_model_may_end_with_a_slash(replica):
    app = create_app(replace(replica, model="/models/tiny/"))
    for name in ("/models/tiny/", "%2Fmodels%2Ftiny%2F"):
        assert ask(app, "GET", f"/v1/models/{name}").json()["id"] == "/models/tiny/"
        assert ask(app, "HEAD", f"/v1/models/{name}").status_code == 200
    assert ask(app, "GET", "/v1/models/").json()["data"][0]["id"] == "/models/tiny/"


def test_head_has_the_status_of_get(replica, monkeypatch):
    app = create_app(replica)
    refused = ask(app, "HEAD", "/v1/completions")
    assert (refused.status_code, refused.headers["allow"], refused.content) == (405, "POST", b"")
    assert ask(app, "HEAD", "/nowhere").status_code == 404
    keyed = create_app(replica, KEYS)
    assert [ask(keyed, "HEAD", path).status_code for path in ("/health", "/health/", "/ready")] == [200, 200, 401]
    assert ask(keyed, "HEAD", "/ready", headers=basic("first")).status_code == 200
    monkeypatch.setattr(replica.engine, "state", lambda: replace(STATE, alive=False))
    dead = ask(app, "HEAD", "/health")
    assert (dead.status_code, dead.content) == (503, b"")


def test_a_base_url_may_end_with_a_slash(post):
    for path in ("/v1/completions/", "/v1/chat/completions/"):
        assert post(path, ONCE if "chat" not in path else HELLO).status_code == 200


def test_a_preflight_of_a_browser_is_refused_without_cors_headers(replica):
    asked = {"Origin": "http://site.example", "Access-Control-Request-Method": "POST"}
    for app, status in ((create_app(replica), 405), (create_app(replica, KEYS), 401)):
        for path in ("/v1/chat/completions", "/health"):
            answer = ask(app, "OPTIONS", path, headers=asked)
            assert answer.status_code == (405 if path == "/health" else status)
            assert not [name for name in answer.headers if name.startswith("access-control")]


def test_there_are_no_docs(get):
    assert {get(path).status_code for path in ("/docs", "/redoc", "/openapi.json")} == {404}


def test_a_client_that_goes_away_stops_its_generation(replica):
    """Calls the app as a server does, and cancels it after the first event."""
    forwards, left = 0, threading.Event()

    def count(*_):
        nonlocal forwards
        forwards += 1
        if forwards == 10:
            left.wait(60)  # or all is made before anybody can leave

    async def scene():
        body = json.dumps(ONCE | {"max_tokens": 200, "stream": True}).encode()
        scope = {
            "type": "http",
            "method": "POST",
            "path": "/v1/completions",
            "query_string": b"",
            "http_version": "1.1",
        }
        scope |= {"asgi": {"version": "3.0", "spec_version": "2.4"}}
        scope |= {"headers": [(b"content-type", b"application/json"), (b"host", b"localhost")]}
        first, messages = asyncio.Event(), [{"type": "http.request", "body": body}]

        async def receive():
            return messages.pop() if messages else await asyncio.Future()

        async def send(message):
            if message.get("body"):
                first.set()

        task = asyncio.create_task(create_app(replica)(scope, receive, send))
        await first.wait()
        task.cancel()
        await asyncio.wait([task])
        left.set()
        while replica.engine.state().running:
            await asyncio.sleep(0.01)

    hook = replica.engine._runner._loaded.model.register_forward_hook(count)
    try:
        asyncio.run(scene())
    finally:
        hook.remove()
    assert 0 < forwards < 100


def test_an_internal_error_is_a_500_without_details(post, monkeypatch):
    def broken(*_):
        raise RuntimeError("secret of the inside")

    monkeypatch.setattr("serve_app.openai.tokenization.PromptEncoder.encode_text", broken)
    response = post("/v1/completions", ONCE)
    assert response.status_code == 500
    assert response.json()["error"]["type"] == "server_error"
    assert "secret" not in response.text


def test_text_goes_to_tokens_and_back(post, get):
    told = post("/tokenize", {"prompt": "Once"}).json()
    assert told == {"tokens": list(b"Once"), "count": 4, "max_model_len": 256}
    assert post("/detokenize", {"tokens": told["tokens"]}).json() == {"prompt": "Once"}
    chat = post("/tokenize", {"messages": HELLO["messages"]}).json()
    assert chat["tokens"] == list(b"u:Hello;")
    assert {"eos_token", "chat_template"} <= get("/tokenizer_info").json().keys()
    assert post("/detokenize", {"tokens": [500]}).status_code == 400
    assert post("/tokenize", {}).status_code == 400


def test_tokenize_rejects_fields_that_would_change_the_tokens(post):
    chat = {"messages": HELLO["messages"]}
    neutral = {
        "add_generation_prompt": True,
        "continue_final_message": False,
        "chat_template_kwargs": {},
        "tools": None,
    }
    assert post("/tokenize", chat | neutral | {"add_special_tokens": False}).json()["tokens"] == list(b"u:Hello;")
    unsupported = {"add_generation_prompt": False, "tools": [{}], "chat_template": "x", "add_special_tokens": True}
    unsupported |= {"chat_template_kwargs": {"a": 1}, "return_token_strs": True}
    for field, value in unsupported.items():
        refused = post("/tokenize", chat | {field: value})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, field)


def test_the_version_has_a_route(get):
    assert get("/version").json()["version"]


def test_requests_have_an_id_and_a_valid_one_is_the_clients(get):
    assert get("/version", headers={"x-request-id": "mine-7"}).headers["x-request-id"] == "mine-7"
    for invalid in ("a b", "x" * 65, 'a"}'):
        assert get("/version", headers={"x-request-id": invalid}).headers["x-request-id"] != invalid


def test_the_template_gets_variables_but_never_another_template(post):
    asked = {"chat_template_kwargs": {"enable_thinking": False}}
    assert post("/v1/chat/completions", HELLO | asked).status_code == 200
    for name in ("chat_template", "tokenize", "tools", "conversation", "conversations", "messages", "self"):
        refused = post("/v1/chat/completions", HELLO | {"chat_template_kwargs": {name: "x"}})
        assert refused.status_code == 400
        assert name in refused.json()["error"]["message"]


@pytest.mark.parametrize("template", ["{{ 'a' + 1 }}", "{{ 1 // 0 }}", "{{ raise_exception('no') }}", "{{ x.y.z }}"])
def test_a_template_that_fails_is_a_400(replica, post, monkeypatch, template):
    monkeypatch.setattr(replica.encoder.tokenizer, "chat_template", template)
    for body in (HELLO, HELLO | {"chat_template_kwargs": {"raise_exception": "shadowed"}}):
        response = post("/v1/chat/completions", body)
        assert (response.status_code, response.json()["error"]["param"]) == (400, "messages")


def test_a_long_prompt_is_truncated_from_the_left_on_request(post):
    asked = {"prompt": "x" * 300 + "Once", "truncate_prompt_tokens": 4, "echo": True, "max_tokens": 1}
    answer = post("/v1/completions", asked).json()
    assert answer["usage"]["prompt_tokens"] == 4
    assert answer["choices"][0]["text"].startswith("Once")
    assert post("/v1/completions", asked | {"truncate_prompt_tokens": -1}).json()["usage"]["prompt_tokens"] == 255
    for many in (256, 300):
        refused = post("/v1/completions", asked | {"truncate_prompt_tokens": -1, "max_tokens": many})
        assert refused.json()["error"]["code"] == "context_length_exceeded"
