"""How a generated answer is scored: from 0 to 1, higher is better. `METRICS` maps names to functions."""

from collections.abc import Callable

from baklava.tasks.base import Question

Metric = Callable[[str, Question], float]


def recall(generated: str, question: Question) -> float:
    """Share of the answers that occur in the text, in any order and case (RULER's string_match_all)."""
    found = generated.lower()
    return sum(answer.lower() in found for answer in question.answers) / len(question.answers)


METRICS: dict[str, Metric] = {"recall": recall}
