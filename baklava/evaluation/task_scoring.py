"""Answer a prompt's questions from a context that was prefilled and compressed before any of them was asked."""

from collections.abc import Callable, Sequence
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
from baklava.runtime.continuation_text import decode_continuation
from baklava.runtime.logprobs import forced_logits
from baklava.runtime.model_loader import LoadedModel
from baklava.runtime.prefill import PrefilledPrompt, compress, prefill_and_record

Ids = Int[Tensor, " tokens"]

BOUNDARY_CHARS = 64
"""Characters of the context that a question is encoded with, so that its first token is that of running text."""


@dataclass(frozen=True)
class Answer:
    """How one question was answered.

    Attributes:
        score: the question's metric of the greedy answer, from 0 to 1. For "exact" it is 1 if greedy decoding writes
            all tokens of the target, whatever follows them.
        nll: NLL of the right answer in nats per token.
    """

    score: float
    nll: float


@dataclass(frozen=True)
class PlanAnswers:
    """A plan's answers to the questions of a prompt, and the peak bytes of its cache."""

    answers: tuple[Answer, ...]
    allocated_bytes: int


def prefill_context(loaded: LoadedModel, prompt: Prompt, evictions: Sequence[Eviction]) -> PrefilledPrompt:
    """Prefill the context of a prompt, without its questions, for plans with these eviction methods.

    Raises:
        UserError: the prompt is longer than the model's positions.
    """
    bos = bos_tokens(loaded.tokenizer)
    loaded.check_length(prompt.num_tokens(loaded.count_tokens) + len(bos), "a prompt", "make shorter prompts")
    ids = bos + loaded.tokenizer.encode(prompt.context, add_special_tokens=False)
    return prefill_and_record(loaded, loaded.as_batch(ids), evictions)


@torch.inference_mode()
def answer_with_plan(loaded: LoadedModel, context: PrefilledPrompt, prompt: Prompt, plan: BudgetPlan) -> PlanAnswers:
    """Answer the questions under a plan; every question starts from a copy of the same compressed cache.

    Raises:
        RuntimeError: the cache has seen more than the context, so eviction may have known a question.
    """
    compressed, _ = compress(loaded, context, plan)
    check_question_unseen(compressed, context.ids.shape[1])
    runner = _QuestionRunner(loaded, prompt, lambda: compressed.copy(compressed.max_tokens))
    return PlanAnswers(tuple(runner.answer(question) for question in prompt.questions), runner.peak_bytes)


@torch.inference_mode()
def answer_with_full_cache(loaded: LoadedModel, context: PrefilledPrompt, prompt: Prompt) -> tuple[Answer, ...]:
    """Answer the questions with transformers' own cache of the whole context."""
    runner = _QuestionRunner(loaded, prompt, context.recording.to_dynamic_cache)
    return tuple(runner.answer(question) for question in prompt.questions)


@torch.inference_mode()
def answer_closed_book(loaded: LoadedModel, prompt: Prompt) -> tuple[Answer, ...]:
    """Answer the questions without the context: the measured level of chance."""

    def make_cache() -> Cache:
        return DynamicCache(config=loaded.model.config)

    runner = _QuestionRunner(loaded, prompt, make_cache, bos_tokens(loaded.tokenizer))
    return tuple(runner.answer(question) for question in prompt.questions)


def check_question_unseen(cache: Cache, context_tokens: int) -> None:
    """Raise RuntimeError if a cache has seen other than the `context_tokens` before the questions."""
    if cache.get_seq_length() != context_tokens:
        raise RuntimeError(
            f"the cache has seen {cache.get_seq_length()} tokens, but the context has {context_tokens}: eviction may "
            "know the question; ask it after the context has been compressed"
        )


def encode_continuation(tokenizer: Any, before: str, text: str) -> list[int]:
    """Encode a text that continues another one, unless a token spans both.

    Many tokenizers start a text that is encoded alone with a mark of its first word, which no model writes in
    mid-text.
    """
    encoded, prefix = (tokenizer.encode(part, add_special_tokens=False) for part in (before + text, before))
    if encoded[: len(prefix)] == prefix:
        return encoded[len(prefix) :]
    return tokenizer.encode(text, add_special_tokens=False)


class _QuestionRunner:
    """Asks questions, each on a new cache from `make_cache`, and records the peak bytes of budgeted ones."""

    def __init__(
        self, loaded: LoadedModel, prompt: Prompt, make_cache: Callable[[], Cache], bos: Sequence[int] = ()
    ) -> None:
        self.loaded, self.make_cache, self.bos = loaded, make_cache, list(bos)
        self.context_end = prompt.context[-BOUNDARY_CHARS:]
        self.peak_bytes = 0

    def answer(self, question: Question) -> Answer:
        """Score the right answer, and generate one if the metric needs it."""
        tokenizer = self.loaded.tokenizer
        ids = self._tensor([*self.bos, *encode_continuation(tokenizer, self.context_end, question.text)])
        target = self._tensor(encode_continuation(tokenizer, question.text, question.target))
        cache = self.make_cache()
        context_tokens = cache.get_seq_length()
        logits = self._forward(cache, torch.cat([ids, target[:-1]]))[len(ids) - 1 :]
        nll = torch.nn.functional.cross_entropy(logits.float(), target)
        self._check(cache, context_tokens + len(ids) + len(target) - 1)
        if question.metric == "exact":
            # By induction, greedy decoding writes the target exactly if it would choose each of its tokens.
            return Answer(float(torch.equal(logits.argmax(-1), target)), float(nll))
        return Answer(METRICS[question.metric](self._generate(ids, question.max_new_tokens), question), float(nll))

    def _generate(self, ids: Ids, max_new_tokens: int) -> str:
        cache = self.make_cache()
        context_tokens = cache.get_seq_length()
        tokens = [int(self._forward(cache, ids)[-1].argmax())]
        while len(tokens) < max_new_tokens and tokens[-1] not in self.loaded.eos_token_ids:
            tokens.append(int(self._forward(cache, ids.new_tensor(tokens[-1:]))[-1].argmax()))
        self._check(cache, context_tokens + len(ids) + len(tokens) - 1)
        written = tokens[:-1] if tokens[-1] in self.loaded.eos_token_ids else tokens
        return decode_continuation(self.loaded.tokenizer, ids.tolist(), written)

    def _forward(self, cache: Cache, ids: Ids) -> Float[Tensor, "tokens vocabulary"]:
        logits = forced_logits(self.loaded, cache, ids)
        if isinstance(cache, BudgetedCache):
            self.peak_bytes = max(self.peak_bytes, cache.nbytes)
        return logits

    def _check(self, cache: Cache, num_tokens: int) -> None:
        if isinstance(cache, BudgetedCache):
            cache.check_integrity(num_tokens)
            if self.peak_bytes > cache.reserved_bytes:
                raise RuntimeError(
                    f"the cache allocated {self.peak_bytes} bytes, but only {cache.reserved_bytes} were reserved"
                )

    def _tensor(self, ids: Sequence[int]) -> Ids:
        return torch.tensor(list(ids), device=self.loaded.device)
