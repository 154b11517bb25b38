"""What the engine's outputs become in OpenAI's format: choices, log-probabilities, echoes, usage, errors."""

import asyncio
import json
import time
from dataclasses import replace

import httpx
import pytest
from fake_engine import ScriptedEngine
from inprocess_replica import LOCAL, ask, byte_loaded, events, full, replica_of

from serve_app.api.routes import create_app
from serve_app.engine.types import (
    DeadlineError,
    DrainingError,
    Logprob,
    PrefillDone,
    QueueFullError,
    TokenOutput,
    TooLargeError,
)

ONCE = {"prompt": "Once", "max_tokens": 3}
CHAT = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 3}


@pytest.fixture(scope="module")
def loaded(tiny):
    return byte_loaded(tiny)


@pytest.fixture
def serve(loaded):
    """Answers requests by a script."""

    def post(script, path, body, **options):
        engine = ScriptedEngine(full(loaded), script)
        replica = replica_of(engine, loaded, **options)
        return ask(create_app(replica), "POST", path, json=body), engine, replica

    return post


def spelt(text, finish="length", index=0, logprobs=False):
    """A continuation as tokens; the log-probability of a token is minus its position."""
    for place, byte in enumerate(text.encode()):
        last = place + 1 == len(text.encode())
        logprob = Logprob(byte, -float(place), ((byte, -float(place)), (byte + 1, -9.0))) if logprobs else None
        yield TokenOutput(byte, index, finish if last else None, logprob)


def test_choices_are_numbered_across_prompts(serve):
    def script(work):
        yield PrefillDone()
        for index in range(work.n):
            yield from spelt(chr(work.prompt[0]).upper() + str(index), index=index)

    body = {"prompt": ["abc", "xyz"], "n": 2, "max_tokens": 2}
    response, engine, _ = serve(script, "/v1/completions", body)
    answer = response.json()
    assert [(one["index"], one["text"]) for one in answer["choices"]] == [(0, "A0"), (1, "A1"), (2, "X0"), (3, "X1")]
    assert answer["usage"]["prompt_tokens"] == 6
    assert answer["usage"]["completion_tokens"] == 8
    assert [work.n for work in engine.works] == [2, 2]


def test_a_stream_of_several_chats_opens_each_with_its_role(serve):
    def script(work):
        yield PrefillDone()
        for one, other in zip(spelt("ab", index=0), spelt("cd", index=1), strict=True):
            yield one
            yield other

    response, _, _ = serve(script, "/v1/chat/completions", CHAT | {"n": 2, "stream": True})
    texts, roles, ends = {0: "", 1: ""}, [], []
    for event in events(response):
        choice = event["choices"][0]
        texts[choice["index"]] += choice["delta"].get("content", "")
        roles += [choice["index"]] if "role" in choice["delta"] else []
        ends += [(choice["index"], choice["finish_reason"])] if choice["finish_reason"] else []
    assert texts == {0: "ab", 1: "cd"}
    assert sorted(roles) == [0, 1]
    assert sorted(ends) == [(0, "length"), (1, "length")]


def test_tokens_after_a_stop_string_are_left_out_while_the_others_go_on(serve):
    def script(work):
        yield PrefillDone()
        yield from spelt("a.bc", index=0)
        yield from spelt("wxyz", index=1)

    response, _, _ = serve(script, "/v1/completions", ONCE | {"n": 2, "stop": "."})
    assert [(one["text"], one["finish_reason"]) for one in response.json()["choices"]] == [
        ("a", "stop"),
        ("wxyz", "length"),
    ]


def test_a_stop_string_ends_the_sequence_in_the_engine(serve):
    def script(work):
        yield PrefillDone()
        yield from spelt("ab.", finish=None)

    response, engine, _ = serve(script, "/v1/completions", ONCE | {"stop": "."})
    assert response.json()["choices"][0]["text"] == "ab"
    assert engine.stopped == [(engine.works[0], 0)]
    assert engine.cancelled == []  # its client has not gone away


@pytest.mark.parametrize(
    ("min_tokens", "text"),
    [
        (0, "a"),
        (2, "a"),
        (3, "a.b"),
        (6, "a.b.c"),
        (7, "a.b.c.<"),
        (8, "a.b.c.<"),
        (10, "a.b.c.<!x"),
        (12, "a.b.c.<!x.d"),
    ],
)
def test_no_stop_string_ends_a_text_before_min_tokens(serve, min_tokens, text):
    def script(work):
        yield PrefillDone()
        yield from spelt("a.b.c.<!x.d.")

    body = ONCE | {"max_tokens": 12, "min_tokens": min_tokens, "stop": [".", "!x"]}
    response, _, _ = serve(script, "/v1/completions", body)
    assert response.json()["choices"][0]["text"] == text


def test_a_stop_string_ends_one_of_several_continuations_alone(serve):
    def script(work):
        yield PrefillDone()
        yield from spelt("a.", index=0, finish=None)
        yield from spelt("wxyz", index=1)

    _, engine, _ = serve(script, "/v1/completions", ONCE | {"n": 2, "stop": "."})
    assert (engine.works[0], 0) in engine.stopped
    assert engine.cancelled == []


def test_finished_requests_are_not_cancelled(serve):
    """The engine would count it among those whose client went away."""

    def script(work):
        yield PrefillDone(finish_reason=None if work.sampling_params.max_tokens else "length")
        if work.sampling_params.max_tokens:
            yield from spelt("ab", index=0)
            yield from spelt("cd", index=1)

    _, engine, _ = serve(script, "/v1/completions", ONCE | {"prompt": ["abc", "xyz"], "n": 2})
    assert engine.cancelled == []
    _, engine, _ = serve(script, "/v1/completions", ONCE | {"max_tokens": 0, "echo": True, "n": 2})
    assert engine.cancelled == []


def test_an_echo_begins_with_the_prompt_and_its_logprobs(serve):
    prompt = tuple(None if place == 0 else Logprob(byte, -0.5, ((byte, -0.5),)) for place, byte in enumerate(b"Once"))

    def script(work):
        assert work.prompt_logprobs == work.logprobs == 1
        yield PrefillDone(prompt_logprobs=prompt)
        yield from spelt("!", logprobs=True)

    body = {"prompt": [list(b"Once")], "max_tokens": 1, "logprobs": 1, "echo": True, "temperature": 0}
    response, _, _ = serve(script, "/v1/completions", body)
    choice = response.json()["choices"][0]
    assert choice["text"] == "Once!"
    assert choice["logprobs"]["tokens"] == list("Once!")
    assert choice["logprobs"]["token_logprobs"] == [None, -0.5, -0.5, -0.5, 0.0]
    assert choice["logprobs"]["top_logprobs"][:2] == [None, {"n": -0.5}]
    assert choice["logprobs"]["text_offset"] == [0, 1, 2, 3, 4]


def test_an_echo_of_no_tokens_is_the_prompt_alone(serve):
    def script(work):
        assert work.sampling_params.max_tokens == 0
        yield PrefillDone(finish_reason="length")

    response, _, _ = serve(script, "/v1/completions", ONCE | {"max_tokens": 0, "echo": True})
    answer = response.json()
    assert (answer["choices"][0]["text"], answer["choices"][0]["finish_reason"]) == ("Once", "length")
    assert answer["usage"]["completion_tokens"] == 0


def test_a_streamed_echo_comes_with_the_first_token(serve):
    def script(work):
        yield PrefillDone()
        yield from spelt("ab")

    response, _, _ = serve(script, "/v1/completions", ONCE | {"echo": True, "stream": True})
    assert [event["choices"][0]["text"] for event in events(response)] == ["Oncea", "b", ""]


def test_chat_logprobs_have_bytes_and_alternatives(serve):
    def script(work):
        assert (work.logprobs, work.prompt_logprobs) == (2, None)
        yield PrefillDone()
        yield from spelt("hi", logprobs=True)

    response, _, _ = serve(script, "/v1/chat/completions", CHAT | {"logprobs": True, "top_logprobs": 2})
    first, second = response.json()["choices"][0]["logprobs"]["content"]
    assert (first["token"], first["bytes"], first["logprob"]) == ("h", [104], 0.0)
    assert [top["token"] for top in second["top_logprobs"]] == ["i", "j"]


def test_half_a_character_has_no_bytes(serve):
    def script(work):
        yield PrefillDone()
        for byte in "é".encode():
            yield TokenOutput(byte, finish_reason=None, logprob=Logprob(byte, -1.0))
        yield TokenOutput(33, finish_reason="length", logprob=Logprob(33, -1.0))

    response, _, _ = serve(script, "/v1/chat/completions", CHAT | {"logprobs": True})
    choice = response.json()["choices"][0]
    assert choice["message"]["content"] == "é!"
    assert [one["bytes"] for one in choice["logprobs"]["content"]] == [None, None, [33]]


def test_tokens_that_look_the_same_keep_names_of_their_own(serve):
    """Otherwise the likelier one's number would stand for both, and a client would take either for the likeliest."""

    def script(work):
        yield PrefillDone()
        yield TokenOutput(200, finish_reason="length", logprob=Logprob(200, -3.0, ((201, -0.1), (202, -2.5))))

    response, _, _ = serve(script, "/v1/completions", ONCE | {"max_tokens": 1, "logprobs": 2})
    logprobs = response.json()["choices"][0]["logprobs"]
    assert logprobs["top_logprobs"] == [{"\ufffd": -0.1, "token_id:202": -2.5, "token_id:200": -3.0}]
    assert logprobs["tokens"] == ["token_id:200"]


def test_tokens_are_named_by_number_on_request(serve):
    def script(work):
        yield PrefillDone()
        yield from spelt("a", logprobs=True)

    body = ONCE | {"max_tokens": 1, "logprobs": 1, "return_tokens_as_token_ids": True}
    response, _, _ = serve(script, "/v1/completions", body)
    assert response.json()["choices"][0]["logprobs"]["tokens"] == ["token_id:97"]


def test_no_number_is_infinite(serve):
    def script(work):
        yield PrefillDone()
        yield TokenOutput(97, finish_reason="length", logprob=Logprob(97, -1.0, ((98, float("-inf")),)))

    response, _, _ = serve(script, "/v1/completions", ONCE | {"max_tokens": 1, "logprobs": 1})
    assert response.json()["choices"][0]["logprobs"]["top_logprobs"] == [{"b": -9999.0, "a": -1.0}]


def test_usage_has_the_tokens_from_the_prefix_cache(serve):
    def script(work):
        yield PrefillDone(cached_tokens=3)
        yield from spelt("ab")

    response, _, _ = serve(script, "/v1/completions", ONCE)
    assert response.json()["usage"] == {
        "prompt_tokens": 4,
        "completion_tokens": 2,
        "total_tokens": 6,
        "prompt_tokens_details": {"cached_tokens": 3},
    }


def test_usage_counts_on_in_every_event_when_asked_for(serve):
    def script(work):
        yield PrefillDone()
        yield from spelt("abc")

    options = {"include_usage": True, "continuous_usage_stats": True}
    response, _, _ = serve(script, "/v1/completions", ONCE | {"stream": True, "stream_options": options})
    assert [event["usage"]["completion_tokens"] for event in events(response)] == [1, 2, 3, 3, 3]


@pytest.mark.parametrize(
    ("refusal", "status", "retry"),
    [
        (QueueFullError(7), 429, "7"),
        (DrainingError("The server is shutting down."), 503, "5"),
        (TooLargeError("The request needs 9 bytes, but the pool has 5; ask for less."), 400, None),
        (DeadlineError(was_waiting=True), 408, None),
        (DeadlineError(was_waiting=False), 408, None),
        (RuntimeError("inside"), 500, None),
    ],
)
@pytest.mark.parametrize("at_once", [True, False])
def test_a_rejection_has_its_status_and_retry_after(serve, refusal, status, retry, at_once):
    for stream in (False, True):
        response, _, _ = serve(
            lambda _: refusal if at_once else [refusal], "/v1/completions", ONCE | {"stream": stream}
        )
        assert response.status_code == status
        assert response.headers.get("retry-after") == retry
        assert response.headers.get("x-should-retry") == (None if retry else "false")
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}
        assert "inside" not in response.text


def test_a_rejection_of_one_prompt_ends_the_others(serve):
    def script(work):
        return [QueueFullError(3)] if work.prompt[0] == ord("x") else [PrefillDone()]

    response, engine, _ = serve(script, "/v1/completions", ONCE | {"prompt": ["abc", "xyz"]})
    assert response.status_code == 429
    assert engine.cancelled == engine.works[:1]


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_names_the_plan_of_its_admission(serve, stream):
    def script(work):
        yield PrefillDone(plan_digest="later")
        yield from spelt("ab")

    response, _, _ = serve(script, "/v1/completions", ONCE | {"stream": stream})
    assert response.headers["x-baklava-plan"] == "later"
    told = events(response) if stream else [response.json()]
    assert {one["system_fingerprint"] for one in told} == {"baklava-later"}


def test_an_error_in_the_middle_of_a_stream_is_an_event_before_the_end(serve):
    def script(work):
        yield PrefillDone()
        yield TokenOutput(97)
        yield DeadlineError(was_waiting=False)

    response, _, _ = serve(script, "/v1/chat/completions", CHAT | {"stream": True})
    assert response.status_code == 200
    *_, error = events(response)
    assert error["error"]["type"] == "timeout_error"


def waiting(seconds, *then):
    def script(work):
        time.sleep(seconds)
        yield from then

    return script


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_a_stream_that_waits_long_for_its_first_token_begins_with_comments(serve, monkeypatch, path):
    monkeypatch.setattr("serve_app.openai.responses.KEEPALIVE_SECONDS", 0.05)
    script = waiting(0.3, PrefillDone(), TokenOutput(97), TokenOutput(98, finish_reason="length"))
    body = (ONCE if path == "/v1/completions" else CHAT) | {"stream": True}
    waited, _, _ = serve(script, path, body)
    comments, *rest = waited.text.split("data: ")
    assert set(comments.strip().split("\n\n")) == {": ping"}
    assert comments.count("ping") > 1
    monkeypatch.setattr("serve_app.openai.responses.KEEPALIVE_SECONDS", 60)
    assert len(events(serve(script, path, body)[0])) + 1 == len(rest)


def test_a_rejection_after_a_comment_is_an_event(serve, monkeypatch):
    monkeypatch.setattr("serve_app.openai.responses.KEEPALIVE_SECONDS", 0.05)
    script = waiting(0.12, DeadlineError(was_waiting=True))
    response, _, replica = serve(script, "/v1/completions", ONCE | {"stream": True})
    *pings, error, done = response.text.strip().split("\n\n")
    assert response.status_code == 200
    assert set(pings) == {": ping"}
    assert json.loads(error.removeprefix("data: "))["error"]["code"] == "deadline"
    assert done == "data: [DONE]"
    assert 'admission_rejections_total{model_name="tiny",replica="one",status="408"} 1.0' in replica.metrics.text


@pytest.mark.parametrize("quiet", [0.02, 60])
def test_a_client_that_leaves_before_the_first_token_ends_its_request(loaded, monkeypatch, quiet):
    monkeypatch.setattr("serve_app.openai.responses.KEEPALIVE_SECONDS", quiet)
    engine = ScriptedEngine(full(loaded), lambda work: [])
    app = create_app(replica_of(engine, loaded))

    async def scene():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url=LOCAL) as client:
            task = asyncio.create_task(client.post("/v1/completions", json=ONCE | {"stream": True}))
            while not engine.works:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.1)
            task.cancel()
            await asyncio.wait([task])
            assert engine.cancelled == engine.works

    asyncio.run(scene())


def test_a_silent_engine_times_out(serve, monkeypatch):
    monkeypatch.setattr("serve_app.openai.output_processor.DEADLINE_GRACE_SECONDS", 0.05)
    response, engine, _ = serve(lambda work: [PrefillDone()], "/v1/completions", ONCE, timeout_seconds=0.05)
    assert response.status_code == 408
    assert engine.cancelled == engine.works


def test_every_answer_names_its_plan(serve, loaded):
    def script(work):
        yield PrefillDone()
        yield from spelt("a")

    response, engine, _ = serve(script, "/v1/completions", ONCE)
    assert response.headers["x-baklava-plan"] == engine.plan.digest
    assert engine.plan.digest in response.json()["system_fingerprint"]


def test_the_sampler_gets_all_params(serve):
    def script(work):
        yield PrefillDone()
        yield from spelt("a")

    params = {"presence_penalty": 0.5, "frequency_penalty": -1, "repetition_penalty": 1.2, "seed": 5, "top_k": 3}
    params |= {"min_p": 0.1, "min_tokens": 1, "ignore_eos": True, "stop_token_ids": [4], "top_p": 0.9}
    _, engine, _ = serve(script, "/v1/completions", ONCE | params | {"logit_bias": {"65": 5, "3": -100}})
    sampling = engine.works[0].sampling_params
    assert dict(sampling.logit_bias) == {65: 5, 3: -100}
    assert sampling.stop_token_ids == {4}
    told = {name: getattr(sampling, name) for name in params if name != "stop_token_ids"}
    assert told == {name: value for name, value in params.items() if name != "stop_token_ids"}


def test_deadlines_start_at_arrival(serve):
    def script(work):
        yield PrefillDone()
        yield from spelt("a")

    _, engine, _ = serve(script, "/v1/completions", ONCE, timeout_seconds=1e6)
    assert 0 < engine.works[0].deadline < float("inf")


@pytest.mark.parametrize(("alive", "draining", "health", "ready"), [(True, True, 200, 503), (False, False, 503, 503)])
def test_readiness_differs_from_liveness(loaded, alive, draining, health, ready):
    engine = ScriptedEngine(full(loaded), lambda work: [])
    engine.now = replace(engine.now, alive=alive, draining=draining)
    app = create_app(replica_of(engine, loaded))
    assert ask(app, "GET", "/health").status_code == health
    assert ask(app, "GET", "/ready").status_code == ready
    assert json.loads(ask(app, "GET", "/ready").text)["error"]["type"] == "server_error"
