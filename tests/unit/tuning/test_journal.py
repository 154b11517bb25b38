"""Facts about the journal: a record is in the file whole, or not at all."""

from pathlib import Path

import pytest
from search_factory import record

from baklava.errors import UserError
from tuning.study.journal import Journal
from tuning.study.trial import TrialRecord


def test_a_disk_that_takes_no_more_leaves_the_journal_as_it_was_and_says_so(tmp_path: Path) -> None:
    full = tmp_path / "trials.jsonl"
    full.symlink_to("/dev/full")
    journal: Journal[TrialRecord] = Journal(full)
    with pytest.raises(UserError, match=r"cannot write to .* \(No space left on device\); free some space there"):
        journal.append(record(1, [0.1] * 4))
    assert journal.records == []


def test_a_record_that_was_written_in_part_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal: Journal[TrialRecord] = Journal(tmp_path / "trials.jsonl")
    journal.append(record(1, [0.1] * 4))
    whole = journal.path.read_bytes()

    def fails(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as full:
        full.setattr("os.fsync", fails)
        with pytest.raises(UserError):
            journal.append(record(2, [0.1] * 4))
    assert journal.path.read_bytes() == whole
    journal.append(record(2, [0.1] * 4))
    assert [each.trial for each in Journal.read(journal.path, TrialRecord.model_validate_json)] == [1, 2]
