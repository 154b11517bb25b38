"""Metrics of generated answers, from 0 to 1, higher is better. `METRICS` maps names to functions.

LongBench's follow LongBench/metrics.py and eval.py of github.com/THUDM/LongBench, LongBench v2's its pred.py, RULER's
scripts/eval/synthetic/constants.py of github.com/NVIDIA/RULER. If there are several answers the best one counts, except
in `recall`.
"""

import re
import string
from collections import Counter
from collections.abc import Callable
from difflib import SequenceMatcher
from functools import wraps

from baklava.evaluation.tasks.base import Question

Metric = Callable[[str, Question], float]
PUNCTUATION = str.maketrans("", "", string.punctuation)
ARTICLES = re.compile(r"\b(a|an|the)\b")
NUMBER = re.compile(r"\d+")
CHOICE_PATTERNS = (re.compile(r"The correct answer is \(([A-D])\)"), re.compile(r"The correct answer is ([A-D])"))
NON_CODE_MARKS = ("`", "#", "//")


def recall(generated: str, question: Question) -> float:
    """Return the share of the answers that the text contains, in any order and case (RULER's string_match_all)."""
    text = generated.lower()
    return sum(answer.lower() in text for answer in question.answers) / len(question.answers)


def contains_any(generated: str, question: Question) -> float:
    """Return 1 if the text contains any of the answers, in any case (RULER's string_match_part)."""
    return float(any(answer.lower() in generated.lower() for answer in question.answers))


def on_first_line(metric: Metric) -> Metric:
    """Apply a metric to the first line that is not empty, as LongBench does for few-shot prompts."""

    @wraps(metric)
    def score_first_line(generated: str, question: Question) -> float:
        return metric(generated.lstrip("\n").split("\n")[0], question)

    return score_first_line


def best_over_answers(score: Callable[[str, str], float]) -> Metric:
    """Turn a score against one answer into a metric: the best score over all answers."""

    @wraps(score)
    def best_score(generated: str, question: Question) -> float:
        return max(score(generated, answer) for answer in question.answers)

    return best_score


@best_over_answers
def f1(generated: str, answer: str) -> float:
    """Return the F1 of word counts, without case, punctuation and articles (LongBench's qa_f1_score, from SQuAD)."""
    predicted, expected = _normalized_words(generated), _normalized_words(answer)
    common = (Counter(predicted) & Counter(expected)).total()
    return 2 * common / (len(predicted) + len(expected)) if common else 0.0


def _normalized_words(text: str) -> list[str]:
    return ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split()


@best_over_answers
def rouge_l(generated: str, answer: str) -> float:
    """Return the F-score of summary-level ROUGE-L (LongBench's rouge_score, computed by the package `rouge` 1.0.1).

    It compares the set of words in a longest common subsequence of any two sentences with the distinct words of each
    text. Case matters, and sentences end at full stops. Texts on which the package exceeds the recursion limit, which
    LongBench counts as 0, are scored too.
    """
    predicted, expected = _sentences(generated), _sentences(answer)
    if not predicted or not expected:
        return 0.0
    common = len(set().union(*(_lcs_words(one, other) for one in expected for other in predicted)))
    precision = common / len(set().union(*predicted))
    recalled = common / len(set().union(*expected))
    return 2 * precision * recalled / (precision + recalled + 1e-8)  # the package's epsilon


def _sentences(text: str) -> list[list[str]]:
    # The package counts a sentence of white space as one empty word, which lowers the precision.
    return [part.split() or [""] for part in text.split(".") if part]


def _lcs_words(one: list[str], other: list[str]) -> set[str]:
    """Return the words of a longest common subsequence; of several, the one that the package `rouge` picks."""
    length = [[0] * (len(other) + 1) for _ in range(len(one) + 1)]
    for i, word in enumerate(one):
        for j, candidate in enumerate(other):
            same = word == candidate
            length[i + 1][j + 1] = length[i][j] + 1 if same else max(length[i][j + 1], length[i + 1][j])
    words = set()
    i, j = len(one), len(other)
    while i and j:
        if one[i - 1] == other[j - 1]:
            words.add(one[i - 1])
            i, j = i - 1, j - 1
        elif length[i - 1][j] > length[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return words


@on_first_line
def classification(generated: str, question: Question) -> float:
    """Return 1 over the number of `choices` in the first line, if the answer is among them (LongBench's for trec).

    A choice that is part of the answer's own name does not count. LongBench intends the same, but if two such parts
    follow each other in its list of choices it leaves the second in.
    """
    answer = question.answers[0]
    mentioned = [choice for choice in question.choices if choice in generated]
    mentioned = [choice for choice in mentioned if choice == answer or choice not in answer]
    return 1 / len(mentioned) if answer in mentioned else 0.0


@best_over_answers
def retrieval(generated: str, answer: str) -> float:
    """Return the share of the text's numbers that are the answer's, such as 3 for "Paragraph 3" (LongBench's)."""
    expected = NUMBER.findall(answer)[:1]
    return _share_of_numbers(generated, expected[0]) if expected else 0.0


@best_over_answers
def count(generated: str, answer: str) -> float:
    """Return the share of the text's numbers that are the answer (LongBench's count_score)."""
    return _share_of_numbers(generated, answer)


def _share_of_numbers(generated: str, number: str) -> float:
    numbers = NUMBER.findall(generated)
    return numbers.count(number) / len(numbers) if numbers else 0.0


@best_over_answers
def code_similarity(generated: str, answer: str) -> float:
    """Return the similarity of the first line without a comment or fence to the answer, in hundredths (LongBench's).

    It is difflib's ratio, which LongBench's `fuzzywuzzy` uses unless python-Levenshtein, whose ratio differs slightly,
    is installed too.
    """
    lines = generated.lstrip("\n").split("\n")
    line = next((line for line in lines if not any(mark in line for mark in NON_CODE_MARKS)), "")
    return round(100 * SequenceMatcher(None, line, answer).ratio()) / 100


def choice(generated: str, question: Question) -> float:
    """Return 1 if the letter after "The correct answer is", in brackets, bold or bare, is the answer (LongBench v2)."""
    text = generated.replace("*", "")
    letter = next((match[1] for pattern in CHOICE_PATTERNS if (match := pattern.search(text))), None)
    return float(letter in question.answers)


METRICS: dict[str, Metric] = {
    "recall": recall,
    "contains_any": contains_any,
    "f1": f1,
    "first_line_f1": on_first_line(f1),
    "rouge_l": rouge_l,
    "first_line_rouge_l": on_first_line(rouge_l),
    "classification": classification,
    "retrieval": retrieval,
    "count": count,
    "code_similarity": code_similarity,
    "choice": choice,
}
