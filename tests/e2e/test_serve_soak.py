"""A soak: requests of mixed lengths for half an hour; bytes stay within reservations, memory stays flat.

`make soak` runs it; BAKLAVA_SOAK_MINUTES makes it shorter.
"""

import asyncio
import os
import random
import time
from pathlib import Path

import httpx
import pytest
from search_process import descendants
from server_process import asking, serving, small_model, small_plan, stream, until, whole

from baklava.runtime.prefill import prefill_workspace_bytes

pytestmark = [pytest.mark.drill, pytest.mark.soak, pytest.mark.ray]

MINUTES = float(os.environ.get("BAKLAVA_SOAK_MINUTES", "30"))
CLIENTS = 12
SLACK = 48 << 20  # bytes that a process may grow by: allocators keep what they once had


class Tally:
    """What came of the requests so far."""

    def __init__(self) -> None:
        self.whole = self.left = self.refused = 0
        self.broken: list[object] = []
        self.memory: list[int] = []

    @property
    def growth(self) -> int:
        """Bytes by which the second half of the looks at the memory is above the first, in the median."""
        half = len(self.memory) // 2
        early, late = sorted(self.memory[half // 2 : half]), sorted(self.memory[half:])
        return late[len(late) // 2] - early[len(early) // 2]


def body(source: random.Random) -> dict:
    """A request as it may come: short or long, greedy or not, alone or several."""
    return {
        "prompt": "".join(chr(source.randrange(97, 123)) for _ in range(int(2 ** source.uniform(0, 11)))),
        "max_tokens": int(2 ** source.uniform(0, 9)),
        "temperature": source.choice([0, 0.7, 1.0]),
        "n": source.choice([1, 1, 1, 2]),
        "logprobs": source.choice([None, None, 2]),
        "stop": source.choice([None, "q", ["zz", "\n"]]),
        "echo": source.random() < 0.1,
        "seed": source.randrange(1000),
    }


async def one_client(client: httpx.AsyncClient, number: int, until_: float, tally: Tally) -> None:
    source = random.Random(number)
    while time.monotonic() < until_:
        leaves = source.choice([None, None, None, 1, 5])
        try:
            lines = await stream(client, body(source), stop_after=leaves)
        except httpx.HTTPStatusError as error:
            tally.refused += 1
            if error.response.status_code != 429:
                tally.broken.append(error)
            await asyncio.sleep(0.5)
            continue
        if leaves is not None:
            tally.left += 1
        elif whole(lines):
            tally.whole += 1
        else:
            tally.broken.append(lines[-3:])


def resident(pid: int) -> int:
    """Bytes of memory of a process."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


async def look(client: httpx.AsyncClient, pid: int, until_: float, tally: Tally) -> None:
    while time.monotonic() < until_:
        for state in (await client.get("/v1/plan")).json()["replicas"].values():
            if not state["allocated_bytes"] <= state["reserved_bytes"] <= state["pool_bytes"]:
                tally.broken.append(state)
        tally.memory.append(resident(pid))
        await asyncio.sleep(min(5.0, MINUTES * 60 / 40))


@pytest.mark.timeout(MINUTES * 60 + 600)
def test_a_server_stays_within_its_reservations_for_half_an_hour(tmp_path):
    model = small_model(tmp_path / "model")
    plan = small_plan(model)
    plan.write(tmp_path / "plan.json")
    longest_prefill = prefill_workspace_bytes(plan, 2048, itemsize=4)
    pool = plan.bytes_for(4096) * 8 + longest_prefill
    arguments = ("--plan", tmp_path / "plan.json", "--model", model, "--pool", pool, "--max-waiting", 8)
    with serving(*arguments, folder=tmp_path) as server:
        (pid,) = [pid for pid, title in descendants(server.process.pid) if title.startswith("ray::ServeReplica")]
        tally, end = Tally(), time.monotonic() + MINUTES * 60

        async def scene() -> None:
            async with asking(server) as client:
                clients = (one_client(client, number, end, tally) for number in range(CLIENTS))
                await asyncio.gather(look(client, pid, end, tally), *clients)

        asyncio.run(scene())
        until(server.idle, 60)
        (state,) = server.states().values()
        print(
            f"{tally.whole} whole, {tally.left} left, {tally.refused} refused; {tally.growth / 2**20:+.1f} MiB;", state
        )
        assert tally.broken == []
        assert tally.whole > 10 * MINUTES
        assert tally.left > MINUTES
        assert tally.growth < SLACK
        assert state["allocated_bytes"] == state["reserved_bytes"] == 0
        assert 0 < state["peak_bytes"] <= state["pool_bytes"]
        assert state["counts"]["failed"] == 0
