"""What requests had to do with a plan: a score that no eviction could change says nothing about it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import CacheHook, TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.models.utils_hf import stop_sequences_criteria
from lm_eval.utils import get_rolling_token_windows, simple_parse_args_string
from typing_extensions import override

from baklava.console import log, progress_bar
from baklava.errors import UserError
from baklava.evaluation.lm_eval.model_args import ModelArgs
from baklava.plan.budget_plan import BudgetPlan
from baklava.runtime.decode import generate
from baklava.runtime.logprobs import score_continuations, score_suffix
from baklava.runtime.model_loader import LoadedModel


@dataclass
class Tally:
    """Counts over requests of one kind: all, those a plan touched, and those whose context had to be truncated.

    A request is touched when one of its tokens was predicted from a cache that had lost entries. `exact` counts those
    that were long enough, but asked for one token only, which a dense prefill predicts before it evicts anything.
    """

    plan: BudgetPlan
    kind: str
    requests: int = 0
    touched: int = 0
    exact: int = 0
    truncated: int = 0

    @property
    def lossless(self) -> int:
        """Tokens up to which no head loses an entry."""
        return self.plan.max_lossless_tokens

    def count(self, context: int, decoded: int) -> None:
        """Count a request of `context` prefilled tokens, behind which `decoded` forwards of one predicted the rest."""
        self.requests += 1
        if self._lost(context, decoded):
            self.touched += 1
        elif context > self.lossless:
            self.exact += 1

    def _lost(self, context: int, decoded: int) -> bool:
        """Whether entries were gone when the last token was predicted."""
        eviction, chunk = self.plan.eviction, self.plan.prefill.chunk_size
        every = eviction.eviction_interval if eviction.scored else 1
        start = max(0, context - 1) // chunk * chunk if chunk else 0
        if start and context - start <= every:  # so short a last chunk is decoded
            context, decoded = start, decoded + context - start
        if not decoded:
            return start > self.lossless
        # A ring makes room before it attends, a method that scores evicts afterwards and every `interval` tokens.
        gone_at = context + ((decoded - 1) // every * every if eviction.scored else decoded)
        return gone_at > self.lossless

    def sentences(self) -> str:
        """What to tell whoever reads the results."""
        said = [
            f"{self.kind}: {self.touched} of {self.requests} requests had tokens predicted from a cache that had lost "
            f"entries, which the plan does beyond {self.lossless} tokens"
        ]
        if self.exact:
            said.append(
                f"{self.exact} were longer but asked for one token only, predicted before anything was evicted, as a "
                "dense prefill always does"
            )
        if self.requests and not self.touched:
            said.append("all of these results are the full cache's and say nothing about the plan")
        if self.truncated:
            said.append(f"{self.truncated} were longer than the model takes and lost the beginning of their context")
        return "; ".join(said)


MOST_GENERATED = 256
"""Tokens that a task gets which names no number, as with the harness's own models."""

Encoded = tuple[tuple[str, str], list[int], list[int]]


@register_model("baklava")
class BaklavaLM(TemplateLM):
    """Answers the harness's requests one at a time, each from a fresh cache of the plan.

    The question is in the context, so a method that looks at attention sees it when it evicts, as in every task of the
    harness; in baklava's own evaluation nothing that is asked later is seen.
    """

    def __init__(self, loaded: LoadedModel, plan: BudgetPlan, max_length: int | None = None) -> None:
        super().__init__()
        plan.validate_for(loaded.identity, loaded.geometry)
        self.loaded, self.plan, self.tokenizer = loaded, plan, loaded.tokenizer
        self.max_length = max_length or loaded.max_length
        self.tallies: list[Tally] = []
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
        given = {name: value for name, value in (additional_config or {}).items() if value is not None}
        arguments = ModelArgs.of({**arg_dict, **given})
        loaded = arguments.loaded()
        most = arguments.checked_length(loaded)
        return cls(loaded, arguments.named_plan(loaded, most), most)

    @property
    @override
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    @override
    def prefix_token_id(self) -> int:
        """What stands before a text that has nothing before it."""
        start = self.tokenizer.bos_token_id
        return self.eot_token_id if start is None else start

    @property
    @override
    def tokenizer_name(self) -> str:
        return self.loaded.identity.id.replace("/", "__")

    @override
    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        if add_special_tokens is None:
            start = self.tokenizer.decode([self.prefix_token_id])
            add_special_tokens = not (start and string.startswith(start))
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
        """Refuse answers of another model or plan: the harness files them by question alone."""
        answers, key = cache_hook.dbdict, "baklava"
        if answers is not None:
            asked = f"{self.loaded.identity.model_dump_json()} plan {self.plan.digest} max_length {self.max_length}"
            if len(answers) and answers.get(key) != asked:
                raise UserError("--use_cache names answers of another model or plan; give each plan a file of its own")
            answers[key] = asked
        super().set_cache_hook(cache_hook)

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes beside its results: the plan, and how many requests it touched."""
        plan, shown = self.plan, ("digest", "bytes_per_sequence", "full_bytes_per_sequence", "ratio", "context_length")
        told = ("kind", "requests", "touched", "exact", "truncated", "lossless")
        return {
            "model_revision": self.loaded.identity.revision,
            "plan": {name: getattr(plan, name) for name in shown},
            "plan_requests": [{name: getattr(tally, name) for name in told} for tally in self.tallies],
        }

    @override
    def _loglikelihood_tokens(
        self, requests: list[Encoded], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        tally = self._tally("loglikelihood")
        sharing: dict[tuple[int, ...], list[int]] = {}
        for number, (_, context, continuation) in enumerate(requests):
            sharing.setdefault(self._fitting(context, continuation, tally), []).append(number)
        answers: dict[int, tuple[float, bool]] = {}
        # The longest first: what is left is then never underestimated, and memory runs out at once or not at all.
        longest_first = sorted(sharing.items(), key=lambda each: len(each[0]), reverse=True)
        for context, numbers in counted(longest_first, tally.kind, "context", disable_tqdm):
            texts = [requests[number][2] for number in numbers]
            found = score_continuations(self.loaded, self.plan, context, texts)
            for number, text, likelihood in zip(numbers, texts, found, strict=True):
                tally.count(len(context), len(text) - 1)
                answers[number] = (likelihood.log_prob, likelihood.is_greedy)
                self.cache_hook.add_partial("loglikelihood", requests[number][0], answers[number])
        log(f"baklava: {tally.sentences()}")
        return [answers[number] for number in range(len(requests))]

    @override
    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts: the first token of a window is the prompt, all others enter one by one."""
        tally, answers = self._tally("loglikelihood_rolling"), []
        for (text,) in counted([request.args for request in requests], tally.kind, "text", disable_tqdm):
            ids, longest, total = self.tok_encode(text), 0, 0.0
            for seen, scored in get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, context_len=1):
                total += score_suffix(self.loaded, self.plan, [*seen, scored[-1]], len(scored)).log_prob
                longest = max(longest, len(seen))
            tally.count(0, longest)
            answers.append(total)
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
        log(f"baklava: {tally.sentences()}")
        return answers

    @override
    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        tally, answers = self._tally("generate_until"), []
        for context, options in counted([request.args for request in requests], tally.kind, "text", disable_tqdm):
            answers.append(self._generated(context, options, tally))
            self.cache_hook.add_partial("generate_until", (context, options), answers[-1])
        log(f"baklava: {tally.sentences()}")
        return answers

    def _generated(self, context: str, given: dict[str, Any], tally: Tally) -> str:
        options: dict[str, Any] = dict(normalize_gen_kwargs(given, MOST_GENERATED))
        until = handle_stop_sequences(options.pop("until"), eos=self.tokenizer.decode([self.eot_token_id]))
        most = options.pop("max_gen_toks")
        if not options["do_sample"]:
            options.pop("temperature", None)
        prompt = self._cut(self.tok_encode(context) or [self.prefix_token_id], self.max_length - most, tally)
        made = generate(
            self.loaded,
            self.plan,
            prompt,
            max_new_tokens=most,
            stopping_criteria=stop_sequences_criteria(self.tokenizer, until, len(prompt), 1),
            pad_token_id=self.eot_token_id if self.tokenizer.pad_token_id is None else self.tokenizer.pad_token_id,
            **options,
        )
        tally.count(len(prompt), len(made) - 1)
        return postprocess_generated_text(self.tokenizer.decode(made, skip_special_tokens=True), until, None)

    def _fitting(self, context: list[int], continuation: list[int], tally: Tally) -> tuple[int, ...]:
        """The end of a context that fits before a continuation, whose last token is predicted but never fed."""
        if not continuation:
            raise UserError("a continuation of 0 tokens has no likelihood; look for an empty answer in the task")
        return tuple(self._cut(context or [self.prefix_token_id], self.max_length + 1 - len(continuation), tally))

    def _cut(self, context: list[int], room: int, tally: Tally) -> list[int]:
        if room < 1:
            raise UserError(
                f"the task asks for {self.max_length - room} tokens behind a context, which leaves none of the model's "
                f"{self.max_length} for the context; ask for fewer, or raise max_length"
            )
        tally.truncated += len(context) > room
        return context[-room:]

    def _tally(self, kind: str) -> Tally:
        self.tallies.append(Tally(self.plan, kind))
        return self.tallies[-1]


def counted(items: Sequence[Any], label: str, unit: str, quiet: bool) -> Iterator[Any]:
    """The items, with a bar over those that are done."""
    if quiet:
        yield from items
        return
    with progress_bar(len(items), label, unit) as progress:
        for item in items:
            yield item
            progress.update(1)
