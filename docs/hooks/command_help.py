"""Replace `<!-- help: jobs/search.py -->` on a page by the output of `--help`, so that options are written once."""

import os
import re
import subprocess
import sys
from typing import Any

MARKER = re.compile(r"<!-- help: (jobs/\w+\.py(?: \w+)?) -->")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace each marker by a block with the help of its script."""
    return MARKER.sub(lambda match: f"```text\n{help_of(match[1])}\n```", markdown)


def help_of(script: str) -> str:
    """Return what a script prints for `--help`, 100 columns wide; a script that fails fails the build."""
    command = [sys.executable, *script.split(), "--help"]
    environment = os.environ | {"COLUMNS": "100", "NO_COLOR": "1"}
    return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout.strip()
