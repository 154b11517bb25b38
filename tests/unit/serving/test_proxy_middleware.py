"""What stands in front of the replicas: Serve's own answers in our shape, broken answers with an end."""

import asyncio
import json

import pytest

from serve_app.api.proxy_middleware import ProxyErrorMiddleware, middlewares


def call(app, path="/v1/completions", headers=()):
    """What a client gets of an app behind the front, and the scope that the app saw."""
    got, seen = [], {}

    async def noted(scope, receive, send):
        seen.update(scope)
        await app(scope, receive, send)

    async def send(message):
        got.append(message)

    async def receive():
        return {"type": "http.request", "body": b""}

    scope = {"type": "http", "method": "POST", "path": path, "headers": list(headers)}
    asyncio.run(ProxyErrorMiddleware(noted)(scope, receive, send))
    start = next(message for message in got if message["type"] == "http.response.start")
    body = b"".join(message.get("body", b"") for message in got)
    return start["status"], dict(start["headers"]), body.decode(), seen, got


def plain(status, text=b"Internal"):
    async def app(scope, receive, send):
        headers = [(b"content-type", b"text/plain; charset=utf-8")]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": text, "more_body": False})

    return app


@pytest.mark.parametrize(("theirs", "ours"), [(404, 503), (408, 408), (429, 429), (500, 503), (503, 503)])
def test_serves_own_errors_come_in_the_shape_of_all_others(theirs, ours):
    status, headers, body, _, _ = call(plain(theirs))
    assert status == ours
    assert set(json.loads(body)["error"]) == {"message", "type", "param", "code"}
    assert (b"retry-after" in headers) == (ours != 408)


async def _nothing(scope, receive, send):
    """As when a replica dies before it answers."""


def test_no_answer_at_all_is_a_503_that_may_be_tried_again():
    status, headers, body, _, _ = call(_nothing)
    assert status == 503
    assert headers[b"retry-after"] == b"1"
    assert json.loads(body)["error"]["code"] == "replica_lost"


def stream(*, ends, kind=b"text/event-stream"):
    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", kind)]})
        await send({"type": "http.response.body", "body": b"data: {}\n\n", "more_body": True})
        if ends:
            await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False})

    return app


def test_a_stream_that_breaks_off_ends_with_an_error_event():
    _, _, body, _, got = call(stream(ends=False))
    _, error, done = body.strip().split("\n\n")
    assert json.loads(error.removeprefix("data: "))["error"]["type"] == "server_error"
    assert done == "data: [DONE]"
    assert got[-1]["more_body"] is False


def test_a_whole_stream_passes_as_it_is():
    _, _, body, _, got = call(stream(ends=True))
    assert body == "data: {}\n\ndata: [DONE]\n\n"
    assert len(got) == 3


def test_an_error_in_json_passes_as_it_is():
    async def app(scope, receive, send):
        headers = [(b"content-type", b"application/json")]
        await send({"type": "http.response.start", "status": 404, "headers": headers})
        await send({"type": "http.response.body", "body": b'{"error": 1}'})

    assert call(app)[:1] + call(app)[2:3] == (404, '{"error": 1}')


def test_headers_that_would_keep_a_request_alive_are_not_for_clients():
    headers = [(b"x-request-disconnect-disabled", b"?1"), (b"x-request-timeout-seconds", b"9999"), (b"accept", b"*/*")]
    seen = call(stream(ends=True), headers=headers)[3]
    assert {name for name, _ in seen["headers"]} == {b"accept", b"x-request-id"}


def test_a_request_has_one_name_and_no_unfair_one():
    async def twice(scope, receive, send):
        headers = [(b"x-request-id", b"a"), (b"x-request-id", b"a"), (b"content-type", b"application/json")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"{}"})

    unfair = [(b"x-request-id", b"a b c")]
    _, _, _, seen, got = call(twice, headers=unfair)
    assert dict(seen["headers"])[b"x-request-id"] != b"a b c"
    assert [name for name, _ in got[0]["headers"]].count(b"x-request-id") == 1


def test_serves_own_pages_are_not_shown():
    assert call(stream(ends=True), path="/-/routes")[0] == 404


def test_serve_gets_what_it_asks_for():
    assert [middleware.cls for middleware in middlewares()] == [ProxyErrorMiddleware]
