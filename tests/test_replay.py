"""Facts about a tracking server that was away: it gets every trial once, at resume or when it is back."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient
from test_space import record, task
from test_tracking import SETTINGS, children

from baklava.errors import UserError
from tuning import replay
from tuning.journal import Journal
from tuning.replay import Sync
from tuning.tracking import Tracker
from tuning.trials import TrialRecord

DOWN = MlflowClient(tracking_uri="http://127.0.0.1:9")


@pytest.fixture(scope="module", autouse=True)
def data(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BAKLAVA_DATA", str(tmp_path_factory.mktemp("replay")))
        yield


class Search:
    """A journal, and what MLflow was told of it."""

    def __init__(self, folder: Path) -> None:
        self.tracker = Tracker.connect("demo")
        self.tracker.begin(SETTINGS, folder)
        self.journal: Journal[TrialRecord] = Journal(folder / "trials.jsonl")
        self.sync = Sync(self.tracker, self.journal, task())

    def ends(self, number: int) -> None:
        """A trial ends, and is recorded."""
        made = record(number, [0.1] * 4)
        self.journal.append(made)
        self.tracker.trial(made, task().plan(made.params), 1.0)

    def there(self) -> Counter[int]:
        """Numbers of the trials that MLflow has whole."""
        whole = [run for run in children(self.tracker) if run.info.status == "FINISHED"]
        assert len(whole) == len(children(self.tracker))
        return Counter(int(run.data.tags["baklava.trial"]) for run in whole)


@pytest.fixture
def search(tmp_path: Path) -> Search:
    return Search(tmp_path)


def test_what_was_missed_is_written_when_the_server_is_back_and_not_before_a_pause(
    search: Search, monkeypatch: pytest.MonkeyPatch
) -> None:
    search.ends(1)
    with monkeypatch.context() as down:
        down.setattr(search.tracker, "client", DOWN)
        search.ends(2)
        search.ends(3)
    search.sync.now_and_then()
    assert search.there() == Counter([1])
    monkeypatch.setattr(replay, "PAUSE", 0)
    search.sync.now_and_then()
    assert search.there() == Counter([1, 2, 3])
    search.ends(4)
    assert search.there() == Counter([1, 2, 3, 4])
    assert search.tracker.missed == []


def test_a_server_that_is_still_down_leaves_all_for_later(search: Search, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as down:
        down.setattr(search.tracker, "client", DOWN)
        search.ends(1)
        search.sync.at_last()
        search.ends(2)
    search.sync.at_last()
    assert search.there() == Counter([1, 2])


def test_a_trial_that_arrived_although_its_answer_was_lost_is_not_doubled(search: Search) -> None:
    search.ends(1)
    lost = search.journal.records[0]
    search.tracker.missed.append(lambda: search.tracker.trial(lost, None, 1.0))
    search.sync.at_last()
    assert search.there() == Counter([1])


def test_what_a_kill_left_half_written_is_replaced(search: Search) -> None:
    tags = {"mlflow.parentRunId": search.tracker.parent, "baklava.trial": "1"}
    search.tracker.client.create_run(search.tracker.experiment, tags=tags)
    search.journal.append(record(1, [0.1] * 4))
    search.sync.now()
    assert search.there() == Counter([1])


def test_a_disk_that_takes_no_more_leaves_the_journal_as_it_was_and_says_so(tmp_path: Path) -> None:
    full = tmp_path / "trials.jsonl"
    full.symlink_to("/dev/full")
    journal: Journal[TrialRecord] = Journal(full)
    with pytest.raises(UserError, match=r"cannot write to .* \(No space left on device\); make room there"):
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
