"""Evaluate several plans side by side on a window or a prompt, which is prefilled once for all of them."""

from collections.abc import Sequence
from typing import Literal

import torch

from baklava.data.windows import Window, bos_tokens
from baklava.evaluation.task_scoring import (
    Answer,
    PlanAnswers,
    answer_closed_book,
    answer_with_full_cache,
    answer_with_plan,
    prefill_context,
)
from baklava.evaluation.tasks import Prompt
from baklava.evaluation.window_scoring import PrefilledWindow, WindowScore, prefill_window, score_plan
from baklava.eviction import build_eviction
from baklava.plan.budget_plan import BudgetPlan
from baklava.runtime.model_loader import LoadedModel
from baklava.serialization import FrozenModel

MAX_SHORT_CONTEXT_TOKENS = 512


class WindowResult(FrozenModel):
    """The scores of all plans on one window, in the order of the plans.

    `context_gain` is what the context is worth, in nats per token: the full cache's NLL with only the last
    `short_context` tokens of context, minus its NLL with all of them. On text without a gain, all plans score alike.
    """

    kind: Literal["window"] = "window"
    name: str
    document: str
    tokens: int
    context_gain: float
    short_context: int
    scores: tuple[WindowScore, ...]


class PromptResult(FrozenModel):
    """The answers of all plans to the questions of one prompt, in the order of the plans.

    Attributes:
        tokens: tokens of the context.
        metrics: the name of each question's metric.
        chance: the score of a guess at each question.
        full: the answers with the full cache.
        closed_book: the answers without the context.
        plans: the answers under each plan.
    """

    kind: Literal["prompt"] = "prompt"
    name: str
    task: str
    tokens: int
    metrics: tuple[str, ...]
    chance: tuple[float, ...]
    full: tuple[Answer, ...]
    closed_book: tuple[Answer, ...]
    plans: tuple[PlanAnswers, ...]


class Evaluator:
    """A model and the plans that are compared on it.

    Raises:
        UserError: a plan is for another model.
    """

    def __init__(self, loaded: LoadedModel, plans: Sequence[BudgetPlan]) -> None:
        for plan in plans:
            loaded.check_plan(plan)
        self.loaded, self.plans = loaded, tuple(plans)
        self.evictions = tuple(build_eviction(plan.eviction) for plan in plans)

    def evaluate_window(self, window: Window) -> WindowResult:
        """Score every plan on a window."""
        prefilled = prefill_window(self.loaded, window, self.evictions)
        return WindowResult(
            name=window.name,
            document=window.document,
            tokens=len(window.ids),
            context_gain=context_gain(self.loaded, prefilled),
            short_context=short_context_tokens(window),
            scores=tuple(score_plan(self.loaded, prefilled, plan) for plan in self.plans),
        )

    def evaluate_prompt(self, task: str, prompt: Prompt) -> PromptResult:
        """Answer the questions of a prompt under every plan."""
        context = prefill_context(self.loaded, prompt, self.evictions)
        return PromptResult(
            name=prompt.name,
            task=task,
            tokens=context.ids.shape[1],
            metrics=tuple(question.metric for question in prompt.questions),
            chance=tuple(question.chance for question in prompt.questions),
            full=answer_with_full_cache(self.loaded, context, prompt),
            closed_book=answer_closed_book(self.loaded, prompt),
            plans=tuple(answer_with_plan(self.loaded, context, prompt, plan) for plan in self.plans),
        )


@torch.inference_mode()
def context_gain(loaded: LoadedModel, prefilled: PrefilledWindow) -> float:
    """Return what the context of a window is worth, in nats per token; see `WindowResult`."""
    window = prefilled.window
    bos = bos_tokens(loaded.tokenizer) if loaded.tokenizer else []
    bos = bos if list(window.ids[: len(bos)]) == bos else []
    ids = loaded.as_batch([*bos, *window.ids[window.context_length - short_context_tokens(window) :]])
    logits = loaded.model(ids, use_cache=False, logits_to_keep=window.continuation_length + 1).logits[0, :-1]
    short_nll = torch.nn.functional.cross_entropy(logits.float(), ids[0, -window.continuation_length :])
    return float(short_nll) - float(prefilled.full_nll.mean())


def short_context_tokens(window: Window) -> int:
    """Return the tokens of the short context in a window's context gain."""
    return max(1, min(MAX_SHORT_CONTEXT_TOKENS, window.context_length // 2))
