"""The model `baklava` for lm-evaluation-harness: its arguments, its requests, and how many of them a plan affected."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import CacheHook, TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.models.utils_hf import stop_sequences_criteria
from lm_eval.utils import get_rolling_token_windows, simple_parse_args_string
from pydantic import Field, PositiveInt, ValidationError
from typing_extensions import override

from baklava.allocation.plan_spec import resolve_plan
from baklava.console import log, progress_bar
from baklava.data.documents import load_documents
from baklava.data.windows import make_splits
from baklava.errors import UserError
from baklava.plan.budget_plan import BudgetPlan
from baklava.profiling.profile import Profile
from baklava.profiling.profiler import cached_profile
from baklava.runtime.continuation_text import decode_continuation
from baklava.runtime.decode import generate
from baklava.runtime.dtypes import DType
from baklava.runtime.logprobs import score_continuations, score_suffix
from baklava.runtime.model_loader import LoadedModel, load
from baklava.serialization import FrozenModel

DEFAULT_CONTEXT_LENGTH = 4096
"""Tokens for which METHOD:BUDGET states its bytes; fewer if the model takes fewer."""

DEFAULT_MAX_NEW_TOKENS = 256
"""Tokens to generate if a task sets no number, as in the harness's own models."""


class ModelArgs(FrozenModel):
    """`--model_args`, and the options of the harness that it passes to a model.

    Attributes:
        pretrained: demo, a directory or a hub id.
        plan: a plan file, `full` or METHOD:BUDGET.
        context_length: tokens for which METHOD:BUDGET states its bytes; a plan file has its own.
        calibration: the text that METHOD:BUDGET is profiled on.
        max_length: the most tokens that the model is fed.
        dtype: precision of the model's products; by default float32 on a CPU.
        device: as of the harness, whose default is a GPU even on a machine without one.
        batch_size: 1 or auto.
        max_batch_size: ignored.
    """

    pretrained: str = Field(coerce_numbers_to_str=True)
    plan: str
    context_length: PositiveInt | None = None
    calibration: str = "botocore"
    max_length: PositiveInt | None = None
    device: str | None = None
    dtype: DType | None = None
    batch_size: int | str = 1
    max_batch_size: int | None = None

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> "ModelArgs":
        """Validate arguments; raises UserError if one is unknown, missing or invalid."""
        try:
            arguments = cls(**values)
        except ValidationError as error:
            first = error.errors()[0]
            raise UserError(
                f"--model_args {'.'.join(map(str, first['loc']))}: {first['msg']}; write pretrained=demo|DIR|HUB_ID,"
                "plan=PLAN.json|full|METHOD:BUDGET and, if needed, context_length, calibration or max_length"
            ) from None
        if str(arguments.batch_size) != "1" and not str(arguments.batch_size).startswith("auto"):
            raise UserError(
                f"batch_size {arguments.batch_size}: a plan bounds one sequence at a time; leave it at 1 or auto"
            )
        return arguments

    def load_model(self) -> LoadedModel:
        """Load the model on the harness's device, or on the CPU if that is a GPU that does not exist."""
        device = self.device
        if device and device.startswith("cuda") and not torch.cuda.is_available():
            log(f"baklava: there is no {device} here, so the model runs on the CPU")
            device = "cpu"
        return load(self.pretrained, dtype=self.dtype, device=device)

    def checked_max_length(self, loaded: LoadedModel) -> int:
        """Return the most tokens to feed; raises UserError if the model does not take as many."""
        if (self.max_length or 0) > loaded.max_length:
            raise UserError(
                f"max_length={self.max_length}, but {loaded.identity.id} takes {loaded.max_length}; leave it out"
            )
        return self.max_length or loaded.max_length

    def load_plan(self, loaded: LoadedModel, max_length: int) -> BudgetPlan:
        """Load or make the plan, for sequences of at most `max_length` tokens.

        Raises:
            UserError: the plan does not exist, or is for another model or context length.
        """
        default = max_length if self.plan == "full" else min(DEFAULT_CONTEXT_LENGTH, max_length)
        length = self.context_length or default
        plan = resolve_plan(self.plan, loaded, length, lambda: self._profile(loaded, length)).plan
        if self.context_length not in (None, plan.context_length):
            raise UserError(
                f"context_length={self.context_length}, but {self.plan} was made for {plan.context_length} tokens; "
                "leave it out"
            )
        return plan

    def _profile(self, loaded: LoadedModel, length: int) -> Profile:
        texts, continuation = load_documents([self.calibration]), max(1, length // 8)
        splits = make_splits(texts, loaded.tokenizer, context=length - continuation, continuation=continuation, seed=0)
        return cached_profile(loaded, splits.calibration)


@dataclass
class PlanCoverage:
    """How many requests of one kind a plan affected: a score that no eviction could change says nothing about it.

    Attributes:
        plan: the plan.
        kind: the harness's request type.
        requests: number of requests.
        affected: requests with a token that was predicted from a cache that had lost entries.
        predicted_before_eviction: requests that were long enough but asked for one token only, which a dense prefill
            predicts before it evicts anything.
        truncated: requests whose context had to be truncated.
    """

    plan: BudgetPlan
    kind: str
    requests: int = 0
    affected: int = 0
    predicted_before_eviction: int = 0
    truncated: int = 0

    @property
    def max_lossless_tokens(self) -> int:
        """Tokens up to which no head loses an entry."""
        return self.plan.max_lossless_tokens

    def count(self, context: int, decoded: int) -> None:
        """Count a request with a prefill of `context` tokens, followed by `decoded` forwards of one token."""
        self.requests += 1
        if self._lost_entries(context, decoded):
            self.affected += 1
        elif context > self.max_lossless_tokens:
            self.predicted_before_eviction += 1

    def _lost_entries(self, context: int, decoded: int) -> bool:
        """Return whether entries had been evicted when the last token was predicted."""
        eviction, chunk = self.plan.eviction, self.plan.prefill.chunk_size
        interval = eviction.eviction_interval if eviction.scored else 1
        start = max(0, context - 1) // chunk * chunk if chunk else 0
        if start and context - start <= interval:  # such a short last chunk is decoded
            context, decoded = start, decoded + context - start
        if not decoded:
            return start > self.max_lossless_tokens
        # A ring buffer evicts before it attends; a method that scores evicts afterwards, once every interval.
        tokens_at_eviction = context + ((decoded - 1) // interval * interval if eviction.scored else decoded)
        return tokens_at_eviction > self.max_lossless_tokens

    def summary(self) -> str:
        """Return what the reader of the results should know."""
        parts = [
            f"{self.kind}: {self.affected} of {self.requests} requests had tokens predicted from a cache that had lost "
            f"entries, which the plan does beyond {self.max_lossless_tokens} tokens"
        ]
        if self.predicted_before_eviction:
            parts.append(
                f"{self.predicted_before_eviction} were longer but asked for one token only, predicted before anything "
                "was evicted, as a dense prefill always does"
            )
        if self.requests and not self.affected:
            parts.append("all of these results are the full cache's and say nothing about the plan")
        if self.truncated:
            parts.append(f"{self.truncated} were longer than the model takes and lost the beginning of their context")
        return "; ".join(parts)


EncodedRequest = tuple[tuple[str, str], list[int], list[int]]


@register_model("baklava")
class BaklavaLM(TemplateLM):
    """Answers the harness's requests one at a time, each with a new cache of the plan.

    As in all tasks of the harness, the question is part of the context, so a method that looks at attention sees it
    when it evicts. In baklava's own evaluation, questions come after the context has been compressed.
    """

    def __init__(self, loaded: LoadedModel, plan: BudgetPlan, max_length: int | None = None) -> None:
        super().__init__()
        loaded.check_plan(plan)
        self.loaded, self.plan, self.tokenizer = loaded, plan, loaded.tokenizer
        self.max_length = max_length or loaded.max_length
        self.coverages: list[PlanCoverage] = []
        self._device = loaded.device

    @classmethod
    @override
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> "BaklavaLM":
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @classmethod
    @override
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
    ) -> "BaklavaLM":
        options = {name: value for name, value in (additional_config or {}).items() if value is not None}
        arguments = ModelArgs.parse({**arg_dict, **options})
        loaded = arguments.load_model()
        max_length = arguments.checked_max_length(loaded)
        return cls(loaded, arguments.load_plan(loaded, max_length), max_length)

    @property
    @override
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    @override
    def prefix_token_id(self) -> int:
        """The token before a text that has no context."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    @override
    def tokenizer_name(self) -> str:
        return self.loaded.identity.id.replace("/", "__")

    @override
    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        if add_special_tokens is None:
            prefix = self.tokenizer.decode([self.prefix_token_id])
            add_special_tokens = not (prefix and string.startswith(prefix))
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens, verbose=False)

    @override
    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    @override
    def set_cache_hook(self, cache_hook: CacheHook) -> None:
        """Reject cached answers of another model or plan: the harness stores them by question alone."""
        answers, key = cache_hook.dbdict, "baklava"
        if answers is not None:
            origin = f"{self.loaded.identity.model_dump_json()} plan {self.plan.digest} max_length {self.max_length}"
            if len(answers) and answers.get(key) != origin:
                raise UserError("--use_cache names answers of another model or plan; give each plan a file of its own")
            answers[key] = origin
        super().set_cache_hook(cache_hook)

    def get_model_info(self) -> dict[str, Any]:
        """Return what the harness adds to its results: the plan, and how many requests it affected."""
        plan = ("digest", "bytes_per_sequence", "full_bytes_per_sequence", "ratio", "context_length")
        coverage = (
            "kind",
            "requests",
            "affected",
            "predicted_before_eviction",
            "truncated",
            "max_lossless_tokens",
        )
        return {
            "model_revision": self.loaded.identity.revision,
            "plan": {name: getattr(self.plan, name) for name in plan},
            "plan_requests": [{name: getattr(counts, name) for name in coverage} for counts in self.coverages],
        }

    @override
    def _loglikelihood_tokens(
        self, requests: list[EncodedRequest], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        coverage = self._new_coverage("loglikelihood")
        by_context: dict[tuple[int, ...], list[int]] = {}
        for number, (_, context, continuation) in enumerate(requests):
            if not continuation:
                raise UserError("a continuation of 0 tokens has no likelihood; look for an empty answer in the task")
            # The last token of the continuation is predicted but never fed.
            max_context = self.max_length + 1 - len(continuation)
            fitted = self._truncate(context or [self.prefix_token_id], max_context, coverage)
            by_context.setdefault(tuple(fitted), []).append(number)
        answers: dict[int, tuple[float, bool]] = {}
        # Longest first: the remaining time is then never underestimated, and memory runs out at once or not at all.
        longest_first = sorted(by_context.items(), key=lambda item: len(item[0]), reverse=True)
        for context, numbers in _with_progress(longest_first, coverage.kind, "context", disable_tqdm):
            texts = [requests[number][2] for number in numbers]
            likelihoods = score_continuations(self.loaded, self.plan, context, texts)
            for number, text, likelihood in zip(numbers, texts, likelihoods, strict=True):
                coverage.count(len(context), len(text) - 1)
                answers[number] = (likelihood.log_prob, likelihood.is_greedy)
                self.cache_hook.add_partial("loglikelihood", requests[number][0], answers[number])
        log(f"baklava: {coverage.summary()}")
        return [answers[number] for number in range(len(requests))]

    @override
    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Score whole texts: the first token of a window is the prompt, all others are decoded one by one."""
        coverage, answers = self._new_coverage("loglikelihood_rolling"), []
        for (text,) in _with_progress([request.args for request in requests], coverage.kind, "text", disable_tqdm):
            ids, longest, total = self.tok_encode(text), 0, 0.0
            for seen, scored in get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, context_len=1):
                total += score_suffix(self.loaded, self.plan, [*seen, scored[-1]], len(scored)).log_prob
                longest = max(longest, len(seen))
            coverage.count(0, longest)
            answers.append(total)
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
        log(f"baklava: {coverage.summary()}")
        return answers

    @override
    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        coverage, answers = self._new_coverage("generate_until"), []
        arguments = [request.args for request in requests]
        for context, options in _with_progress(arguments, coverage.kind, "text", disable_tqdm):
            answers.append(self._generate(context, options, coverage))
            self.cache_hook.add_partial("generate_until", (context, options), answers[-1])
        log(f"baklava: {coverage.summary()}")
        return answers

    def _generate(self, context: str, gen_kwargs: dict[str, Any], coverage: PlanCoverage) -> str:
        options: dict[str, Any] = dict(normalize_gen_kwargs(gen_kwargs, DEFAULT_MAX_NEW_TOKENS))
        until = handle_stop_sequences(options.pop("until"), eos=self.tokenizer.decode([self.eot_token_id]))
        max_new_tokens = options.pop("max_gen_toks")
        if not options["do_sample"]:
            options.pop("temperature", None)
        ids = self.tok_encode(context) or [self.prefix_token_id]
        prompt = self._truncate(ids, self.max_length - max_new_tokens, coverage)
        new_tokens = generate(
            self.loaded,
            self.plan,
            prompt,
            max_new_tokens=max_new_tokens,
            stopping_criteria=stop_sequences_criteria(self.tokenizer, until, len(prompt), 1),
            pad_token_id=self.eot_token_id if self.tokenizer.pad_token_id is None else self.tokenizer.pad_token_id,
            **options,
        )
        coverage.count(len(prompt), len(new_tokens) - 1)
        written = new_tokens[:-1] if new_tokens[-1] in self.loaded.eos_token_ids else new_tokens
        return postprocess_generated_text(decode_continuation(self.tokenizer, prompt, written), until, None)

    def _truncate(self, context: list[int], max_context: int, coverage: PlanCoverage) -> list[int]:
        """Return the end of a context, at most `max_context` tokens of it."""
        if max_context < 1:
            raise UserError(
                f"the task asks for {self.max_length - max_context} tokens after a context, which leaves none of the "
                f"model's {self.max_length} for the context; ask for fewer, or raise max_length"
            )
        coverage.truncated += len(context) > max_context
        return context[-max_context:]

    def _new_coverage(self, kind: str) -> PlanCoverage:
        self.coverages.append(PlanCoverage(self.plan, kind))
        return self.coverages[-1]


def _with_progress(items: Sequence[Any], label: str, unit: str, quiet: bool) -> Iterator[Any]:
    if quiet:
        yield from items
        return
    with progress_bar(len(items), label, unit) as progress:
        for item in items:
            yield item
            progress.update(1)
