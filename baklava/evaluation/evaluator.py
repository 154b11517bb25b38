"""Evaluation: plans side by side on a window or a prompt, which is prefilled once for all of them."""

from collections.abc import Sequence
from typing import Literal

import torch

from baklava.data.windows import Window, bos_tokens
from baklava.evaluation.task_scoring import Answer, Answers, answer, answer_closed_book, answer_full, record_prompt
from baklava.evaluation.tasks import Prompt
from baklava.evaluation.window_scoring import Prefilled, Score, prefill, score
from baklava.eviction import eviction_of
from baklava.plan.budget_plan import BudgetPlan
from baklava.runtime.model_loader import LoadedModel
from baklava.serialization import FrozenModel

SHORT_CONTEXT = 512
"""Most context that a corpus's gain compares with."""


class WindowResult(FrozenModel):
    """The scores of all plans on one window, in their order.

    `gain` is what context is worth here, in nats per token: the full cache's NLL with only the last `short` tokens
    of context minus that with all of them. Text without gain cannot tell plans apart.
    """

    kind: Literal["window"] = "window"
    name: str
    document: str
    tokens: int
    gain: float
    short: int
    scores: tuple[Score, ...]


class PromptResult(FrozenModel):
    """How all plans answered the questions of one prompt, in their order, beside the full cache and chance.

    `tokens` are those of its context, `metrics` the names of what scored each question, `chance` what a guess at each
    would score; `closed_book` are the answers of the model without the context.
    """

    kind: Literal["prompt"] = "prompt"
    name: str
    task: str
    tokens: int
    metrics: tuple[str, ...]
    chance: tuple[float, ...]
    full: tuple[Answer, ...]
    closed_book: tuple[Answer, ...]
    plans: tuple[Answers, ...]


class Evaluator:
    """A model and the plans that are compared on it.

    Raises:
        UserError: a plan is for another model.
    """

    def __init__(self, loaded: LoadedModel, plans: Sequence[BudgetPlan]) -> None:
        for plan in plans:
            plan.check_fits(loaded.identity, loaded.geometry)
        self.loaded, self.plans = loaded, tuple(plans)
        self.evictions = tuple(eviction_of(plan.eviction) for plan in plans)

    def window(self, window: Window) -> WindowResult:
        """Score every plan on a window."""
        prefilled = prefill(self.loaded, window, self.evictions)
        scores = tuple(score(self.loaded, prefilled, plan) for plan in self.plans)
        return WindowResult(
            name=window.name,
            document=window.document,
            tokens=len(window.ids),
            gain=gain(self.loaded, prefilled),
            short=short_context(window),
            scores=scores,
        )

    def prompt(self, task: str, prompt: Prompt) -> PromptResult:
        """Ask every plan the questions of a prompt."""
        recorded = record_prompt(self.loaded, prompt, self.evictions)
        return PromptResult(
            name=prompt.name,
            task=task,
            tokens=recorded.ids.shape[1],
            metrics=tuple(question.metric for question in prompt.questions),
            chance=tuple(question.chance for question in prompt.questions),
            full=answer_full(self.loaded, recorded, prompt),
            closed_book=answer_closed_book(self.loaded, prompt),
            plans=tuple(answer(self.loaded, recorded, prompt, plan) for plan in self.plans),
        )


def gain(loaded: LoadedModel, prefilled: Prefilled) -> float:
    """What context is worth on a window, in nats per token; see `WindowResult`."""
    window = prefilled.window
    return _short_nll(loaded, window, short_context(window)) - float(prefilled.nll.mean())


def short_context(window: Window) -> int:
    """Tokens of context that a window's gain compares all of them with."""
    return max(1, min(SHORT_CONTEXT, window.context_length // 2))


@torch.inference_mode()
def _short_nll(loaded: LoadedModel, window: Window, short: int) -> float:
    """NLL of the continuation with only the last tokens of its context, behind what the tokenizer puts first."""
    start = bos_tokens(loaded.tokenizer) if loaded.tokenizer else []
    start = start if list(window.ids[: len(start)]) == start else []
    ids = torch.tensor([[*start, *window.ids[window.context_length - short :]]], device=loaded.device)
    logits = loaded.model(ids, use_cache=False, logits_to_keep=window.continuation_length + 1).logits[0, :-1]
    targets = ids[0, -window.continuation_length :]
    return float(torch.nn.functional.cross_entropy(logits.float(), targets))
