"""Answering: what a cache still knows of a context that was cut before anybody asked."""

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import Cache, DynamicCache

from baklava.cache.budgeted_cache import BudgetedCache
from baklava.data.windows import bos_tokens
from baklava.evaluation.tasks import Prompt, Question
from baklava.evaluation.tasks.metrics import METRICS
from baklava.eviction import Eviction
from baklava.plan.budget_plan import BudgetPlan
from baklava.runtime.logprobs import forced_logits
from baklava.runtime.model_loader import LoadedModel
from baklava.runtime.prefill import PrefilledPrompt, compress, prefill_and_record

Ids = Int[Tensor, "one tokens"]

TAIL = 64
"""Characters of a context that its questions are encoded behind."""


@dataclass(frozen=True)
class Answer:
    """How one question was answered.

    `exact` is the metric of the greedy answer, from 0 to 1: where the answer is one text, 1 if greedy decoding writes
    all of its tokens, whatever follows them. `nll` is the NLL of the right answer in nats per token.
    """

    exact: float
    nll: float


@dataclass(frozen=True)
class Answers:
    """The answers to a prompt's questions, and the most bytes that the cache was measured to hold on the way."""

    answers: tuple[Answer, ...]
    allocated_bytes: int


def record_prompt(loaded: LoadedModel, prompt: Prompt, evictions: Sequence[Eviction]) -> PrefilledPrompt:
    """Prefill the context of a prompt, and nothing of its questions, for plans with these eviction methods.

    Raises:
        UserError: the prompt is longer than the model's positions.
    """
    encode = loaded.tokenizer.encode
    longest = prompt.num_tokens(loaded.count_tokens)
    loaded.check_length(longest + len(bos_tokens(loaded.tokenizer)), "a prompt", "make shorter prompts")
    ids = bos_tokens(loaded.tokenizer) + encode(prompt.context, add_special_tokens=False)
    return prefill_and_record(loaded, torch.tensor([ids], device=loaded.device), evictions)


@torch.inference_mode()
def answer(loaded: LoadedModel, recorded: PrefilledPrompt, prompt: Prompt, plan: BudgetPlan) -> Answers:
    """Answer the questions inside a plan: every question starts from the same cut cache.

    Raises:
        RuntimeError: the cache has seen more than the context, so that eviction may have known a question.
    """
    start, _ = compress(loaded, recorded, plan)
    check_unasked(start, recorded.ids.shape[1])
    asked = _Asked(loaded, prompt, lambda: deepcopy(start))
    return Answers(tuple(asked.answer(question) for question in prompt.questions), asked.held)


@torch.inference_mode()
def answer_full(loaded: LoadedModel, recorded: PrefilledPrompt, prompt: Prompt) -> tuple[Answer, ...]:
    """The answers of transformers' own cache, which keeps everything."""
    asked = _Asked(loaded, prompt, recorded.recording.to_dynamic_cache)
    return tuple(asked.answer(question) for question in prompt.questions)


@torch.inference_mode()
def answer_closed_book(loaded: LoadedModel, prompt: Prompt) -> tuple[Answer, ...]:
    """The answers of a model that was never shown the context: what chance is, measured."""
    asked = _Asked(loaded, prompt, DynamicCache, bos_tokens(loaded.tokenizer))
    return tuple(asked.answer(question) for question in prompt.questions)


def check_unasked(cache: Cache, context: int) -> None:
    """Raise RuntimeError when a cache has seen more than the `context` tokens before the questions."""
    if cache.get_seq_length() != context:
        raise RuntimeError(
            f"the cache has seen {cache.get_seq_length()} tokens, but the context has {context}: eviction may know the "
            "question; a question is asked behind the cut"
        )


def behind(tokenizer: Any, before: str, text: str) -> list[int]:
    """The tokens of a text that goes on behind another one, as far as tokens do not span the two.

    Encoded alone, many a tokenizer would put a mark of a first word before it, which no model writes in mid-text.
    """
    encoded, first = (tokenizer.encode(part, add_special_tokens=False) for part in (before + text, before))
    if encoded[: len(first)] == first:
        return encoded[len(first) :]
    return tokenizer.encode(text, add_special_tokens=False)


class _Asked:
    """Asks questions, each on a cache of its own that `start` gives."""

    def __init__(
        self, loaded: LoadedModel, prompt: Prompt, start: Callable[[], Cache], before: Sequence[int] = ()
    ) -> None:
        self.loaded, self.context, self.start, self.before = loaded, prompt.context[-TAIL:], start, list(before)
        self.held = 0

    def answer(self, question: Question) -> Answer:
        """Score the right answer, and the greedy one if it has to be written down to be scored."""
        asked = self._ids([*self.before, *behind(self.loaded.tokenizer, self.context, question.text)])
        target = self._ids(behind(self.loaded.tokenizer, question.text, question.target))
        cache = self.start()
        logits = self._forward(cache, torch.cat([asked, target[:, :-1]], 1))[asked.shape[1] - 1 :]
        nll = torch.nn.functional.cross_entropy(logits.float(), target[0])
        self._check(cache)
        if question.metric == "exact":
            # By induction, greedy decoding writes the target exactly when it would choose each of its tokens.
            return Answer(float(torch.equal(logits.argmax(-1), target[0])), float(nll))
        return Answer(METRICS[question.metric](self._greedy(asked, question.max_new_tokens), question), float(nll))

    def _greedy(self, asked: Ids, tokens: int) -> str:
        cache, ends = self.start(), self.loaded.eos_token_ids
        made = [int(self._forward(cache, asked)[-1].argmax())]
        while len(made) < tokens and made[-1] not in ends:
            made.append(int(self._forward(cache, asked.new_tensor([made[-1:]]))[-1].argmax()))
        self._check(cache)
        return str(self.loaded.tokenizer.decode(made, skip_special_tokens=True))

    def _forward(self, cache: Cache, ids: Ids) -> Float[Tensor, "tokens vocabulary"]:
        """The logits behind each of these tokens, which meet the budget one by one."""
        logits = forced_logits(self.loaded, cache, ids[0])
        if isinstance(cache, BudgetedCache):
            self.held = max(self.held, cache.nbytes)
        return logits

    def _check(self, cache: Cache) -> None:
        if isinstance(cache, BudgetedCache):
            cache.check_integrity()
            if self.held > cache.reserved_bytes:
                raise RuntimeError(f"the cache held {self.held} bytes, {cache.reserved_bytes} were reserved")

    def _ids(self, ids: Sequence[int]) -> Ids:
        return torch.tensor([list(ids)], device=self.loaded.device)
