"""What every suite has: a published benchmark whose rows become prompts; and how a long context is cut."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Protocol, runtime_checkable

from baklava.data.hub_datasets import Row
from baklava.errors import UserError
from baklava.evaluation.tasks.base import Prompt


@runtime_checkable
class Tokenizer(Protocol):
    """What is asked of a tokenizer, in the words of Hugging Face's."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Ids of the tokens."""

    def decode(self, ids: list[int]) -> str:
        """Their text."""


@dataclass(frozen=True)
class Suite(ABC):
    """A published benchmark: which data set of it, and in which length where it comes in several.

    A suite's `files` are where its rows are, with {data} and {length} to be filled in; `columns` what a row must have,
    "context" among them; `column` names the data set in rows of files that hold several. A context may be `cut` where
    the benchmark itself does so. Raises UserError for a data set or length that the suite does not have.
    """

    name: ClassVar[str]
    files: ClassVar[str]
    columns: ClassVar[tuple[str, ...]]
    known: ClassVar[tuple[str, ...]] = ()
    lengths: ClassVar[tuple[str, ...]] = ()
    column: ClassVar[str | None] = None
    cut: ClassVar[bool] = True
    note: ClassVar[str] = ""

    data: str = ""
    length: str = ""

    def __post_init__(self) -> None:
        self._check("data set", self.data, self.known or ("",), self.note)
        self._check("length", self.length, ("", *self.lengths))

    @abstractmethod
    def prompt(self, row: Row) -> Prompt:
        """The prompt with the one question of a row.

        The context is all text up to the end of the row's own "context"; what follows it is asked behind it.

        Raises:
            ValueError: the question is in the context already.
        """

    @property
    def label(self) -> str:
        """The suite with its data set and length, as they are named on a command line."""
        return self.name + (f":{self.data}" if self.data else "") + (f"@{self.length}" if self.length else "")

    @property
    def published(self) -> str:
        """The files on the hub.

        Raises:
            UserError: the length is missing.
        """
        if self.lengths and not self.length:
            raise UserError(
                f"{self.label} comes in several lengths; choose one as {self.label}@{self.lengths[0]} "
                f"({', '.join(self.lengths)}), or name a file of your own as {self.label}=FILE."
            )
        return self.files.format(data=self.data, length=self.length)

    @property
    def where(self) -> dict[str, str]:
        """What columns must hold for a row to be of this data set."""
        return {self.column: self.data} if self.column else {}

    def _check(self, what: str, given: str, known: tuple[str, ...], note: str = "") -> None:
        if given not in known:
            names = ", ".join(filter(None, known))
            remedy = f"choose one of {names}" if names else "leave it out"
            raise UserError(f"suite {self.name} has no {what} {given!r}; {remedy}{note}.")


def listed(answers: str | Sequence[str]) -> tuple[str, ...]:
    """The answers of a row, also where it gives a single one as it is."""
    return (answers,) if isinstance(answers, str) else tuple(answers)


def answer_behind(text: str, answer: str) -> str:
    """The answer as it goes on behind a question: after a space, unless there is one."""
    return answer if not text or text[-1].isspace() else f" {answer}"


def fitted(suite: Suite, rows: Sequence[Row], *, tokens: int, tokenizer: Tokenizer) -> Prompt | None:
    """The prompt of rows with one context, cut in its middle so that it fits `tokens` with its longest question.

    As in LongBench, the first and the last half of the tokens that fit are kept; of the context only, so that
    instructions and question stay whole. Special tokens that the tokenizer adds are counted with every part. None where
    all questions are in the context already.

    Raises:
        UserError: nothing of the context would be left, or the suite does not cut.
    """
    context = rows[0]["context"]
    prompt = _asked(suite, rows, context)
    if prompt is None or (over := _over(prompt, tokens, tokenizer)) <= 0:
        return prompt
    if not suite.cut:
        raise UserError(
            f"a prompt of {suite.label} has {tokens + over} tokens, more than {tokens}, and cutting it could cut out "
            "what is asked for; make room for it, or choose a shorter length."
        )
    ids = tokenizer.encode(context, add_special_tokens=False)
    half = (len(ids) - over) // 2
    while half > 0:
        prompt = _asked(suite, rows, tokenizer.decode(ids[:half]) + tokenizer.decode(ids[-half:]))
        if prompt is None or (over := _over(prompt, tokens, tokenizer)) <= 0:
            return prompt
        half -= (over + 1) // 2  # decoded and encoded again, the text may have more tokens than were kept
    raise UserError(f"a question of {suite.label} leaves no room for its context in {tokens} tokens; allow more.")


def _asked(suite: Suite, rows: Sequence[Row], context: str) -> Prompt | None:
    """One prompt with the questions of all rows but those that are in the context."""
    prompts = []
    for row in rows:
        try:
            prompts.append(suite.prompt(row | {"context": context}))
        except ValueError:  # of Prompt: known from the context, a question would not be asked behind eviction
            continue
    if not prompts:
        return None
    return replace(prompts[0], questions=tuple(question for prompt in prompts for question in prompt.questions))


def _over(prompt: Prompt, tokens: int, tokenizer: Tokenizer) -> int:
    return prompt.length(lambda text: len(tokenizer.encode(text))) - tokens
