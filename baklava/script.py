"""How a script ends."""

import sys
from collections.abc import Callable

from baklava.errors import UserError


def exit_code(name: str, run: Callable[[], object]) -> int:
    """Run a script; 0, 2 and one sentence where the user gave something wrong, 130 when Ctrl-C ended it."""
    try:
        run()
    except UserError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0
