"""The error that a user caused, and a check that leads to many of them."""

from collections import Counter
from collections.abc import Hashable, Iterable


class UserError(Exception):
    """One sentence for the user: the value, the rule that it breaks, and the remedy.

    Commands print it without a traceback and exit with code 2. It is not a ValueError, so that no handler of those
    hides it; a validator of pydantic raises ValueError instead.
    """


def first_duplicate(names: Iterable[Hashable]) -> str | None:
    """Return the first name that occurs more than once, None if all differ."""
    return next((str(name) for name, count in Counter(names).items() if count > 1), None)
