import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from baklava.profiling.source_digest import source_digest

Digest = Callable[[dict[str, str]], str]

FILES = {
    "__init__": "",
    "formulas": "from sourced import factors\nfrom sourced.sums import add\n\nSUM = add(factors.TWO, 1)\n",
    "factors": "TWO = 2\n",
    "sums": "import math\n\ndef add(x, y): return math.fsum((x, y))\n",
    "unrelated": "UNUSED = 1\n",
}


@pytest.fixture
def digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Digest:
    """Digest of `sourced.formulas` after these modules were changed."""
    (tmp_path / "sourced").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "sourced", raising=False)

    def of(changed: dict[str, str]) -> str:
        for name, code in (FILES | changed).items():
            (tmp_path / "sourced" / f"{name}.py").write_text(code)
        source_digest.cache_clear()
        return source_digest("sourced.formulas")

    return of


@pytest.mark.parametrize("name", ["__init__", "formulas", "factors", "sums"])
def test_changed_code_of_the_module_or_of_what_it_imports_changes_the_digest(digest: Digest, name: str) -> None:
    assert digest({name: FILES[name] + "THREE = 3\n"}) != digest({})


@pytest.mark.parametrize(
    "changed",
    [
        {"unrelated": "UNUSED = 2\n"},
        {"factors": '"""Factors."""\n\nTWO  =  2  # a comment\n"""Twice."""\n'},
        {"sums": 'import math\n\ndef add(x, y):\n    """Add."""\n    return math.fsum((x, y))\n'},
    ],
)
def test_comments_docstrings_and_other_modules_do_not_change_the_digest(
    digest: Digest, changed: dict[str, str]
) -> None:
    assert digest(changed) == digest({})
