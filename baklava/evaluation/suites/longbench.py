"""LongBench (arXiv 2308.14508): sixteen English data sets of questions, summaries, few-shot examples and code."""

from dataclasses import dataclass
from typing import ClassVar

from typing_extensions import override

from baklava.data.hub_datasets import Row
from baklava.evaluation.suites.base import Suite, answers_tuple, with_leading_space
from baklava.evaluation.tasks.base import Prompt, Question


@dataclass(frozen=True)
class PromptFormat:
    """The wording and scoring of a data set: the prompt up to the context's end, and the question after it."""

    context_template: str
    question_template: str
    max_new_tokens: int
    metric: str
    chance: float = 0.0


QA_INSTRUCTION = "as concisely as you can, using a single phrase if possible. Do not provide any explanation."
PAPER_QA_INSTRUCTION = (
    "as concisely as you can, using a single phrase or sentence if possible. If the question cannot be answered based "
    'on the information in the article, write "unanswerable". If the question is a yes/no question, answer "yes", '
    '"no", or "unanswerable". Do not provide any explanation.'
)
PASSAGES_INSTRUCTION = (
    "Answer the question based on the given passages. Only give me the answer and do not output any other words.\n\n"
)
MULTI_HOP_FORMAT = PromptFormat(
    PASSAGES_INSTRUCTION + "The following are given passages.\n{context}",
    "\n\n" + PASSAGES_INSTRUCTION + "Question: {input}\nAnswer:",
    32,
    "f1",
)
NUM_PARAGRAPHS = 30

# The wording is LongBench's: config/dataset2prompt.json and dataset2maxlen.json of github.com/THUDM/LongBench (MIT).
FORMATS = {
    "narrativeqa": PromptFormat(
        "You are given a story, which can be either a novel or a movie script, and a question. Answer the question "
        + QA_INSTRUCTION
        + "\n\nStory: {context}",
        "\n\nNow, answer the question based on the story " + QA_INSTRUCTION + "\n\nQuestion: {input}\n\nAnswer:",
        128,
        "f1",
    ),
    "qasper": PromptFormat(
        "You are given a scientific article and a question. Answer the question "
        + PAPER_QA_INSTRUCTION
        + "\n\nArticle: {context}",
        "\n\n Answer the question based on the above article "
        + PAPER_QA_INSTRUCTION
        + "\n\nQuestion: {input}\n\nAnswer:",
        128,
        "f1",
    ),
    "multifieldqa_en": PromptFormat(
        "Read the following text and answer briefly.\n\n{context}",
        "\n\nNow, answer the following question based on the above text, only give me the answer and do not output any "
        "other words.\n\nQuestion: {input}\nAnswer:",
        64,
        "f1",
    ),
    "hotpotqa": MULTI_HOP_FORMAT,
    "2wikimqa": MULTI_HOP_FORMAT,
    "musique": MULTI_HOP_FORMAT,
    "gov_report": PromptFormat(
        "You are given a report by a government agency. Write a one-page summary of the report.\n\nReport:\n{context}",
        "\n\nNow, write a one-page summary of the report.\n\nSummary:",
        512,
        "rouge_l",
    ),
    "qmsum": PromptFormat(
        "You are given a meeting transcript and a query containing a question or instruction. Answer the query in one "
        "or more sentences.\n\nTranscript:\n{context}",
        "\n\nNow, answer the query based on the above meeting transcript in one or more sentences.\n\nQuery: {input}\n"
        "Answer:",
        512,
        "rouge_l",
    ),
    "multi_news": PromptFormat(
        "You are given several news passages. Write a one-page summary of all news. \n\nNews:\n{context}",
        "\n\nNow, write a one-page summary of all the news.\n\nSummary:",
        512,
        "rouge_l",
    ),
    "trec": PromptFormat(
        "Please determine the type of the question below. Here are some examples of questions.\n\n{context}",
        "\n{input}",
        64,
        "classification",
    ),
    "triviaqa": PromptFormat(
        "Answer the question based on the given passage. Only give me the answer and do not output any other words. "
        "The following are some examples.\n\n{context}",
        "\n\n{input}",
        32,
        "first_line_f1",
    ),
    "samsum": PromptFormat(
        "Summarize the dialogue into a few short sentences. The following are some examples.\n\n{context}",
        "\n\n{input}",
        128,
        "first_line_rouge_l",
    ),
    "passage_count": PromptFormat(
        "There are some paragraphs below sourced from Wikipedia. Some of them may be duplicates. Please carefully read "
        "these paragraphs and determine how many unique paragraphs there are after removing duplicates. In other "
        "words, how many non-repeating paragraphs are there in total?\n\n{context}",
        "\n\nPlease enter the final count of unique paragraphs after removing duplicates. The output format should "
        "only contain the number, such as 1, 2, 3, and so on.\n\nThe final answer is: ",
        32,
        "count",
    ),
    "passage_retrieval_en": PromptFormat(
        "Here are 30 paragraphs from Wikipedia, along with an abstract. Please determine which paragraph the abstract "
        "is from.\n\n{context}",
        "\n\nThe following is an abstract.\n\n{input}\n\nPlease enter the number of the paragraph that the abstract is "
        'from. The answer format must be like "Paragraph 1", "Paragraph 2", etc.\n\nThe answer is: ',
        32,
        "retrieval",
        chance=1 / NUM_PARAGRAPHS,
    ),
    "lcc": PromptFormat(
        "Please complete the code given below. \n{context}", "Next line of code:\n", 64, "code_similarity"
    ),
    "repobench-p": PromptFormat(
        "Please complete the code given below. \n{context}", "{input}Next line of code:\n", 64, "code_similarity"
    ),
}
NOT_IN_LONGBENCH_E = ("narrativeqa", "musique", "qmsum")


@dataclass(frozen=True)
class LongBench(Suite):
    """LongBench v1 and, as `qasper_e` and so on, LongBench-E, whose lengths are evenly spread.

    The hub has a loading script, which `datasets` rejects from version 4 on, and the archive that the script reads. Its
    files are streamed out of that archive with range requests. Every English prompt already has its question after the
    context. LongBench wraps all prompts except few-shot and code ones in a chat template; here none is.
    """

    name: ClassVar[str] = "longbench"
    files: ClassVar[str] = (
        "zip://data/{dataset}.jsonl::hf://datasets/zai-org/LongBench@f72191f71cd6fcd0da8a54f0915078efda579449/data.zip"
    )
    columns: ClassVar[tuple[str, ...]] = ("input", "context", "answers")
    datasets: ClassVar[tuple[str, ...]] = (
        *FORMATS,
        *(f"{name}_e" for name in FORMATS if name not in NOT_IN_LONGBENCH_E),
    )
    note: ClassVar[str] = " (the Chinese data sets are left out: their metrics need a Chinese word splitter)"

    @override
    def prompt(self, row: Row) -> Prompt:
        prompt_format = FORMATS[self.dataset.removesuffix("_e")]
        answers = answers_tuple(row["answers"])
        text = prompt_format.question_template.replace("{input}", row["input"])
        choices = tuple(row.get("all_classes") or ())
        question = Question(
            text,
            with_leading_space(text, answers[0]),
            answers,
            chance=1 / len(choices) if choices else prompt_format.chance,
            metric=prompt_format.metric,
            max_new_tokens=prompt_format.max_new_tokens,
            choices=choices,
        )
        return Prompt(self.label, prompt_format.context_template.replace("{context}", row["context"]), (question,))


CHOICE_LETTERS = ("A", "B", "C", "D")

# The wording is LongBench v2's: prompts/0shot.txt of github.com/THUDM/LongBench (MIT).
V2_CONTEXT_TEMPLATE = "Please read the following text and answer the question below.\n\n<text>\n{context}"
V2_QUESTION_TEMPLATE = (
    "\n</text>\n\nWhat is the correct answer to this question: {question}\nChoices:\n{choices}\n\n"
    'Format your response as follows: "The correct answer is (insert answer here)".'
)
V2_ANSWER_TEMPLATE = "The correct answer is ({letter})"


@dataclass(frozen=True)
class LongBenchV2(Suite):
    """LongBench v2 without a chain of thought.

    Rows come from the hub's conversion to Parquet, since the published JSON of 465 MB would be downloaded whole for its
    first row. LongBench samples at temperature 0.1 with the chat template; here neither is done.
    """

    name: ClassVar[str] = "longbench_v2"
    files: ClassVar[str] = "hf://datasets/zai-org/LongBench-v2@refs/convert/parquet/default/train/*.parquet"
    columns: ClassVar[tuple[str, ...]] = (
        "question",
        "context",
        "answer",
        *(f"choice_{letter}" for letter in CHOICE_LETTERS),
    )

    @override
    def prompt(self, row: Row) -> Prompt:
        choices = "\n".join(f"({letter}) {row[f'choice_{letter}'].strip()}" for letter in CHOICE_LETTERS)
        text = V2_QUESTION_TEMPLATE.replace("{choices}", choices).replace("{question}", row["question"].strip())
        question = Question(
            text,
            with_leading_space(text, V2_ANSWER_TEMPLATE.format(letter=row["answer"])),
            (row["answer"],),
            chance=1 / len(CHOICE_LETTERS),
            metric="choice",
            max_new_tokens=128,
            choices=CHOICE_LETTERS,
        )
        return Prompt(self.label, V2_CONTEXT_TEMPLATE.replace("{context}", row["context"].strip()), (question,))
