"""Tests of the journal: a record is in the file completely, or not at all."""

import errno
import os
from pathlib import Path

import pytest
from search_factory import record

from baklava.errors import UserError
from tuning.study.journal import Journal, check_json_file, check_new_run_dir, disk_errors_as_user_errors
from tuning.study.trial import TrialRecord


def test_a_full_disk_leaves_the_journal_as_it_was_and_raises(tmp_path: Path) -> None:
    full = tmp_path / "trials.jsonl"
    full.symlink_to("/dev/full")
    journal: Journal[TrialRecord] = Journal(full)
    with pytest.raises(UserError, match=r"cannot write to .* \(No space left on device\); free some space there"):
        journal.append(record(1, [0.1] * 4))
    assert journal.records == []


def test_a_partly_written_record_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal: Journal[TrialRecord] = Journal(tmp_path / "trials.jsonl")
    journal.append(record(1, [0.1] * 4))
    before = journal.path.read_bytes()

    def fails(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as full:
        full.setattr("os.fsync", fails)
        with pytest.raises(UserError):
            journal.append(record(2, [0.1] * 4))
    assert journal.path.read_bytes() == before
    journal.append(record(2, [0.1] * 4))
    assert [one.trial for one in Journal.read(journal.path, TrialRecord.model_validate_json)] == [1, 2]


@pytest.mark.parametrize(
    ("place", "reason"), [("/proc/none/run", "no such file"), ("/dev/null/run", "not a directory")]
)
def test_an_out_folder_that_cannot_be_written_is_refused(place: str, reason: str) -> None:
    with pytest.raises(UserError, match=rf"--out {place} cannot be written \({reason}.*choose another folder"):
        check_new_run_dir(Path(place), "search")


def test_a_json_file_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    check_json_file(tmp_path / "scores.json")
    assert list(tmp_path.iterdir()) == []
    for path in (tmp_path, tmp_path / "none" / "scores.json", Path("/proc/scores.json")):
        with pytest.raises(UserError, match=f"--json {path} cannot be written"):
            check_json_file(path)


def test_a_json_file_that_exists_is_asked_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(folder: Path) -> None:
        raise PermissionError(errno.EACCES, f"{folder} takes no files")

    monkeypatch.setattr("tuning.study.journal.check_writable", refuse)
    check_json_file(Path("/dev/null"))
    with monkeypatch.context() as read_only:
        read_only.setattr(Path, "open", lambda path, mode: refuse(path))
        with pytest.raises(UserError, match="--json /dev/null cannot be written"):
            check_json_file(Path("/dev/null"))


@pytest.mark.parametrize(("number", "remedy"), [(errno.ENOSPC, "free some space"), (errno.EROFS, "make it writable")])
def test_a_disk_that_takes_no_more_is_an_error_with_what_helps(tmp_path: Path, number: int, remedy: str) -> None:
    with pytest.raises(UserError, match=remedy), disk_errors_as_user_errors(tmp_path):
        raise OSError(number, os.strerror(number))
    with pytest.raises(FileNotFoundError), disk_errors_as_user_errors(tmp_path):
        (tmp_path / "none").read_bytes()
