"""Memory of the host, or of the container that looks like one from inside."""

from pathlib import Path

import psutil

CONTROL_GROUP = Path("/sys/fs/cgroup")
"""Where Linux says what a container may use and what it does."""

LIMITS = ("memory.max", "memory/memory.limit_in_bytes")
USED = ("memory.current", "memory/memory.usage_in_bytes")


def total_host_bytes() -> int:
    """Bytes that there are."""
    present, limit = psutil.virtual_memory().total, _first(LIMITS)
    return present if limit is None else min(present, limit)


def available_host_bytes() -> int:
    """Bytes that could be allocated now."""
    free, limit, used = psutil.virtual_memory().available, _first(LIMITS), _first(USED)
    return free if limit is None or used is None else max(0, min(free, limit - used))


def _first(names: tuple[str, ...]) -> int | None:
    """The number in the first of these files that is there and holds one."""
    for path in (CONTROL_GROUP / name for name in names):
        try:
            text = path.read_text().strip()
        except OSError:
            continue
        return int(text) if text.isdecimal() else None
    return None
