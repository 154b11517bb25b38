import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


def drill(*arguments: str) -> dict[str, Any]:
    script = Path(__file__).with_name("compiling.py")
    ran = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True, timeout=300, check=False)
    assert ran.returncode == 0, ran.stderr[-3000:]
    return json.loads(ran.stdout.strip().splitlines()[-1])


@pytest.mark.parametrize("eviction", ["streaming", "heavy_hitter"])
def test_compiled_decoding_gives_the_same_tokens_from_a_few_graphs(eviction: str) -> None:
    seen = drill(eviction)
    assert seen["equal"]
    assert 1 <= seen["graphs"] <= 4
    assert seen["breaks"] == 0
    assert seen["warnings"] == []


def test_without_a_compiler_decoding_goes_on_with_one_warning() -> None:
    seen = drill("streaming", "no-such-compiler")
    assert seen["equal"]
    assert len(seen["warnings"]) == 1
    assert "goes on uncompiled" in seen["warnings"][0]
