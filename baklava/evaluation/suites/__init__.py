"""Suites: published benchmarks as prompts whose questions come after the context has been compressed.

lm-evaluation-harness has LongBench and RULER too, but there the question is part of the prompt, so an eviction method
that looks at attention knows it when it evicts. Here a context is prefilled and compressed first, and only then are its
questions asked. `SUITES` maps names to classes.
"""

from collections.abc import Iterator
from dataclasses import replace
from itertools import groupby, islice

from baklava.console import log
from baklava.data.hub_datasets import Row, check_row, local_data_file, stream_file_rows
from baklava.errors import UserError
from baklava.evaluation.suites.base import Suite, Tokenizer, fit_prompt
from baklava.evaluation.suites.longbench import LongBench, LongBenchV2
from baklava.evaluation.suites.ruler import Ruler
from baklava.evaluation.tasks.base import Prompt

SUITES: dict[str, type[Suite]] = {suite.name: suite for suite in (LongBench, LongBenchV2, Ruler)}

__all__ = ["SUITES", "LongBench", "LongBenchV2", "Ruler", "Suite", "load_prompts", "parse_suite_spec"]


def parse_suite_spec(spec: str) -> tuple[Suite, str]:
    """Parse `SUITE[:DATASET][@LENGTH][=FILE]` into a suite and a file, "" for the published rows on the hub.

    Raises:
        UserError: the suite, data set or length is unknown; the message lists the known ones.
    """
    label, _, file = spec.partition("=")
    label, _, length = label.partition("@")
    name, _, dataset = label.partition(":")
    if name not in SUITES:
        raise UserError(f"unknown suite {name!r}; choose one of {', '.join(SUITES)}.")
    return SUITES[name](dataset, length), file


def load_prompts(spec: str, count: int, *, tokens: int, tokenizer: Tokenizer) -> list[Prompt]:
    """Load the first prompts of a published benchmark, in its order, each truncated to `tokens`.

    Consecutive rows with the same context become one prompt with several questions. Rows whose question is part of
    their context are skipped, and the log says so. No chat template is applied.

    Args:
        spec: such as `longbench:qasper`, `longbench_v2` or `ruler:niah_single_1@4096`; `=FILE` at the end reads a
            .json, .jsonl or .parquet file in the published format instead.
        count: prompts to load; the benchmark may have fewer.
        tokens: the most tokens of a prompt with its longest question and answer.
        tokenizer: of the model that will be evaluated.

    Raises:
        UserError: the spec is invalid, the file or hub cannot be read, a row lacks a column, or a prompt does not fit.
    """
    suite, file = parse_suite_spec(spec)
    prompts = list(islice(_prompts(suite, _rows(suite, file), tokens, tokenizer), count))
    if not prompts:
        raise UserError(f"{spec} has no row that could be asked; name a data set or file that has.")
    return prompts


def _rows(suite: Suite, file: str) -> Iterator[Row]:
    files = local_data_file(file) if file else suite.published_files
    log(f"reading {suite.label} from {file or 'the hub'}")
    remedy = f"connect to the hub, or name a file of your own as {suite.label}=FILE"
    for row in stream_file_rows(f"suite {suite.label} ({files})", remedy, files=files, where=suite.row_filter):
        checked = check_row(row, suite.columns, f"suite {suite.label}")
        yield checked | {"context": str(checked["context"])}


def _prompts(suite: Suite, rows: Iterator[Row], tokens: int, tokenizer: Tokenizer) -> Iterator[Prompt]:
    for number, (_, group) in enumerate(groupby(rows, key=lambda row: row["context"])):
        same_context = list(group)
        prompt = fit_prompt(suite, same_context, tokens=tokens, tokenizer=tokenizer)
        skipped = len(same_context) - (len(prompt.questions) if prompt else 0)
        if skipped:
            log(
                f"{suite.label}:{number}: left out {skipped} of {len(same_context)} questions, which are in the context"
            )
        if prompt:
            yield replace(prompt, name=f"{suite.label}:{number}")
