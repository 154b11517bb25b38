"""What every task has: contexts with questions about them, made from prose, a seed and a length."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from random import Random
from typing import ClassVar

from baklava.errors import UserError
from baklava.evaluation.tasks.filler_text import Prose

Length = Callable[[str], int]
"""Tokens of a text."""


@dataclass(frozen=True)
class Question:
    """A question that is asked once the context has been cut to its budget.

    `text` ends where the answer begins. `target` is the text whose NLL is measured, `answers` are what the `metric` (a
    name in `baklava.evaluation.tasks.metrics`, or "exact") looks for, `choices` all answers that could be given, where
    the task says so. `chance` is the score of a guess by someone who knows the form of the answers but not the context.
    `tokens` are the most to generate; an "exact" answer is `target` to the letter and needs none.
    """

    text: str
    target: str
    answers: tuple[str, ...] = ()
    chance: float = 0.0
    metric: str = "exact"
    tokens: int = 0
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Prompt:
    """A context that is prefilled once, and the questions about it.

    Raises:
        ValueError: a question's text is empty, or in the context, so that eviction would know it.
    """

    name: str
    context: str
    questions: tuple[Question, ...]

    def __post_init__(self) -> None:
        for question in self.questions:
            if not question.text:
                raise ValueError(f"a question of {self.name} has no text; ask in at least one word")
            if (asked := question.text.strip()) and asked in self.context:
                raise ValueError(f"{self.name} asks {asked!r} in its context already; ask behind it")

    def length(self, length: Length) -> int:
        """Tokens of the context with its longest question and answer."""
        rest = (length(question.text) + max(length(question.target), question.tokens) for question in self.questions)
        return length(self.context) + max(rest, default=0)


@dataclass(frozen=True)
class Task(ABC):
    """A kind of prompt. Knobs are the fields of the dataclass; one verb makes a prompt of any size."""

    name: ClassVar[str]

    @abstractmethod
    def compose(self, prose: Prose, size: int, draw: Random) -> Prompt:
        """A prompt with `size` units (from 1 on) of what fills its context: sentences, pairs, words.

        The same `draw` and size give the same prompt; a larger size a longer one.
        """


def prompts(task: Task, prose: Prose, count: int, *, tokens: int, seed: int, length: Length) -> list[Prompt]:
    """`count` prompts, each the longest one that fits into `tokens` with its longest question and answer.

    Raises:
        UserError: not even the smallest prompt fits, or there is nothing in the longest that can be asked for.
    """
    return [_longest(task, prose, f"{task.name}:{number}", tokens, seed, length) for number in range(count)]


def _longest(task: Task, prose: Prose, name: str, tokens: int, seed: int, length: Length) -> Prompt:
    def of(size: int) -> Prompt:
        return replace(task.compose(prose, size, Random(f"{seed}:{name}")), name=name)

    def fits(size: int) -> bool:
        return of(size).length(length) <= tokens

    if not fits(1):
        raise UserError(
            f"the smallest {task.name} prompt has {of(1).length(length)} tokens, more than {tokens}; make room for it"
        )
    low, high = 1, 2
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    if not of(low).questions:
        raise UserError(
            f"nothing in a {task.name} prompt of {tokens} tokens of these texts can be asked for; give longer texts"
        )
    return of(low)
