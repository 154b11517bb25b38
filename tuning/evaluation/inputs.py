"""What an evaluation works on: plans by name, windows of the texts, prompts of the tasks."""

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache

from baklava.allocation.plan_spec import NamedPlan, named_plan
from baklava.cache.recording_layer import check_recordable
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
    """Plans, windows and prompts.

    Plans that are made here state their ratio at a window's length, whatever the prompts; `full` holds the longest.

    Raises:
        UserError: an unknown plan, text or task, texts too short, or more tokens than the model takes.
    """
    cut = _windows(settings, loaded)
    window = len(cut[0].ids)
    loaded.check_length(window)
    lengths = tuple(sorted(settings.lengths)) or (window,)
    if settings.tasks:
        loaded.check_length(max(lengths), "a prompt", "lower --lengths")
    asked = _prompts(settings, loaded, lengths)
    longest = max(window, *lengths) if asked else window
    profile = _profiler(settings, loaded, cut)
    lengths_of = {spec: longest if spec == "full" else window for spec in settings.plans}
    plans = tuple(named_plan(spec, loaded, length, profile) for spec, length in lengths_of.items())
    _check_recorded(loaded, plans, longest)
    return EvaluationInputs(plans, tuple(cut), tuple(asked))


def _check_recorded(loaded: LoadedModel, plans: Sequence[NamedPlan], longest: int) -> None:
    """Raise UserError when prefills of this length cannot be recorded for the plans."""
    check_recordable(loaded.geometry)
    for named in plans:
        repeats = build_eviction(named.plan.eviction).query_sample.uses_repetition
        if repeats and longest + REPEAT_OVERHEAD_TOKENS > loaded.max_length:
            raise UserError(
                f"{named.name} repeats what it prefilled, which takes {REPEAT_OVERHEAD_TOKENS} tokens more than the {longest} of the "
                f"longest window or prompt, and {loaded.identity.id} takes {loaded.max_length}; shorten them, or leave "
                "the plan out"
            )


def _windows(settings: EvaluationSettings, loaded: LoadedModel) -> list[Window]:
    if settings.windows:
        return read_windows(settings.windows, loaded.model.config.vocab_size)[: settings.limit]
    lengths = {"context": settings.context, "continuation": settings.continuation}
    return cut_windows(load_documents(settings.texts), loaded.tokenizer, **lengths)[: settings.limit or DEFAULT_MAX_WINDOWS]


def _prompts(settings: EvaluationSettings, loaded: LoadedModel, lengths: Sequence[int]) -> list[TaskPrompt]:
    for name in settings.tasks:
        (suites.parse_suite_spec if _is_suite(name) else task_class)(name)  # a wrong name is refused before anything is made
    prose = cache(lambda: FillerText.from_documents(load_documents(settings.texts)))
    made = [
        prompt
        for name in settings.tasks
        for length in (lengths[-1:] if _is_suite(name) else lengths)
        for prompt in _of_task(settings, loaded, prose, name, length)
    ]
    asked = [TaskPrompt(task=prompt.name.rpartition(":")[0], prompt=prompt) for prompt in made]
    if twice := first_duplicate(each.prompt.name for each in asked):
        raise UserError(f"two prompts are named {twice}; evaluate the files of one benchmark one by one")
    return asked


def _of_task(
    settings: EvaluationSettings, loaded: LoadedModel, prose: Callable[[], FillerText], name: str, length: int
) -> list[Prompt]:
    """The prompts of one task at one length, named TASK:NUMBER, or TASK@LENGTH:NUMBER among several lengths."""
    if _is_suite(name):
        return suites.load_prompts(name, settings.prompts, tokens=length, tokenizer=loaded.tokenizer)
    tokens, label = length - len(bos_tokens(loaded.tokenizer)), f"{name}@{length}" if settings.lengths[1:] else name
    made = build_prompts(
        task_class(name)(), prose(), settings.prompts, tokens=tokens, seed=settings.seed, count_tokens=loaded.count_tokens
    )
    return [replace(prompt, name=f"{label}:{number}") for number, prompt in enumerate(made)]


def _is_suite(name: str) -> bool:
    return re.split("[:@=]", name)[0] in suites.SUITES


def _profiler(settings: EvaluationSettings, loaded: LoadedModel, cut: Sequence[Window]) -> Callable[[], Profile]:
    """Profiles on the calibration texts, once, and only if a plan asks for it; never on a document that is scored."""

    @cache
    def profile() -> Profile:
        lengths = {"context": cut[0].context_length, "continuation": cut[0].continuation_length}
        scored = {window.document for window in cut}
        texts = [document for document in load_documents(settings.calibration) if document.name not in scored]
        splits = make_splits(texts, loaded.tokenizer, **lengths, seed=0)
        return cached_profile(loaded, splits.calibration)

    return profile
