"""How a generated answer is scored: from 0 to 1, higher is better. `METRICS` maps names to functions.

Those of LongBench follow LongBench/metrics.py and eval.py of github.com/THUDM/LongBench, that of LongBench v2 its
pred.py, those of RULER scripts/eval/synthetic/constants.py of github.com/NVIDIA/RULER. With several answers the best
counts, except in `recall`.
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
CHOICE = (re.compile(r"The correct answer is \(([A-D])\)"), re.compile(r"The correct answer is ([A-D])"))
COMMENT_SIGNS = ("`", "#", "//")


def recall(generated: str, question: Question) -> float:
    """Share of the answers that occur in the text, in any order and case (RULER's string_match_all)."""
    found = generated.lower()
    return sum(answer.lower() in found for answer in question.answers) / len(question.answers)


def part(generated: str, question: Question) -> float:
    """Whether any of the answers occurs in the text, in any case (RULER's string_match_part)."""
    return float(any(answer.lower() in generated.lower() for answer in question.answers))


def first_line(metric: Metric) -> Metric:
    """The metric of the first line that is not empty, as LongBench looks at answers to few-shot prompts."""

    @wraps(metric)
    def of_first_line(generated: str, question: Question) -> float:
        return metric(generated.lstrip("\n").split("\n")[0], question)

    return of_first_line


def best(score: Callable[[str, str], float]) -> Metric:
    """The metric that takes the best score over the answers."""

    @wraps(score)
    def over_answers(generated: str, question: Question) -> float:
        return max(score(generated, answer) for answer in question.answers)

    return over_answers


@best
def f1(generated: str, answer: str) -> float:
    """F1 of the words, counted, without case, punctuation and articles (LongBench's qa_f1_score, SQuAD's rule)."""
    given, wanted = _plain_words(generated), _plain_words(answer)
    same = (Counter(given) & Counter(wanted)).total()
    return 2 * same / (len(given) + len(wanted)) if same else 0.0


def _plain_words(text: str) -> list[str]:
    return ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split()


@best
def rouge_l(generated: str, answer: str) -> float:
    """F of ROUGE-L at the level of summaries (LongBench's rouge_score, which asks the package `rouge` 1.0.1).

    What counts is which words, as a set, stand in a longest common subsequence of any two sentences, over all different
    words of either text; case matters, and sentences end at full stops. Texts so long that the package runs out of
    stack, which LongBench counts as 0, are scored.
    """
    given, wanted = _sentences(generated), _sentences(answer)
    if not given or not wanted:
        return 0.0
    shared = len(set().union(*(_common(one, other) for one in wanted for other in given)))
    precision = shared / len(set().union(*given))
    recalled = shared / len(set().union(*wanted))
    return 2 * precision * recalled / (precision + recalled + 1e-8)  # the package's epsilon


def _sentences(text: str) -> list[list[str]]:
    # a sentence of white space is one empty word to the package, and weighs in its precision
    return [part.split() or [""] for part in text.split(".") if part]


def _common(one: list[str], other: list[str]) -> set[str]:
    """Words of the longest common subsequence of two sentences; of several that which the package `rouge` walks to."""
    longest = [[0] * (len(other) + 1) for _ in range(len(one) + 1)]
    for i, word in enumerate(one):
        for j, candidate in enumerate(other):
            same = word == candidate
            longest[i + 1][j + 1] = longest[i][j] + 1 if same else max(longest[i][j + 1], longest[i + 1][j])
    return _walk_back(longest, one, other)


def _walk_back(longest: list[list[int]], one: list[str], other: list[str]) -> set[str]:
    found = set()
    i, j = len(one), len(other)
    while i and j:
        if one[i - 1] == other[j - 1]:
            found.add(one[i - 1])
            i, j = i - 1, j - 1
        elif longest[i - 1][j] > longest[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return found


@first_line
def classification(generated: str, question: Question) -> float:
    """1 over the number of `choices` named in the first line, if the answer is one of them (LongBench's for trec).

    A choice that is a part of the answer's own name does not count. LongBench means the same, but where two such parts
    follow each other in its list of choices it leaves the second in.
    """
    answer = question.answers[0]
    named = [choice for choice in question.choices if choice in generated]
    named = [choice for choice in named if choice == answer or choice not in answer]
    return 1 / len(named) if answer in named else 0.0


@best
def retrieval(generated: str, answer: str) -> float:
    """Share of the numbers in the text that are the answer's, such as 3 for "Paragraph 3" (LongBench's)."""
    wanted = NUMBER.findall(answer)[:1]
    return _share(generated, wanted[0]) if wanted else 0.0


@best
def count(generated: str, answer: str) -> float:
    """Share of the numbers in the text that are the answer (LongBench's count_score)."""
    return _share(generated, answer)


def _share(generated: str, number: str) -> float:
    numbers = NUMBER.findall(generated)
    return numbers.count(number) / len(numbers) if numbers else 0.0


@best
def code_similarity(generated: str, answer: str) -> float:
    """Similarity of the first line without a comment or fence to the answer, in hundredths (LongBench's).

    The similarity is difflib's ratio, which is what LongBench's `fuzzywuzzy` takes unless python-Levenshtein, whose
    ratio is a little different, is installed beside it.
    """
    lines = generated.lstrip("\n").split("\n")
    line = next((line for line in lines if not any(sign in line for sign in COMMENT_SIGNS)), "")
    return round(100 * SequenceMatcher(None, line, answer).ratio()) / 100


def choice(generated: str, question: Question) -> float:
    """Whether the letter behind "The correct answer is", in brackets, in bold or bare, is the answer (LongBench v2)."""
    text = generated.replace("*", "")
    found = next((match[1] for pattern in CHOICE if (match := pattern.search(text))), None)
    return float(found in question.answers)


METRICS: dict[str, Metric] = {
    "recall": recall,
    "part": part,
    "f1": f1,
    "first_line_f1": first_line(f1),
    "rouge_l": rouge_l,
    "first_line_rouge_l": first_line(rouge_l),
    "classification": classification,
    "retrieval": retrieval,
    "count": count,
    "code_similarity": code_similarity,
    "choice": choice,
}
