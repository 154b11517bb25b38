"""docs/reference/models.md says of every family what baklava does with it."""

import pytest
from model_table import COLUMNS, MODEL_TYPES, NOT_SMALL, PAGE, refusal, row, rows_of, support_of
from transformers import __version__

ROWS = rows_of(PAGE.read_text())
TRIED = [name for name, line in ROWS.items() if "| ? |" not in line]


def test_every_family_of_this_version_has_a_row() -> None:
    assert f"transformers {__version__} " in PAGE.read_text()
    assert list(ROWS) == MODEL_TYPES
    assert set(NOT_SMALL) <= set(ROWS) - set(TRIED)


@pytest.mark.parametrize("family", TRIED)
def test_a_family_is_refused_before_its_weights_are_read_if_and_as_the_page_says(family: str) -> None:
    sentence = refusal(family)
    if sentence is not None:
        assert ROWS[family] == row(family, (*("no",) * len(COLUMNS), sentence))


@pytest.mark.drill
@pytest.mark.parametrize("family", MODEL_TYPES)
def test_a_family_does_what_its_row_says(family: str) -> None:
    """If it does more by now, `python tests/helpers/model_table.py` writes the page anew."""
    assert row(family, support_of(family)) == ROWS[family]
