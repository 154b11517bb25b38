"""Memory of the host, or of the container that this process runs in."""

from pathlib import Path

import psutil

CGROUP = Path("/sys/fs/cgroup")
"""Folder of the limits and the usage of a container on Linux."""

LIMIT_FILES = ("memory.max", "memory/memory.limit_in_bytes")
USAGE_FILES = ("memory.current", "memory/memory.usage_in_bytes")


def total_host_bytes() -> int:
    """Return the bytes of memory, limited to those of the container."""
    total, limit = psutil.virtual_memory().total, _read_first(LIMIT_FILES)
    return total if limit is None else min(total, limit)


def available_host_bytes() -> int:
    """Return the bytes that could be allocated now."""
    available = psutil.virtual_memory().available
    limit, used = _read_first(LIMIT_FILES), _read_first(USAGE_FILES)
    return available if limit is None or used is None else max(0, min(available, limit - used))


def _read_first(names: tuple[str, ...]) -> int | None:
    """Return the number in the first of these files that exists; None if it has none, such as `max`."""
    for path in (CGROUP / name for name in names):
        try:
            text = path.read_text().strip()
        except OSError:
            continue
        return int(text) if text.isdecimal() else None
    return None
