"""Names that stand for one thing each."""

from collections import Counter
from collections.abc import Hashable, Iterable


def given_twice(names: Iterable[Hashable]) -> str | None:
    """The first name that stands for two things, None where each stands for one."""
    return next((str(name) for name, times in Counter(names).items() if times > 1), None)
