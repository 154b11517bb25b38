"""RULER: needles, variables and words in synthetic texts of a given length (arXiv 2404.06654)."""

from dataclasses import dataclass
from typing import ClassVar

from typing_extensions import override

from baklava.data.hub_datasets import Row
from baklava.evaluation.suites.base import Suite, answer_behind, listed
from baklava.evaluation.tasks.base import Prompt, Question


@dataclass(frozen=True)
class Ruler(Suite):
    """RULER as published for kvpress: all thirteen tasks in one file a length, with context and question apart.

    A row's question and the beginning of its answer are asked behind the context, as they stand in RULER's own prompt;
    in kvpress the chat template comes between them, here it does not. The NLL is that of all answers in their order,
    but for `qa`, whose answers are the same one in several words. A context is never cut, since what is asked for would
    go with it; lengths are counted in the tokens of the model it was made for, so leave others more room.
    """

    name: ClassVar[str] = "ruler"
    files: ClassVar[str] = "hf://datasets/simonjegou/ruler/{length}/test-*.parquet"
    columns: ClassVar[tuple[str, ...]] = ("context", "question", "answer_prefix", "answer", "task", "max_new_tokens")
    known: ClassVar[tuple[str, ...]] = (
        *(f"niah_single_{number}" for number in (1, 2, 3)),
        *(f"niah_multikey_{number}" for number in (1, 2, 3)),
        *("niah_multivalue", "niah_multiquery", "vt", "cwe", "fwe", "qa_1", "qa_2"),
    )
    lengths: ClassVar[tuple[str, ...]] = ("4096", "8192", "16384")
    column: ClassVar[str | None] = "task"
    cut: ClassVar[bool] = False

    @override
    def prompt(self, row: Row) -> Prompt:
        text = row["question"] + row["answer_prefix"]
        answers = listed(row["answer"])
        alternatives = self.data.startswith("qa")
        question = Question(
            text,
            answer_behind(text, answers[0] if alternatives else ", ".join(answers)),
            answers,
            metric="part" if alternatives else "recall",
            tokens=row["max_new_tokens"],
        )
        return Prompt(self.label, row["context"], (question,))
