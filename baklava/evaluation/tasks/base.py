"""What all tasks share: a context, questions about it, and a builder that fits a prompt to a length."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from random import Random
from typing import ClassVar

from baklava.errors import UserError
from baklava.evaluation.tasks.filler_text import FillerText

TokenCounter = Callable[[str], int]


@dataclass(frozen=True)
class Question:
    """A question that is asked after the context has been compressed to its plan.

    Attributes:
        text: the question; it ends where the answer begins.
        target: the answer whose NLL is measured.
        answers: what the metric looks for in a generated answer.
        chance: the score of a guess by somebody who knows the form of the answers but not the context.
        metric: a name in `baklava.evaluation.tasks.metrics`, or "exact": greedy decoding yields `target`.
        max_new_tokens: tokens to generate at most; "exact" generates none.
        choices: all possible answers, if the task has such a list.
    """

    text: str
    target: str
    answers: tuple[str, ...] = ()
    chance: float = 0.0
    metric: str = "exact"
    max_new_tokens: int = 0
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Prompt:
    """A context that is prefilled once, and the questions about it.

    Raises:
        ValueError: a question's text is empty or part of the context, so eviction would know it.
    """

    name: str
    context: str
    questions: tuple[Question, ...]

    def __post_init__(self) -> None:
        for question in self.questions:
            if not question.text:
                raise ValueError(f"a question of {self.name} has no text; ask in at least one word")
            if (text := question.text.strip()) and text in self.context:
                raise ValueError(f"{self.name} already asks {text!r} in its context; ask after the context")

    def num_tokens(self, count_tokens: TokenCounter) -> int:
        """Return the tokens of the context with its longest question and answer."""
        questions = (
            count_tokens(question.text) + max(count_tokens(question.target), question.max_new_tokens)
            for question in self.questions
        )
        return count_tokens(self.context) + max(questions, default=0)


@dataclass(frozen=True)
class Task(ABC):
    """A kind of prompt. The fields of the dataclass are its parameters; its one verb builds a prompt of any size."""

    name: ClassVar[str]

    @abstractmethod
    def build(self, filler: FillerText, size: int, rng: Random) -> Prompt:
        """Build a prompt whose context has `size` units (at least 1), such as sentences, pairs or words.

        The same state of `rng` and the same size give the same prompt; a larger size gives a longer one.
        """


def build_prompts(
    task: Task, filler: FillerText, count: int, *, tokens: int, seed: int, count_tokens: TokenCounter
) -> list[Prompt]:
    """Build `count` prompts, each the longest that fits into `tokens` with its longest question and answer.

    Raises:
        UserError: the smallest prompt does not fit, or the longest has nothing to ask about.
    """
    return [_build_longest(task, filler, f"{task.name}:{n}", tokens, seed, count_tokens) for n in range(count)]


def _build_longest(
    task: Task, filler: FillerText, name: str, tokens: int, seed: int, count_tokens: TokenCounter
) -> Prompt:
    def build(size: int) -> Prompt:
        return replace(task.build(filler, size, Random(f"{seed}:{name}")), name=name)

    def fits(size: int) -> bool:
        return build(size).num_tokens(count_tokens) <= tokens

    if not fits(1):
        smallest = build(1).num_tokens(count_tokens)
        raise UserError(f"the smallest {task.name} prompt has {smallest} tokens, more than {tokens}; allow longer ones")
    low, high = 1, 2
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    longest = build(low)
    if not longest.questions:
        raise UserError(f"a {task.name} prompt of {tokens} tokens of these texts has nothing to ask; give longer texts")
    return longest
