"""What an evaluation works on: plans by name, windows of the texts, prompts of the tasks."""

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache

from baklava import suites
from baklava.model import LoadedModel
from baklava.naming import named_plan
from baklava.profile import Profile, cached_profile
from baklava.tasks import Prompt, Prose, prompts, task_of
from baklava.texts import documents
from baklava.windows import Window, read_windows, split, start_tokens, windows
from tuning.evaluation.folder import Asked, Material
from tuning.evaluation.settings import EvaluationSettings


def prepare(settings: EvaluationSettings, loaded: LoadedModel) -> Material:
    """Plans, windows and prompts; the ratio of plans that are made here is stated at the longest of them.

    Raises:
        UserError: an unknown plan, text or task, texts too short, or prompts longer than the model's positions.
    """
    cut = _windows(settings, loaded)
    lengths = tuple(sorted(settings.lengths)) or (len(cut[0].ids),)
    loaded.check_length(max(lengths), "a prompt", "lower --lengths")
    asked = _prompts(settings, loaded, lengths)
    longest = max(len(cut[0].ids), *lengths) if asked else len(cut[0].ids)
    profile = _profiler(settings, loaded, cut[0])
    plans = [named_plan(spec, loaded, longest, profile) for spec in settings.plans]
    return Material(tuple(plans), tuple(cut), tuple(asked))


def _windows(settings: EvaluationSettings, loaded: LoadedModel) -> list[Window]:
    if settings.windows:
        return read_windows(settings.windows, loaded.model.config.vocab_size)
    lengths = {"context": settings.context, "continuation": settings.continuation}
    return windows(documents(settings.texts), loaded.tokenizer, **lengths)[: settings.limit]


def _prompts(settings: EvaluationSettings, loaded: LoadedModel, lengths: Sequence[int]) -> list[Asked]:
    for name in settings.tasks:
        (suites.suite_of if _is_suite(name) else task_of)(name)  # a wrong name is refused before anything is made
    prose = cache(lambda: Prose.of(documents(settings.texts)))
    made = [
        prompt
        for name in settings.tasks
        for length in (lengths[-1:] if _is_suite(name) else lengths)
        for prompt in _of_task(settings, loaded, prose, name, length)
    ]
    return [Asked(task=prompt.name.rpartition(":")[0], prompt=prompt) for prompt in made]


def _of_task(
    settings: EvaluationSettings, loaded: LoadedModel, prose: Callable[[], Prose], name: str, length: int
) -> list[Prompt]:
    """The prompts of one task at one length, named TASK:NUMBER, or TASK@LENGTH:NUMBER among several lengths."""
    if _is_suite(name):
        return suites.prompts(name, settings.prompts, tokens=length, tokenizer=loaded.tokenizer)
    tokens, label = length - len(start_tokens(loaded.tokenizer)), f"{name}@{length}" if settings.lengths[1:] else name
    made = prompts(
        task_of(name)(), prose(), settings.prompts, tokens=tokens, seed=settings.seed, length=loaded.count_tokens
    )
    return [replace(prompt, name=f"{label}:{number}") for number, prompt in enumerate(made)]


def _is_suite(name: str) -> bool:
    return re.split("[:@=]", name)[0] in suites.SUITES


def _profiler(settings: EvaluationSettings, loaded: LoadedModel, like: Window) -> Callable[[], Profile]:
    """Profiles on the calibration texts, once, and only if a plan asks for it."""

    @cache
    def profile() -> Profile:
        lengths = {"context": like.context, "continuation": like.continuation}
        splits = split(documents(settings.calibration), loaded.tokenizer, **lengths, seed=0)
        return cached_profile(loaded, splits.calibration)

    return profile
