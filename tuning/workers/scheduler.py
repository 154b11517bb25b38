"""The pool: sends every (plan, window) to a replica that holds the window, and survives the death of any of them."""

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from math import lcm
from typing import Any

from ray.exceptions import ActorDiedError, RayActorError, RayError, RayTaskError

from baklava.errors import UserError

MAX_DEATHS_PER_TASK = 4
"""Deaths of a replica under one task after which the task is blamed: it may be what kills them."""

HEAL_PAUSE = 1.0  # seconds between two looks at a replica that is restarting
HEAL_DEATHS = 5
"""Deaths in a row, without an answer in between, after which a replica is given up."""


def assign_windows(replicas: int, windows: Sequence[str]) -> list[set[str]]:
    """Windows that each replica prefills: as many copies as make all shares equal, and every window somewhere."""
    held: list[set[str]] = [set() for _ in range(replicas)]
    for step in range(lcm(replicas, len(windows)) if windows else 0):
        held[step % replicas].add(windows[step % len(windows)])
    return held


@dataclass
class Member:
    """What the pool knows of one replica.

    `lost` is the reason why it will not come back, `kept` what it said last of windows that it has not at hand.
    """

    index: int
    actor: Any
    alive: bool = True
    busy: bool = False
    home: set[str] = field(default_factory=set)
    holds: set[str] = field(default_factory=set)
    lost: str | None = None
    kept: str | None = None
    warming: asyncio.Lock = field(default_factory=asyncio.Lock)


class WorkerScheduler:
    """Hands tasks to idle replicas, one at a time each. Runs as an async Ray actor without CPUs of its own.

    A window goes to a living replica that holds it, or waits for one; when none lives, any idle replica takes it over.
    No plan is scored twice on a window: equal plans are one text here, whatever parameters they came from.
    """

    def __init__(self, actors: Sequence[Any], windows: Mapping[str, Any], task: Any) -> None:
        self.members = [Member(index, actor) for index, actor in enumerate(actors)]
        self.task = task  # a `SearchTask`, whose import would load torch into the processes of the trials
        self.windows = windows  # by name, as references: Ray brings each to a replica's machine once
        self.plans: dict[str, str] = {}
        self.scores: dict[tuple[str, str], asyncio.Task[dict[str, Any]]] = {}
        self.changed = asyncio.Condition()
        self.healers: set[asyncio.Task[None]] = set()
        self.news: list[str] = []

    async def assign(self, windows: Sequence[str]) -> list[tuple[int, str]]:
        """Make these windows the ones to hold; returns the (replica, window) pairs to `warm`."""
        for member, home in zip(self.members, assign_windows(len(self.members), windows), strict=True):
            stale, member.home = member.holds - home, home
            member.holds -= stale
            if stale and member.alive:
                member.actor.forget.remote(tuple(stale))
        return [(member.index, window) for window in windows for member in self.members if window in member.home]

    async def warm(self, replica: int, window: str) -> str | None:
        """Prefill a window on one replica; returns why it could not be, which also a scored plan would meet.

        One at a time: plans to be scored would wait behind all that are sent at once.
        """
        member = self.members[replica]
        try:
            async with member.warming:
                await member.actor.warm.remote(self.windows[window])
        except RayActorError as death:
            await self._bury(member, death)
        except RayError as error:
            return error_summary(error)
        else:
            await self._holds(member, window)
        return None

    async def plan(self, params: dict[str, Any]) -> dict[str, Any]:
        """The plan of a trial as {"json", "size"}, or {"error": reason} where its knobs do not fit the budget."""
        try:
            plan = self.task.plan(params)
        except UserError as error:
            return {"error": str(error)}
        return {
            "json": self.plans.setdefault(plan.digest, plan.model_dump_json()),
            "size": {"ratio": plan.ratio, "bytes_per_sequence": plan.bytes_per_sequence},
        }

    async def recall(self, trials: Sequence[tuple[dict[str, Any], Sequence[dict[str, Any]]]]) -> None:
        """Take in scores that were recorded, each trial as its parameters and its windows' scores."""
        for params, scores in trials:
            plan = await self.plan(params)
            for score in scores if "json" in plan else ():
                self.scores[plan["json"], score["window"]] = asyncio.create_task(_same(score))

    async def score(self, plan_json: str, window: str) -> dict[str, Any]:
        """Scores of a plan on a window, or {"error": reason}; what is known or under way is not scored again."""
        key = (plan_json, window)
        if key not in self.scores:
            self.scores[key] = asyncio.create_task(self._score(plan_json, window))
        return await asyncio.shield(self.scores[key])  # who asked first may give up, others wait for it too

    async def _score(self, plan_json: str, window: str) -> dict[str, Any]:
        for _ in range(MAX_DEATHS_PER_TASK):
            member = await self._take(window)
            if member is None:
                return {"error": f"no replica is left: {'; '.join(m.lost for m in self.members if m.lost)}"}
            try:
                result = await member.actor.score.remote(plan_json, self.windows[window])
            except RayActorError as death:
                await self._bury(member, death)
            except RayError as error:
                await self._free(member)
                return {"error": error_summary(error)}
            else:
                await self._holds(member, window)
                await self._free(member)
                self._notice(member, result.pop("kept", None))
                return result
        return {"error": f"{MAX_DEATHS_PER_TASK} replicas died while they scored this plan on window {window}"}

    async def kept(self) -> list[str]:
        """Which replicas do not keep all their windows where they are used, as sentences."""
        told = []
        for member in self.members:
            with suppress(RayError):
                member.kept = await member.actor.told.remote() if member.alive else None
                told += [f"replica {member.index + 1} {member.kept}"] if member.kept else []
        return told

    async def tell(self) -> list[str]:
        """What happened to replicas since the last call, as sentences."""
        news, self.news = self.news, []
        return news

    def _notice(self, member: Member, kept: str | None) -> None:
        if kept and kept != member.kept:
            self.news.append(f"replica {member.index + 1} {kept}")
        member.kept = kept

    async def _take(self, window: str) -> Member | None:
        async with self.changed:
            await self.changed.wait_for(lambda: self._idle(window) or all(m.lost for m in self.members))
            member = self._idle(window)
            if member is not None:
                member.busy = True
            return member

    def _idle(self, window: str) -> Member | None:
        alive = [member for member in self.members if member.alive]
        holders = [member for member in alive if window in member.holds]
        # Where a window is only about to be held, waiting for that costs less than prefilling it elsewhere as well.
        homes = [member for member in alive if window in member.home]
        return next((member for member in holders or homes or alive if not member.busy), None)

    async def _holds(self, member: Member, window: str) -> None:
        async with self.changed:
            member.holds.add(window)
            self.changed.notify_all()

    async def _free(self, member: Member) -> None:
        async with self.changed:
            member.busy = False
            self.changed.notify_all()

    async def _bury(self, member: Member, death: RayActorError) -> None:
        async with self.changed:
            member.busy = False
            if member.alive:
                member.alive = False
                member.holds.clear()
                self.news.append(f"replica {member.index + 1} died; its work goes to the others until it is back")
                healer = asyncio.create_task(self._heal(member))
                self.healers.add(healer)  # the loop holds tasks only weakly
                healer.add_done_callback(self.healers.discard)
            self.changed.notify_all()

    async def _heal(self, member: Member) -> None:
        deaths, reason = 0, ""
        while deaths < HEAL_DEATHS:
            answered = False
            try:
                await member.actor.ready.remote()
                answered = True
                return await self._revive(member)
            except RayError as death:
                # Silence alone is no death: a model may take minutes to load, a cluster to find a new node.
                if answered or not isinstance(death, RayActorError) or isinstance(death, ActorDiedError):
                    deaths, reason = deaths + 1, error_summary(death)
            await asyncio.sleep(HEAL_PAUSE)
        await self._lose(member, reason)

    async def _revive(self, member: Member) -> None:
        # Without its windows a replica would stay idle: the others hold them all by now.
        home = sorted(member.home)
        for window in home:
            with suppress(RayTaskError):  # a window that cannot be prefilled is the trial's error, when one asks for it
                await member.actor.warm.remote(self.windows[window])
                member.holds.add(window)
        async with self.changed:
            member.alive = True
            self.news.append(f"replica {member.index + 1} is back")
            self.changed.notify_all()

    async def _lose(self, member: Member, reason: str) -> None:
        async with self.changed:
            member.lost = f"replica {member.index + 1}: {reason}"
            self.news.append(f"{member.lost}; it stays away")
            self.changed.notify_all()


async def _same(score: dict[str, Any]) -> dict[str, Any]:
    return score


def error_summary(error: Exception) -> str:
    """A remote error in one line: what it says to users, or the last line of its traceback."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, UserError):
        return str(cause)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
