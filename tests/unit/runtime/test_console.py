"""Argument types take what they say and refuse the rest in one sentence."""

import argparse
from collections.abc import Callable

import pytest

from baklava.console import port, positive_float, positive_int, replica_count


@pytest.mark.parametrize(
    ("parse", "text", "value"),
    [
        (positive_int, "12", 12),
        (positive_float, "0.5", 0.5),
        (positive_float, "1e3", 1000.0),
        (port, "65535", 65535),
        (replica_count, "auto", "auto"),
        (replica_count, "3", 3),
    ],
)
def test_an_argument_is_parsed(parse: Callable[[str], object], text: str, value: object) -> None:
    assert parse(text) == value


@pytest.mark.parametrize(
    ("parse", "texts"),
    [
        (positive_int, ["0", "-1", "1.5", "many", ""]),
        (positive_float, ["0", "-1", "nan", "inf", "many", ""]),
        (port, ["0", "65536", "http", "-1"]),
        (replica_count, ["-1", "some"]),
    ],
)
def test_other_arguments_are_refused(parse: Callable[[str], object], texts: list[str]) -> None:
    for text in texts:
        with pytest.raises(argparse.ArgumentTypeError, match=f"^{text} is not a "):
            parse(text)
