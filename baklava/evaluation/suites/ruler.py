"""RULER: needles, variables and words in synthetic texts of a given length (arXiv 2404.06654)."""

from dataclasses import dataclass
from typing import ClassVar

from typing_extensions import override

from baklava.data.hub_datasets import Row
from baklava.evaluation.suites.base import Suite, answers_tuple, with_leading_space
from baklava.evaluation.tasks.base import Prompt, Question


@dataclass(frozen=True)
class Ruler(Suite):
    """RULER as published for kvpress: one file per length with all thirteen tasks, context and question apart.

    A row's question and the beginning of its answer come after the context, as in RULER's own prompt; kvpress puts the
    chat template between them, which is not done here. The NLL is that of all answers in their order, except for `qa`,
    whose answers are one answer in several wordings. A context is never truncated, since that could remove what is
    asked for. Lengths are counted in tokens of the model that the rows were made for, so allow other models more.
    """

    name: ClassVar[str] = "ruler"
    files: ClassVar[str] = "hf://datasets/simonjegou/ruler/{length}/test-*.parquet"
    columns: ClassVar[tuple[str, ...]] = ("context", "question", "answer_prefix", "answer", "task", "max_new_tokens")
    datasets: ClassVar[tuple[str, ...]] = (
        *(f"niah_single_{number}" for number in (1, 2, 3)),
        *(f"niah_multikey_{number}" for number in (1, 2, 3)),
        *("niah_multivalue", "niah_multiquery", "vt", "cwe", "fwe", "qa_1", "qa_2"),
    )
    lengths: ClassVar[tuple[str, ...]] = ("4096", "8192", "16384")
    dataset_column: ClassVar[str | None] = "task"
    can_truncate: ClassVar[bool] = False

    @override
    def prompt(self, row: Row) -> Prompt:
        text = row["question"] + row["answer_prefix"]
        answers = answers_tuple(row["answer"])
        any_answer_counts = self.dataset.startswith("qa")
        question = Question(
            text,
            with_leading_space(text, answers[0] if any_answer_counts else ", ".join(answers)),
            answers,
            metric="contains_any" if any_answer_counts else "recall",
            max_new_tokens=row["max_new_tokens"],
        )
        return Prompt(self.label, row["context"], (question,))
