"""Facts about the folders and processes of a Ray cluster that is started here."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from ray._private import services, utils

from baklava.errors import UserError
from baklava.runtime import ray_session
from baklava.runtime.ray_session import (
    MAX_TEMP_DIR_BYTES,
    _deferred_interrupt,
    _local_temp_dir,
    _own_signals,
    _provide_token,
    starts_cluster,
)

LONG = "/tmp/" + "x" * 94


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TMPDIR", "RAY_TMPDIR", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)


def test_ctrl_c_while_ray_starts_takes_effect_when_it_has_started() -> None:
    handler, done = signal.signal(signal.SIGINT, signal.default_int_handler), []

    def start() -> None:
        with _deferred_interrupt():
            signal.raise_signal(signal.SIGINT)
            done.append("started")

    try:
        with pytest.raises(KeyboardInterrupt):
            start()
        assert done == ["started"]
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, handler)


def test_an_interrupt_that_is_ignored_stays_ignored() -> None:
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with _deferred_interrupt():
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, handler)


def test_the_longest_folder_leaves_space_for_the_name_of_a_socket() -> None:
    socket = "/ray/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store"
    assert MAX_TEMP_DIR_BYTES + len(socket) == 107


def test_ray_keeps_its_files_in_tmpdir(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert _local_temp_dir() == Path("/tmp")
    monkeypatch.setenv("TMPDIR", "/dev/shm/./")
    assert _local_temp_dir() == Path("/dev/shm")


@pytest.mark.parametrize(
    ("folder", "reason"), [(LONG, "path of 99 bytes"), ("/proc/none", "be written"), ("/dev/null", "not a directory")]
)
def test_a_tmpdir_that_ray_cannot_use_is_passed_over(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: str, reason: str
) -> None:
    monkeypatch.setenv("TMPDIR", folder)
    assert _local_temp_dir() == Path("/tmp")
    line = capsys.readouterr().err
    assert line.startswith("ray: keeps its files in /tmp, since TMPDIR ")
    assert reason in line


@pytest.mark.parametrize("folder", [LONG, "/proc/none", "/dev/null"])
def test_a_ray_tmpdir_that_ray_cannot_use_is_an_error_that_names_it(
    monkeypatch: pytest.MonkeyPatch, folder: str
) -> None:
    monkeypatch.setenv("RAY_TMPDIR", folder)
    with pytest.raises(UserError, match=rf"RAY_TMPDIR, since {folder} .*at most 39 bytes, or unset it"):
        _local_temp_dir()


def test_without_any_folder_the_error_says_which_variable_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_session, "_why_unusable", lambda folder: "cannot be written (read-only file system)")
    with pytest.raises(UserError, match=r"since /tmp cannot be written \(read-only file system\); set RAY_TMPDIR"):
        _local_temp_dir()


def test_a_home_folder_that_takes_no_token_is_no_obstacle(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    _provide_token()
    assert "RAY_AUTH_TOKEN" not in os.environ  # Ray stores one
    monkeypatch.setenv("HOME", "/proc/none")
    _provide_token()
    token = os.environ["RAY_AUTH_TOKEN"]
    assert len(token) == 64
    _provide_token()
    assert os.environ["RAY_AUTH_TOKEN"] == token
    del os.environ["RAY_AUTH_TOKEN"]


def test_this_process_handles_its_signals_and_those_of_its_group_do_not_reach_ray() -> None:
    original, handler = services.ConsolePopen, signal.getsignal(signal.SIGTERM)
    with _own_signals():
        process = services.ConsolePopen(["sleep", "60"])
        utils.set_sigterm_handler(lambda number, frame: sys.exit(number))
    try:
        assert os.getpgid(process.pid) == os.getsid(process.pid) == process.pid != os.getpgrp()
    finally:
        process.kill()
        process.wait()
    assert signal.getsignal(signal.SIGTERM) is handler
    assert services.ConsolePopen is original
    assert issubclass(original, subprocess.Popen)


@pytest.mark.parametrize(("address", "starts"), [(None, True), ("", True), ("local", True), ("auto", False)])
def test_a_session_starts_a_cluster_unless_an_address_names_one(
    monkeypatch: pytest.MonkeyPatch, address: str | None, starts: bool
) -> None:
    if address is not None:
        monkeypatch.setenv("RAY_ADDRESS", address)
    assert starts_cluster() == starts
