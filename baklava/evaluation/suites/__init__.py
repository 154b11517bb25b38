"""Suites: published benchmarks as prompts. One benchmark a file; `SUITES` maps names to classes."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import groupby, islice

from baklava.console import log
from baklava.data.hub_datasets import Row, check_row, local_data_file, stream_file_rows
from baklava.errors import UserError
from baklava.evaluation.suites.base import Suite, Tokenizer, fitted
from baklava.evaluation.suites.longbench import LongBench, LongBenchV2
from baklava.evaluation.suites.ruler import Ruler
from baklava.evaluation.tasks.base import Prompt

SUITES: dict[str, type[Suite]] = {suite.name: suite for suite in (LongBench, LongBenchV2, Ruler)}

__all__ = ["SUITES", "LongBench", "LongBenchV2", "Ruler", "Suite", "prompts", "suite_of"]


def suite_of(spec: str) -> tuple[Suite, str]:
    """The suite that `SUITE[:DATA][@LENGTH][=FILE]` names, and the file, "" for the published rows on the hub.

    Raises:
        UserError: no such suite, data set or length; the sentence lists those that there are.
    """
    label, _, file = spec.partition("=")
    label, _, length = label.partition("@")
    name, _, data = label.partition(":")
    if name not in SUITES:
        raise UserError(f"unknown suite {name!r}; choose one of {', '.join(SUITES)}.")
    return SUITES[name](data, length), file


def prompts(spec: str, count: int, *, tokens: int, tokenizer: Tokenizer) -> list[Prompt]:
    """The first `count` prompts of a published benchmark, in its order, each cut in its context to fit `tokens`.

    `spec` is as in `longbench:qasper`, `longbench_v2` or `ruler:niah_single_1@4096`, with `=FILE` behind it for rows of
    a .json, .jsonl or .parquet file in the format of the published ones. Neighbouring rows with one context are one
    prompt with several questions. Rows whose question is in their context are left out, and said. There may be fewer
    than `count`. No chat template is applied.

    Raises:
        UserError: the spec, the file or the hub; a row without its columns; a prompt that cannot fit.
    """
    suite, file = suite_of(spec)
    found = list(islice(_prompts(suite, _rows(suite, file), tokens, tokenizer), count))
    if not found:
        raise UserError(f"{spec} has no row that could be asked; name a data set or file that does.")
    return found


def _rows(suite: Suite, file: str) -> Iterator[Row]:
    files = local_data_file(file) if file else suite.published
    log(f"reading {suite.label} from {file or 'the hub'}")
    remedy = f"connect to the hub, or name a file of your own as {suite.label}=FILE"
    for row in stream_file_rows(f"suite {suite.label} ({files})", remedy, files=files, where=suite.where):
        checked = check_row(row, suite.columns, f"suite {suite.label}")
        yield checked | {"context": str(checked["context"])}


def _prompts(suite: Suite, rows: Iterator[Row], tokens: int, tokenizer: Tokenizer) -> Iterator[Prompt]:
    for number, (_, group) in enumerate(groupby(rows, key=lambda row: row["context"])):
        asked = list(group)
        prompt = fitted(suite, asked, tokens=tokens, tokenizer=tokenizer)
        left_out = len(asked) - (len(prompt.questions) if prompt else 0)
        if left_out:
            log(f"{suite.label}:{number}: left out {left_out} of {len(asked)} questions, which the context has already")
        if prompt:
            yield replace(prompt, name=f"{suite.label}:{number}")
