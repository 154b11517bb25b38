"""LongBench v2: multiple choice about long and hard texts (arXiv 2412.15204)."""

from dataclasses import dataclass
from typing import ClassVar

from typing_extensions import override

from baklava.hub import Row
from baklava.suites.base import Suite, answer_behind
from baklava.tasks.base import Prompt, Question

LETTERS = ("A", "B", "C", "D")

# The wording is LongBench v2's: prompts/0shot.txt of github.com/THUDM/LongBench (MIT).
BEFORE = "Please read the following text and answer the question below.\n\n<text>\n{context}"
AFTER = (
    "\n</text>\n\nWhat is the correct answer to this question: {question}\nChoices:\n{choices}\n\n"
    'Format your response as follows: "The correct answer is (insert answer here)".'
)
ANSWER = "The correct answer is ({letter})"


@dataclass(frozen=True)
class LongBenchV2(Suite):
    """LongBench v2 without a chain of thought.

    Rows come from the hub's own conversion to Parquet, since the published JSON, of 465 MB, would be fetched whole for
    its first row. LongBench samples at temperature 0.1 inside the chat template; here neither is done.
    """

    name: ClassVar[str] = "longbench_v2"
    files: ClassVar[str] = "hf://datasets/zai-org/LongBench-v2@refs/convert/parquet/default/train/*.parquet"
    columns: ClassVar[tuple[str, ...]] = ("question", "context", "answer", *(f"choice_{letter}" for letter in LETTERS))

    @override
    def prompt(self, row: Row) -> Prompt:
        choices = "\n".join(f"({letter}) {row[f'choice_{letter}'].strip()}" for letter in LETTERS)
        text = AFTER.replace("{choices}", choices).replace("{question}", row["question"].strip())
        question = Question(
            text,
            answer_behind(text, ANSWER.format(letter=row["answer"])),
            (row["answer"],),
            chance=1 / len(LETTERS),
            metric="choice",
            tokens=128,
            choices=LETTERS,
        )
        return Prompt(self.label, BEFORE.replace("{context}", row["context"].strip()), (question,))
