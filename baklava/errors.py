"""The error that a user caused."""

from collections import Counter
from collections.abc import Hashable, Iterable


class UserError(ValueError):
    """One sentence for the user: the value, the rule it breaks, and the remedy.

    Scripts print it without a traceback and exit with code 2.
    """


def first_duplicate(names: Iterable[Hashable]) -> str | None:
    """The first name that stands for two things, None where each stands for one."""
    return next((str(name) for name, times in Counter(names).items() if times > 1), None)
