"""Facts about the cache and the data folder: which variable names them, and what happens if they take no file."""

import errno
import os
import tempfile
from pathlib import Path

import pytest

from baklava import paths
from baklava.errors import UserError
from baklava.paths import cache_dir, check_data_dir, check_temp_dir, data_dir, tracking_uri, write_to_cache
from baklava.serialization import atomic_write_text

VARIABLES = ("BAKLAVA_CACHE", "BAKLAVA_DATA", "XDG_CACHE_HOME", "XDG_DATA_HOME")


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def fail_with(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Let no temporary file be made."""

    def refuse(**_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)


def test_a_variable_may_begin_with_a_tilde_or_be_relative(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    monkeypatch.chdir(home)
    monkeypatch.setenv("XDG_CACHE_HOME", "~/there")
    assert cache_dir() == home / "there" / "baklava"
    monkeypatch.setenv("BAKLAVA_CACHE", "here")
    assert cache_dir() == home / "here"
    monkeypatch.setenv("BAKLAVA_CACHE", "~no-such-user/there")
    with pytest.raises(UserError, match="BAKLAVA_CACHE is ~no-such-user/there"):
        cache_dir()


def test_a_user_without_a_home_folder_has_the_root_as_home(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    assert data_dir() == Path("/.local/share/baklava")


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("BAKLAVA_DATA", "file", "file cannot be written (not a directory); set BAKLAVA_DATA to a writable folder"),
        ("XDG_DATA_HOME", "file", "set BAKLAVA_DATA to a writable folder; now it follows from XDG_DATA_HOME"),
        ("HOME", "file", "set BAKLAVA_DATA to a writable folder; now it follows from HOME"),
        ("HOME", "/proc/none", "/proc/none/.local/share/baklava cannot be written"),
    ],
)
def test_a_data_folder_that_takes_no_file_is_an_error_with_the_variable_in_effect(
    home: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str, words: str
) -> None:
    (home / "file").touch()
    monkeypatch.setenv(name, str(home / value))
    with pytest.raises(UserError) as caught:
        check_data_dir()
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("number", "words"),
    [(errno.EROFS, "(read-only file system); set"), (errno.ENOSPC, "(no space left on device); free some space, or")],
)
def test_the_remedy_fits_what_the_disk_lacks(monkeypatch: pytest.MonkeyPatch, number: int, words: str) -> None:
    fail_with(monkeypatch, number)
    with pytest.raises(UserError) as caught:
        check_data_dir()
    assert words in str(caught.value)


def test_no_remedy_names_a_variable_that_is_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HOME")
    assert paths.CACHE.remedy(PermissionError()) == (
        "set BAKLAVA_CACHE to a writable folder; now it follows from the home folder"
    )


def test_checking_a_folder_makes_none(home: Path) -> None:
    check_data_dir()
    assert list(home.iterdir()) == []


def test_what_cannot_be_cached_costs_one_warning(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (home / ".cache").touch()
    write_to_cache(cache_dir() / "texts" / "a.json", lambda path: atomic_write_text(path, "{}"))
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: {home}/.cache/baklava/texts/a.json cannot be written (")
    assert line.endswith("so it is made again; set BAKLAVA_CACHE to a writable folder; now it follows from HOME")


def test_a_full_disk_keeps_no_half_written_file(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write_half(path: Path, text: str) -> None:
        path.write_bytes(text.encode()[:1])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", write_half)
    with pytest.raises(OSError, match="No space"):
        atomic_write_text(home / "a.json", "{}")
    assert list(home.iterdir()) == []


def test_a_bug_in_what_writes_the_cache_is_not_hidden() -> None:
    def fail(path: Path) -> None:
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        write_to_cache(paths.cache_dir() / "a", fail)


@pytest.mark.parametrize("uri", ["sqlite:///~/mlflow.db", "~/mlruns"])
def test_a_tilde_in_the_tracking_uri_is_refused(monkeypatch: pytest.MonkeyPatch, uri: str) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(UserError, match=f"MLFLOW_TRACKING_URI is {uri}.*write the folder out"):
        tracking_uri()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://host/~team")
    assert tracking_uri() == "http://host/~team"


def test_without_a_folder_for_temporary_files_the_error_says_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    check_temp_dir()

    def none() -> str:
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found")

    monkeypatch.setattr(tempfile, "gettempdir", none)
    with pytest.raises(UserError, match="set TMPDIR"):
        check_temp_dir()
