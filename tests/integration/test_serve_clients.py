"""Clients as people install them, unmodified, against a real server inside a tight plan."""

import asyncio
import base64
import json
import signal

import httpx
import openai
import pytest
from langchain_openai import ChatOpenAI
from lm_eval.api.instance import Instance
from lm_eval.models.openai_completions import LocalCompletionsAPI
from server_process import PATIENCE, all_of, asking, serving, small_model, small_plan, stream, until, whole

from baklava.plan.budget_plan import BudgetPlan, full_cache_plan
from baklava.runtime.logprobs import score_suffix
from baklava.runtime.model_loader import load

KEY, ADMIN = "a key of the test", "an admin's key"
SYSTEM = "You know all about rivers, and you answer in one sentence that a child understands."
SECRET = "nobody may read this in a log"

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return small_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def plan(model):
    return small_plan(model)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("server")


@pytest.fixture(scope="module")
def server(model, plan, folder):
    plan.write(folder / "plan.json")
    (folder / "system.txt").write_text(SYSTEM)
    plan, prefix = folder / "plan.json", folder / "system.txt"
    # In the precision of the scores that answers are compared with, whatever this CPU does faster.
    arguments = ("--plan", plan, "--model", model, "--pinned-prefix", prefix, "--dtype", "float32")
    limits = ("--pool", "64MiB", "--logs", folder / "logs", "--max-waiting", 200)
    keys = {"BAKLAVA_API_KEYS": KEY, "BAKLAVA_ADMIN_KEYS": ADMIN}
    with serving(*arguments, *limits, folder=folder, key=KEY, env=keys) as running:
        yield running


@pytest.fixture(scope="module")
def name(server):
    return server.get("/v1/models").json()["data"][0]["id"]


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.base}/v1", api_key=KEY, max_retries=0, timeout=PATIENCE) as client:
        yield client


def test_openais_client_chats_at_once_and_in_a_stream(client, name):
    asked = {"model": name, "messages": [{"role": "user", "content": "Rivers?"}], "max_tokens": 12, "temperature": 0}
    whole_answer = client.chat.completions.create(**asked)
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    text = whole_answer.choices[0].message.content
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == text
    assert chunks[-1].usage == whole_answer.usage
    assert chunks[0].choices[0].delta.role == "assistant"


def test_openais_client_gets_several_answers_with_their_likelihoods(client, name):
    asked = {"model": name, "messages": [{"role": "user", "content": "Rivers?"}], "max_tokens": 6, "seed": 3}
    answer = client.chat.completions.create(**asked, n=3, logprobs=True, top_logprobs=4)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    for choice in answer.choices:
        assert all(len(token.top_logprobs) == 4 and token.logprob <= 0 for token in choice.logprobs.content)
    again = client.chat.completions.create(**asked, n=3)
    texts = [choice.message.content for choice in answer.choices]
    assert [choice.message.content for choice in again.choices] == texts
    assert len(set(texts)) > 1
    assert answer.usage.completion_tokens == 18


def test_openais_async_client_asks_for_many_answers_together(server, name):
    """A seed gives the same text alone and among others."""

    async def scene():
        async with openai.AsyncOpenAI(base_url=f"{server.base}/v1", api_key=KEY, timeout=PATIENCE) as client:

            async def ask(seed):
                answer = await client.completions.create(model=name, prompt="Once upon", max_tokens=24, seed=seed)
                return answer.choices[0].text

            alone = [await ask(seed) for seed in range(3)]
            return alone, await asyncio.gather(*(ask(seed % 3) for seed in range(9)))

    alone, together = asyncio.run(scene())
    assert together == alone * 3


def test_openais_client_completes_lists_of_prompts(client, name):
    answer = client.completions.create(model=name, prompt=["one", "two"], max_tokens=3, echo=True, temperature=0)
    assert [choice.text[:3] for choice in answer.choices] == ["one", "two"]


def test_openais_client_raises_its_own_errors(client, name):
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="other", prompt="x")
    with pytest.raises(openai.BadRequestError, match="maximum context length is 4096 tokens"):
        client.completions.create(model=name, prompt="x", max_tokens=5000)
    with pytest.raises(openai.BadRequestError, match="not support"):
        client.chat.completions.create(
            model=name, messages=[{"role": "user", "content": "x"}], response_format={"type": "json_object"}
        )
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").models.list()


def test_langchain_invokes_streams_and_batches(server, name):
    chat = ChatOpenAI(
        base_url=f"{server.base}/v1", api_key=KEY, model=name, max_tokens=8, temperature=0, timeout=PATIENCE
    )
    answer = chat.invoke([("system", SYSTEM), ("human", "The Danube?")])
    assert answer.usage_metadata["output_tokens"] == 8
    assert answer.usage_metadata["input_token_details"]["cache_read"] > len(SYSTEM)
    streamed = "".join(chunk.content for chunk in chat.stream([("system", SYSTEM), ("human", "The Danube?")]))
    assert streamed == answer.content
    assert len(chat.batch(["a", "b", "c"])) == 3


TEXTS = [
    (("The Danube is long. " * 20).strip(), " It ends in the Black Sea."),
    (("Rain falls on the hills. " * 12).strip(), " Then it runs down."),
    ("Once", " upon a time"),
]


@pytest.fixture(scope="module")
def scored(server, name):
    """What lm-evaluation-harness makes of the texts over HTTP."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPENAI_API_KEY", KEY)
        url = f"{server.base}/v1/completions"
        arguments = f"base_url={url},model={name},tokenizer_backend=remote,max_length=2048,num_concurrent=1"
        lm = LocalCompletionsAPI.create_from_arg_string(arguments, {"batch_size": 1, "auth_token": KEY})
        asked = [Instance("loglikelihood", {}, text, number) for number, text in enumerate(TEXTS)]
        return lm.loglikelihood(asked, disable_tqdm=True)


@pytest.fixture(scope="module")
def loaded(model):
    return load(str(model))


def in_process(loaded, plan):
    whole_texts = [loaded.tokenizer(context + rest)["input_ids"] for context, rest in TEXTS]
    return [
        score_suffix(loaded, plan, ids, len(rest.encode())) for ids, (_, rest) in zip(whole_texts, TEXTS, strict=True)
    ]


def test_the_harness_gets_what_the_budgeted_model_says_in_process(scored, loaded, plan):
    for (log_prob, greedy), expected in zip(scored, in_process(loaded, plan), strict=True):
        assert log_prob == pytest.approx(expected.log_prob, abs=2e-3)
        assert greedy == expected.is_greedy


def test_the_harness_does_not_get_what_the_full_cache_would_say(scored, loaded):
    dense = in_process(loaded, full_cache_plan(loaded.identity, loaded.geometry, 4096, bits=32))
    assert abs(scored[0][0] - dense[0].log_prob) > 0.1
    assert scored[2][0] == pytest.approx(dense[2].log_prob, abs=2e-3)  # a text that no budget cuts


VLLM_BENCH = {
    "completions": {
        "prompt": "Once upon a time",
        "temperature": 0.0,
        "repetition_penalty": 1.0,
        "max_tokens": 8,
        "logprobs": None,
        "stream": True,
        "stream_options": {"include_usage": True},
        "ignore_eos": True,
    },
    "chat/completions": {
        "messages": [{"role": "user", "content": [{"type": "text", "text": "Once upon a time"}]}],
        "temperature": 0.0,
        "max_completion_tokens": 8,
        "stream": True,
        "stream_options": {"include_usage": True},
        "ignore_eos": True,
    },
}
GUIDELLM = {
    "completions": {
        "prompt": "Once upon a time",
        "max_tokens": 8,
        "stop": None,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    },
    "chat/completions": {
        "messages": [{"role": "user", "content": [{"type": "text", "text": "Once upon a time"}]}],
        "max_completion_tokens": 8,
        "stop": None,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    },
}


@pytest.mark.parametrize("bodies", [VLLM_BENCH, GUIDELLM], ids=["vllm bench", "guidellm"])
@pytest.mark.parametrize("route", ["completions", "chat/completions"])
def test_load_generators_find_what_they_read(server, bodies, route):
    card = server.get("/v1/models").json()["data"][0]
    response = server.post(f"/v1/{route}", **bodies[route], model=card["root"])
    assert response.status_code == 200, response.text
    *events, done = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert done == "[DONE]"
    chunks = [json.loads(event) for event in events]
    tokens = [chunk for chunk in chunks if chunk["choices"] and not chunk["choices"][0]["finish_reason"]]
    assert len(tokens) == 8 + route.startswith("chat")
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == 8
    if bodies is GUIDELLM:
        assert all("usage" in chunk for chunk in chunks)


def test_a_declared_prompt_is_entered_once_and_changes_no_answer(server, name, client):
    asked = {"model": name, "max_tokens": 16, "temperature": 0}
    turns = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": "The Rhine?"}]
    answers = [client.chat.completions.create(**asked, messages=turns) for _ in range(2)]
    assert {answer.usage.prompt_tokens_details.cached_tokens for answer in answers} == {len(f"s:{SYSTEM};u:")}
    assert len({answer.choices[0].message.content for answer in answers}) == 1
    other = client.chat.completions.create(**asked, messages=turns[1:])
    assert other.usage.prompt_tokens_details.cached_tokens == 0


def test_two_hundred_streams_that_are_left_leave_nothing_behind(server):
    def held():
        return {
            replica: state["allocated_bytes"] - state["prefix_cache_bytes"]
            for replica, state in server.states().items()
        }

    async def scene():
        body = {"prompt": "Once upon a time " * 12, "max_tokens": 500, "ignore_eos": True}
        async with asking(server, connections=200) as client:
            left = await all_of(*(stream(client, body, stop_after=1 + number % 3) for number in range(200)))
        assert [error for error in left if isinstance(error, Exception)] == []

    until(server.idle)
    before = server.states()
    asyncio.run(scene())
    until(server.idle, 30)
    until(lambda: set(held().values()) == {0}, 30)
    after = server.states()
    assert {state["reserved_bytes"] for state in after.values()} == {
        state["reserved_bytes"] for state in before.values()
    }
    for name, state in after.items():
        counts = state["counts"]
        assert counts["cancelled"] - before[name]["counts"]["cancelled"] == 200
        assert counts["failed"] == before[name]["counts"]["failed"]
    assert server.post("/v1/completions", prompt="Once", max_tokens=1).status_code == 200


async def reports(client):
    """What every replica does now."""
    return (await client.get("/v1/plan")).json()["replicas"]


def test_what_is_kept_under_load_is_what_the_plan_says(server, plan):
    """A cache that was quietly dense would keep all that it saw."""

    async def scene():
        # Long enough that the first has not ended when the last enters, however fast the machine is.
        body = {"prompt": "x" * 1000, "max_tokens": 1500, "ignore_eos": True}
        async with asking(server) as client:
            tasks = [asyncio.create_task(stream(client, body)) for _ in range(8)]
            states = []
            while len(states) < 5 and not any(task.done() for task in tasks):
                await asyncio.sleep(0.1)
                states += [state for state in (await reports(client)).values() if state["running"] == 8]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            return states

    states = asyncio.run(scene())
    slots = sum(tokens for row in plan.tokens for tokens in row)
    interval = plan.eviction.eviction_interval * sum(len(row) for row in plan.tokens)
    # The last of the eight may still be entering, and is in no cache then.
    kept = [state["cached_entries"] for state in states]
    assert 7 * (slots - interval) <= max(kept) <= 8 * slots
    for state in states:
        assert state["allocated_bytes"] <= state["reserved_bytes"] <= state["pool_bytes"]
        assert state["full_entries"] > 5 * state["cached_entries"]


def test_a_swapped_plan_is_told_and_requests_under_way_end(server, plan, folder, model):
    other = small_plan(model, tokens=96)

    async def scene():
        body = {"prompt": "Once", "max_tokens": 600, "ignore_eos": True}
        async with asking(server) as client:
            tasks = [asyncio.create_task(stream(client, body)) for _ in range(6)]
            while sum(state["running"] for state in (await reports(client)).values()) < 6:
                await asyncio.sleep(0.05)
            refused = await client.post("/v1/plan", json={"plan": other.model_dump(mode="json")})
            headers = {"Authorization": f"Bearer {ADMIN}"}
            swapped = await client.post("/v1/plan", json={"plan": other.model_dump(mode="json")}, headers=headers)
            after = await client.post("/v1/completions", json={"prompt": "Once", "max_tokens": 1})
            return refused, swapped, after, [whole(await task) for task in tasks]

    refused, swapped, after, ended = asyncio.run(scene())
    assert refused.status_code == 403
    assert swapped.json()["digest"] == after.headers["x-baklava-plan"] == other.digest
    assert ended == [True] * 6
    plan.write(folder / "plan.json")
    server.process.send_signal(signal.SIGHUP)
    until(lambda: server.get("/v1/plan").json()["digest"] == plan.digest, 20)


def test_a_plan_that_cannot_be_read_changes_nothing(server, plan, folder):
    (folder / "plan.json").write_text("{")
    server.process.send_signal(signal.SIGHUP)
    until(lambda: "the plan stays as it is" in server.errors.read_text(), 20)
    plan.write(folder / "plan.json")
    assert BudgetPlan.read(folder / "plan.json").digest == server.get("/v1/plan").json()["digest"]


def test_the_log_has_a_line_per_request_and_nothing_that_was_said(server, folder):
    named = {"x-request-id": "from-the-test", **server.headers}
    body = {"prompt": SECRET, "max_tokens": 3, "ignore_eos": True}
    httpx.post(f"{server.base}/v1/completions", json=body, headers=named, timeout=PATIENCE).raise_for_status()
    text = "".join(path.read_text() for path in (folder / "logs").glob("*"))
    found = [json.loads(line) for line in text.splitlines() if '"from-the-test"' in line and '"request"' in line]
    lines = [line for line in found if line.get("message") == "request"]
    assert len(lines) == 1
    assert (lines[0]["status"], lines[0]["completion_tokens"]) == (200, 3)
    assert lines[0]["prompt_tokens"] == len(SECRET)
    assert lines[0]["first_token_seconds"] <= lines[0]["seconds"]
    assert SECRET not in text
    assert KEY not in text


def test_a_browser_sees_the_page_with_a_key(server):
    assert httpx.get(server.base, timeout=PATIENCE).headers["www-authenticate"].startswith("Basic")
    secret = base64.b64encode(f"me:{KEY}".encode()).decode()
    page = httpx.get(server.base, headers={"Authorization": f"Basic {secret}"}, timeout=PATIENCE)
    assert "Where the budget goes" in page.text


def test_serves_own_pages_are_not_there(server):
    for path in ("/-/routes", "/-/healthz"):
        assert httpx.get(server.base + path, timeout=PATIENCE).status_code == 404
