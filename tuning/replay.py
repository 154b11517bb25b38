"""What MLflow missed while it was away, written again from `trials.jsonl`."""

import time
from collections.abc import Iterator

from mlflow.entities import Run

from baklava.progress import say
from tuning.journal import Journal
from tuning.server import PARENT_TAG, WRITE_ERRORS
from tuning.task import Task
from tuning.tracking import Tracker
from tuning.trials import TrialRecord

PAUSE = 30.0
"""Seconds between two tries of a server that is down: a trial should not wait for it, and it may be away for hours."""

PAGE = 1000


class Sync:
    """Brings the children of a search's parent run in line with its journal: none missing, none twice."""

    def __init__(self, tracker: Tracker, journal: Journal[TrialRecord], task: Task) -> None:
        self.tracker, self.journal, self.task = tracker, journal, task
        self.tried = time.monotonic()

    def now_and_then(self) -> None:
        """Once in a while, where something could not be written."""
        if self.tracker.missed and time.monotonic() - self.tried >= PAUSE:
            self.now()

    def at_last(self) -> None:
        """Where something could not be written, whether it was just tried or not."""
        if self.tracker.missed:
            self.now()

    def now(self) -> None:
        """Write what the server lacks, if it answers."""
        self.tried = time.monotonic()
        try:
            there = self._whole()
        except WRITE_ERRORS:
            return
        lacking = [record for record in self.journal.records if record.trial not in there]
        # These were kept for the end, and one may have arrived although its answer did not.
        self.tracker.missed.clear()
        for record in lacking:
            plan = None if record.status == "failed" else self.task.plan(record.params)
            self.tracker.trial(record, plan, record.metrics.get("seconds", 0.0))
        if lacking and not self.tracker.missed:
            say(f"mlflow: {len(lacking)} trials written that it lacked")

    def _whole(self) -> set[int]:
        """Numbers of the trials that the server has; what a kill left half written is deleted there."""
        numbers: set[int] = set()
        for run in self._children():
            number = int(run.data.tags.get("baklava.trial", 0))
            if run.info.status == "RUNNING" or number in numbers:
                self.tracker.client.delete_run(run.info.run_id)
            else:
                numbers.add(number)
        return numbers

    def _children(self) -> Iterator[Run]:
        wanted, token = f"tags.`{PARENT_TAG}` = '{self.tracker.parent}'", None
        while True:
            page = self.tracker.client.search_runs(
                [self.tracker.experiment], wanted, max_results=PAGE, page_token=token
            )
            yield from list(page)
            token = page.token
            if not token:
                return
