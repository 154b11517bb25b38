"""Facts about commands: their arguments, their log, and what ends them."""

import argparse
import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from baklava.console import log, port, positive_float, positive_int, replica_count, run_cli, share, shell_command


@pytest.mark.parametrize(
    ("parse", "text", "value"),
    [
        (positive_int, "12", 12),
        (positive_float, "0.5", 0.5),
        (positive_float, "1e3", 1000.0),
        (share, "0.125", 0.125),
        (share, "12.5%", 0.125),
        (share, " 30 % ", 0.3),
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
        (share, ["nan", "inf%", "many", "%", "25%%", "25%5", ""]),
        (port, ["0", "65536", "http", "-1"]),
        (replica_count, ["-1", "some"]),
    ],
)
def test_other_arguments_are_refused(parse: Callable[[str], object], texts: list[str]) -> None:
    for text in texts:
        with pytest.raises(argparse.ArgumentTypeError, match=f"^{text} is not a "):
            parse(text)


@pytest.fixture
def _default_hangup() -> Iterator[None]:
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("_default_hangup")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_sigterm_and_the_end_of_the_terminal_end_a_command_in_order_as_ctrl_c_does(number: int) -> None:
    ended = []

    def work() -> None:
        try:
            os.kill(os.getpid(), number)
            time.sleep(60)
        finally:
            ended.append(True)

    assert run_cli("baklava-search", work) == 130
    assert ended == [True]
    assert signal.getsignal(number) is signal.SIG_DFL


@pytest.mark.usefixtures("_default_hangup")
def test_a_command_under_nohup_outlives_its_terminal() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    assert run_cli("baklava-search", lambda: os.kill(os.getpid(), signal.SIGHUP)) == 0


def test_a_command_is_named_as_the_shell_finds_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script = tmp_path / ".venv" / "bin" / "baklava-serve"
    script.parent.mkdir(parents=True)
    monkeypatch.setattr(sys, "executable", str(script.with_name("python")))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "/usr/bin")
    assert shell_command("baklava-serve") == "baklava-serve"  # there is no such file
    script.write_text("#!/bin/sh\n")
    script.chmod(0o755)
    assert shell_command("baklava-serve") == ".venv/bin/baklava-serve"
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert shell_command("baklava-serve") == str(script)
    monkeypatch.setenv("PATH", str(script.parent))
    assert shell_command("baklava-serve") == "baklava-serve"


def test_a_line_that_cannot_be_written_ends_no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    with open("/dev/full", "w", buffering=1) as full:
        monkeypatch.setattr(sys, "stderr", full)
        log("a line")
        monkeypatch.undo()
        with contextlib.suppress(OSError):
            full.close()
