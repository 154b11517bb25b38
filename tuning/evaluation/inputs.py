"""Inputs of an evaluation: plans by name, windows of the texts, prompts of the tasks."""

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache

from baklava.allocation.plan_spec import ResolvedPlan, resolve_plan
from baklava.data.documents import load_documents
from baklava.data.windows import Window, bos_tokens, cut_windows, make_splits, read_windows
from baklava.errors import UserError, first_duplicate
from baklava.evaluation import suites
from baklava.evaluation.tasks import FillerText, Prompt, build_prompts, task_class
from baklava.eviction import build_eviction
from baklava.profiling.profile import Profile
from baklava.profiling.profiler import cached_profile
from baklava.runtime.context_reconstruction import REPEAT_OVERHEAD_TOKENS
from baklava.runtime.model_loader import LoadedModel
from tuning.evaluation.run_dir import DEFAULT_MAX_WINDOWS, EvaluationInputs, EvaluationSettings, TaskPrompt


def prepare_inputs(settings: EvaluationSettings, loaded: LoadedModel) -> EvaluationInputs:
    """Return plans, windows and prompts.

    The ratio of plans that are made here is stated at the length of a window, even if prompts are longer. Only `full`
    is made for the longest.

    Raises:
        UserError: an unknown plan, text or task, texts too short, or more tokens than the model accepts.
    """
    windows = _windows(settings, loaded)
    window_tokens = len(windows[0].ids)
    loaded.check_length(window_tokens)
    for window in windows:
        loaded.check_tokens(window.ids)
    lengths = tuple(sorted(settings.lengths)) or (window_tokens,)
    if settings.tasks:
        loaded.check_length(max(lengths), "a prompt", "lower --lengths")
    prompts = _prompts(settings, loaded, lengths)
    max_tokens = max(window_tokens, *lengths) if prompts else window_tokens

    @cache
    def load_profile() -> Profile:
        # Never on a document that is scored, nor on a copy of one.
        scored = {window.document for window in windows}
        documents = [document for document in load_documents(settings.calibration) if document.name not in scored]
        tokens = {"context": windows[0].context_length, "continuation": windows[0].continuation_length}
        splits = make_splits(documents, loaded.tokenizer, **tokens, seed=0, seen=windows)
        return cached_profile(loaded, splits.calibration)

    resolved = [
        resolve_plan(spec, loaded, max_tokens if spec == "full" else window_tokens, load_profile)
        for spec in settings.plans
    ]
    plans = [replace(named, plan=named.plan.with_prefill_chunk(settings.prefill_chunk)) for named in resolved]
    _check_repeatable(loaded, plans, max_tokens)
    return EvaluationInputs(tuple(plans), tuple(windows), tuple(prompts))


def _check_repeatable(loaded: LoadedModel, plans: Sequence[ResolvedPlan], max_tokens: int) -> None:
    """Raise UserError if a plan repeats what it prefills and the model's positions do not suffice for that."""
    for resolved in plans:
        uses_repetition = build_eviction(resolved.plan.eviction).query_sample.uses_repetition
        if uses_repetition and max_tokens + REPEAT_OVERHEAD_TOKENS > loaded.max_length:
            raise UserError(
                f"{resolved.name} repeats what it prefilled, which takes {REPEAT_OVERHEAD_TOKENS} tokens more than the "
                f"{max_tokens} of the longest window or prompt, and {loaded.identity.id} accepts {loaded.max_length}; "
                "shorten them, or leave the plan out"
            )


def _windows(settings: EvaluationSettings, loaded: LoadedModel) -> list[Window]:
    if settings.windows:
        return read_windows(settings.windows, loaded.num_embeddings)[: settings.limit]
    tokens = {"context": settings.context, "continuation": settings.continuation}
    windows = cut_windows(load_documents(settings.texts), loaded.tokenizer, **tokens)
    return windows[: settings.limit or DEFAULT_MAX_WINDOWS]


def _prompts(settings: EvaluationSettings, loaded: LoadedModel, lengths: Sequence[int]) -> list[TaskPrompt]:
    """The prompts of all tasks; suites have prompts of the greatest length only."""
    for name in settings.tasks:  # a wrong name is an error before any prompt is made
        (suites.parse_suite_spec if _is_suite(name) else task_class)(name)
    load_filler = cache(lambda: FillerText.from_documents(load_documents(settings.texts)))
    prompts = [
        TaskPrompt(task=prompt.name.rpartition(":")[0], prompt=prompt)
        for name in settings.tasks
        for length in (lengths[-1:] if _is_suite(name) else lengths)
        for prompt in _task_prompts(settings, loaded, load_filler, name, length)
    ]
    if duplicate := first_duplicate(prompt.prompt.name for prompt in prompts):
        raise UserError(f"two prompts are named {duplicate}; evaluate the files of one benchmark one by one")
    return prompts


def _task_prompts(
    settings: EvaluationSettings, loaded: LoadedModel, load_filler: Callable[[], FillerText], name: str, length: int
) -> list[Prompt]:
    """The prompts of one task at one length, named TASK:NUMBER, or TASK@LENGTH:NUMBER if there are several lengths."""
    if _is_suite(name):
        return suites.load_prompts(name, settings.prompts, tokens=length, tokenizer=loaded.tokenizer)
    prompts = build_prompts(
        task_class(name)(),
        load_filler(),
        settings.prompts,
        tokens=length - len(bos_tokens(loaded.tokenizer)),
        seed=settings.seed,
        count_tokens=loaded.count_tokens,
    )
    label = f"{name}@{length}" if len(settings.lengths) > 1 else name
    return [replace(prompt, name=f"{label}:{number}") for number, prompt in enumerate(prompts)]


def _is_suite(name: str) -> bool:
    return re.split("[:@=]", name)[0] in suites.SUITES
