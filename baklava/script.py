"""How a script begins and ends."""

import os
import sys
from collections.abc import Callable

from baklava.errors import UserError


def exit_code(name: str, run: Callable[[], object]) -> int:
    """Run a script that reports to nobody; 0, 2 and one sentence where the user gave something wrong, 130 at Ctrl-C."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # read when the hub's library is first imported
    try:
        run()
    except UserError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0
