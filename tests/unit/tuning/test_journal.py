"""Tests of the journal: a record is in the file completely, or not at all."""

from pathlib import Path

import pytest
from search_factory import record

from baklava.errors import UserError
from tuning.study.journal import Journal
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
