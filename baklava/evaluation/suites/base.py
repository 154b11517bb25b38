"""What all suites share: a published benchmark whose rows become prompts, and the truncation of long contexts."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Protocol, runtime_checkable

from baklava.data.hub_datasets import Row
from baklava.errors import UserError
from baklava.evaluation.tasks.base import Prompt


@runtime_checkable
class Tokenizer(Protocol):
    """The part of Hugging Face's tokenizers that suites use."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Return the token ids of a text."""

    def decode(self, ids: list[int]) -> str:
        """Return the text of token ids."""


@dataclass(frozen=True)
class Suite(ABC):
    """A published benchmark, one of its data sets, and a length if it comes in several.

    Attributes:
        name: the suite on the command line.
        files: where its rows are; {dataset} and {length} are filled in.
        columns: columns that a row must have, "context" among them.
        datasets: names of its data sets; empty if it has only one.
        lengths: lengths that it comes in; empty if there is only one.
        dataset_column: the column that names the data set, if a file holds several.
        can_truncate: whether a context may be truncated, as the benchmark itself does.
        note: appended to the error for an unknown data set.

    Raises:
        UserError: the suite does not have this data set or length.
    """

    name: ClassVar[str]
    files: ClassVar[str]
    columns: ClassVar[tuple[str, ...]]
    datasets: ClassVar[tuple[str, ...]] = ()
    lengths: ClassVar[tuple[str, ...]] = ()
    dataset_column: ClassVar[str | None] = None
    can_truncate: ClassVar[bool] = True
    note: ClassVar[str] = ""

    dataset: str = ""
    length: str = ""

    def __post_init__(self) -> None:
        self._check("data set", self.dataset, self.datasets or ("",), self.note)
        self._check("length", self.length, ("", *self.lengths))

    def _check(self, what: str, value: str, known: tuple[str, ...], note: str = "") -> None:
        if value not in known:
            names = ", ".join(filter(None, known))
            remedy = f"choose one of {names}" if names else "leave it out"
            raise UserError(f"suite {self.name} has no {what} {value!r}; {remedy}{note}.")

    @abstractmethod
    def prompt(self, row: Row) -> Prompt:
        """Build the prompt with the one question of a row.

        Its context is all text up to the end of the row's own "context"; what follows that belongs to the question.

        Raises:
            ValueError: the question is part of the context.
        """

    @property
    def label(self) -> str:
        """The suite with its data set and length, as on a command line."""
        return self.name + (f":{self.dataset}" if self.dataset else "") + (f"@{self.length}" if self.length else "")

    @property
    def published_files(self) -> str:
        """The files on the hub.

        Raises:
            UserError: the length is missing.
        """
        if self.lengths and not self.length:
            raise UserError(
                f"{self.label} comes in several lengths; choose one as {self.label}@{self.lengths[0]} "
                f"({', '.join(self.lengths)}), or name a file of your own as {self.label}=FILE."
            )
        return self.files.format(dataset=self.dataset, length=self.length)

    @property
    def row_filter(self) -> dict[str, str]:
        """The values of columns that select the rows of this data set."""
        return {self.dataset_column: self.dataset} if self.dataset_column else {}


def answers_tuple(answers: str | Sequence[str]) -> tuple[str, ...]:
    """Return the answers of a row, which may also give a single one as a string."""
    return (answers,) if isinstance(answers, str) else tuple(answers)


def with_leading_space(question: str, answer: str) -> str:
    """Return the answer as it continues a question: after a space, unless the question ends in white space."""
    return answer if not question or question[-1].isspace() else f" {answer}"


def fit_prompt(suite: Suite, rows: Sequence[Row], *, tokens: int, tokenizer: Tokenizer) -> Prompt | None:
    """Build the prompt of rows with one context and truncate its middle until it fits with its longest question.

    As in LongBench, the first and the last half of the tokens that fit stay. Only the row's context is truncated, so
    that instructions and question stay whole. Special tokens that the tokenizer adds count for every part.

    Returns:
        None if all questions are part of the context.

    Raises:
        UserError: nothing of the context would remain, or the suite does not allow truncation.
    """
    context = rows[0]["context"]
    prompt = _join_questions(suite, rows, context)
    if prompt is None or (excess := _excess_tokens(prompt, tokens, tokenizer)) <= 0:
        return prompt
    if not suite.can_truncate:
        raise UserError(
            f"a prompt of {suite.label} has {tokens + excess} tokens, more than {tokens}, and truncation could remove "
            "what is asked for; allow longer prompts, or choose a shorter length."
        )
    ids = tokenizer.encode(context, add_special_tokens=False)
    half = (len(ids) - excess) // 2
    while half > 0:
        prompt = _join_questions(suite, rows, tokenizer.decode(ids[:half]) + tokenizer.decode(ids[-half:]))
        if prompt is None or (excess := _excess_tokens(prompt, tokens, tokenizer)) <= 0:
            return prompt
        half -= (excess + 1) // 2  # decoded and encoded again, the text may have more tokens
    raise UserError(f"a question of {suite.label} leaves no tokens for its context in {tokens} tokens; allow more.")


def _join_questions(suite: Suite, rows: Sequence[Row], context: str) -> Prompt | None:
    """Return one prompt with the questions of all rows except those whose question is part of the context."""
    prompts = []
    for row in rows:
        try:
            prompts.append(suite.prompt(row | {"context": context}))
        except ValueError:  # from Prompt: eviction would know this question
            continue
    if not prompts:
        return None
    return replace(prompts[0], questions=tuple(question for prompt in prompts for question in prompt.questions))


def _excess_tokens(prompt: Prompt, tokens: int, tokenizer: Tokenizer) -> int:
    return prompt.num_tokens(lambda text: len(tokenizer.encode(text))) - tokens
