"""Drills of a server: a full queue, deadlines, a replica that dies under load, a stop in the middle, growth."""

import asyncio
import os
import signal
import time

import httpx
import pytest
from search_process import descendants
from server_process import PATIENCE, Running, all_of, asking, serving, small_model, small_plan, stream, until, whole

from baklava.runtime.prefill import prefill_workspace_bytes

pytestmark = [pytest.mark.drill, pytest.mark.ray]

LONG = {"prompt": "Once upon a time " * 8, "max_tokens": 800, "ignore_eos": True}
SHORT = {"prompt": "Once", "max_tokens": 4, "ignore_eos": True}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return small_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def plan(model):
    return small_plan(model)


@pytest.fixture
def start(model, plan, tmp_path):
    """Start a server under the plan with these arguments."""
    plan.write(tmp_path / "plan.json")
    return lambda *more: serving("--plan", tmp_path / "plan.json", "--model", model, *more, folder=tmp_path)


def ready(server: Running) -> bool:
    try:
        return httpx.get(f"{server.base}/ready", timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


def replicas(server: Running) -> list[int]:
    """Process ids of the replicas."""
    return [pid for pid, title in descendants(server.process.pid) if title.startswith("ray::ServeReplica")]


def pool_for(plan, sequences):
    """Return the bytes of a pool for so many long sequences, and for the prefill of the last of them."""
    return plan.bytes_for(1000) * sequences + prefill_workspace_bytes(plan, len(LONG["prompt"]), itemsize=4) + 1000


def test_a_full_queue_rejects_requests_until_there_is_space(start, plan):
    """As many run as fit, two wait, and the others learn when to retry."""

    async def scene(server):
        async with asking(server) as client:

            async def ask():
                return await client.post("/v1/completions", json=LONG)

            running = [asyncio.create_task(ask()) for _ in range(2)]
            while True:
                (state,) = (await client.get("/v1/plan")).json()["replicas"].values()
                if state["running"] == 2:
                    break
                await asyncio.sleep(0.05)
            return await all_of(*(ask() for _ in range(8))), await all_of(*running)

    with start("--pool", pool_for(plan, 2), "--max-waiting", 2) as server:
        answers, first = asyncio.run(scene(server))
        refused = [answer for answer in answers if answer.status_code == 429]
        assert len(refused) == 6
        assert {answer.json()["error"]["code"] for answer in refused} == {"queue_full"}
        assert min(int(answer.headers["retry-after"]) for answer in refused) >= 1
        assert {answer.status_code for answer in [*first, *answers] if answer not in refused} == {200}
        (state,) = server.states().values()
        assert state["peak_bytes"] <= state["pool_bytes"]
        assert state["counts"]["failed"] == 0
        assert server.post("/v1/completions", **SHORT).status_code == 200


def test_a_request_that_can_never_fit_is_rejected(start, plan):
    with start("--pool", pool_for(plan, 1)) as server:
        refused = server.post("/v1/completions", **LONG | {"n": 16})
        assert refused.status_code == 400
        assert "bytes" in refused.json()["error"]["message"]
        assert server.post("/v1/completions", **SHORT).status_code == 200


def test_a_request_ends_at_its_deadline_wherever_it_is(start, plan):
    with start("--pool", pool_for(plan, 1), "--timeout", 2) as server:
        until(server.idle)

        async def scene():
            async with asking(server) as client:
                endless = SHORT | {"max_tokens": 4000}
                return await all_of(*(client.post("/v1/completions", json=endless) for _ in range(3)))

        began = time.monotonic()
        answers = asyncio.run(scene())
        assert time.monotonic() - began < 30
        assert {answer.status_code for answer in answers} == {408}
        assert {answer.json()["error"]["code"] for answer in answers} == {"deadline"}
        until(server.idle, 20)


def test_a_replica_that_dies_under_load_takes_no_other_with_it(start):
    """Streams of the other replica end as they should; those of the dead one end with an error that may be retried."""

    async def scene(server):
        async with asking(server) as client:
            tasks = [asyncio.create_task(stream(client, LONG)) for _ in range(16)]
            await asyncio.sleep(2)
            os.kill(replicas(server)[0], signal.SIGKILL)
            during = []
            while not all(task.done() for task in tasks):
                during.append((await client.post("/v1/completions", json=SHORT)).status_code)
                await asyncio.sleep(0.2)
            return await all_of(*tasks), during

    with start("--pool", "16MiB", "--replicas", 2) as server:
        until(lambda: len(server.states()) == 2)
        before = set(server.states())
        ended, during = asyncio.run(scene(server))
        good = [lines for lines in ended if isinstance(lines, list) and whole(lines)]
        broken = [lines for lines in ended if lines not in good]
        assert len(good) >= 4
        assert broken
        for lines in broken:
            assert isinstance(lines, httpx.HTTPStatusError | list)
            if isinstance(lines, list):
                assert lines[-1] == "data: [DONE]"
                assert '"error"' in lines[-2]
            else:
                assert lines.response.status_code == 503
                assert int(lines.response.headers["retry-after"]) >= 1
        assert during.count(200) > len(during) / 2
        assert set(during) <= {200, 503}
        until(lambda: len(replicas(server)) == 2)
        until(lambda: len(set(server.states()) - before) == 1)
        assert ready(server)


def test_readiness_is_honest_while_the_only_replica_is_away(start):
    with start("--pool", "16MiB") as server:
        assert ready(server)
        os.kill(replicas(server)[0], signal.SIGKILL)
        # The first look may still be cut off by the death itself; none says ready before there is a new replica.
        seen = []
        until(lambda: seen.append(ready(server)) or seen[-1], 120)
        assert seen[0] is False
        assert server.post("/v1/completions", **SHORT).status_code == 200


def test_a_stop_finishes_streams_and_rejects_new_requests(start):
    async def scene(server):
        async with asking(server) as client:
            tasks = [asyncio.create_task(stream(client, LONG)) for _ in range(4)]
            await asyncio.sleep(1)
            os.killpg(server.process.pid, signal.SIGTERM)
            await asyncio.sleep(1.5)
            late = [await client.get("/ready"), await client.post("/v1/completions", json=SHORT)]
            return late, [whole(await task) for task in tasks]

    with start("--pool", "16MiB", "--replicas", 2) as server:
        late, ended = asyncio.run(scene(server))
        assert [answer.status_code for answer in late] == [503, 503]
        assert late[1].json()["error"]["code"] in ("draining", "unavailable")
        assert ended == [True] * 4
        assert server.process.wait(PATIENCE) == 0


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_stops_at_once(start, second):
    async def scene(server):
        async with asking(server) as client:
            task = asyncio.create_task(stream(client, LONG | {"max_tokens": 3500}))
            await asyncio.sleep(1)
            for number in (signal.SIGTERM, second):
                os.killpg(server.process.pid, number)
                until(lambda: "stopping" in server.errors.read_text())
            await all_of(task)

    with start("--pool", "16MiB") as server:
        asyncio.run(scene(server))
        assert server.process.wait(PATIENCE) == 130
        assert server.errors.read_text().splitlines()[-1] == "stopping at once: requests that still run are cut off"


def test_replicas_are_added_while_the_pool_is_full(start, plan):
    async def scene(server):
        async with asking(server) as client:
            tasks = [asyncio.create_task(client.post("/v1/completions", json=LONG)) for _ in range(10)]
            seen = 1
            while not all(task.done() for task in tasks):
                seen = max(seen, len((await client.get("/v1/plan")).json()["replicas"]))
                await asyncio.sleep(0.5)
                if seen == 1 and any(task.done() for task in tasks):  # keep it full
                    tasks.append(asyncio.create_task(client.post("/v1/completions", json=LONG)))
            return seen, [(await task).status_code for task in tasks]

    with start("--pool", pool_for(plan, 2), "--autoscale", 2) as server:
        seen, statuses = asyncio.run(scene(server))
        assert seen == 2
        assert set(statuses) == {200}
