"""What the replicas of a server should do: which plan is active, and whether they drain."""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class DesiredState:
    """What every replica should do.

    Args:
        version: counts the plans; a higher one is newer.
        plan: JSON of the active plan, "" for the one that the server started with.
        draining: whether replicas take no more requests.
    """

    version: int = 0
    plan: str = ""
    draining: bool = False


INITIAL_STATE = DesiredState()
"""That of a server that has just started."""


class Coordinator:
    """Keeps the desired state for replicas that start later. An actor in a cluster, an ordinary object in tests.

    It knows nothing that the replicas do not know: if it restarts, the next replica that syncs restores it.
    """

    def __init__(self) -> None:
        self._desired = INITIAL_STATE

    def sync(self, applied: DesiredState) -> DesiredState:
        """Return the desired state, given what a replica has applied."""
        if applied.version > self._desired.version:
            self._desired = replace(applied, draining=applied.draining or self._desired.draining)
        return self._desired

    def publish_plan(self, plan: str) -> DesiredState:
        """Make a plan (JSON) the active one."""
        self._desired = replace(self._desired, version=self._desired.version + 1, plan=plan)
        return self._desired

    def drain(self) -> DesiredState:
        """Have all replicas drain."""
        self._desired = replace(self._desired, draining=True)
        return self._desired
