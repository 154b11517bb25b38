"""A worker for torch.compile."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any


def drill(*arguments: str) -> dict[str, Any]:
    script = Path(__file__).parents[2] / "helpers" / "torch_compile_worker.py"
    ran = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True, timeout=300, check=False)
    assert ran.returncode == 0, ran.stderr[-3000:]
    return json.loads(ran.stdout.strip().splitlines()[-1])
