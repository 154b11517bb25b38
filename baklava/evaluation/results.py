"""Results over windows and prompts: means, paired differences and intervals of every plan, and what they say."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean
from typing import Any

from baklava.allocation.plan_spec import ResolvedPlan
from baklava.evaluation.evaluator import PromptResult, WindowResult
from baklava.evaluation.intervals import (
    Interval,
    bootstrap_mean,
    format_bounds,
    format_mebibytes,
    format_perplexity_change,
    nan_to_null,
    pluralize,
)
from baklava.evaluation.speed import Speed
from baklava.evaluation.window_scoring import WindowScore
from baklava.plan.budget_plan import BudgetPlan

WINDOW_METRICS = ("dnll", "kl", "context_gain")


@dataclass(frozen=True)
class TaskScore:
    """A plan on one task. Scores are from 0 to 1, higher is better; NLLs are in nats per token of the answer.

    Attributes:
        score: mean score of the plan's answers.
        nll: mean NLL of the right answers.
        full_score: the same for the full cache.
        full_nll: the same for the full cache.
        closed_book_score: the same without the context.
        closed_book_nll: the same without the context.
        chance: mean score of a guess.
        loss: the full cache's score minus the plan's, paired by question, with its interval over prompts.
        questions: number of questions.
        prompts: number of prompts.
        num_compressed: prompts so long that the plan evicted entries of their context.
        metric: names of the metrics, "exact" for exact match.
    """

    score: float
    nll: float
    full_score: float
    full_nll: float
    closed_book_score: float
    closed_book_nll: float
    chance: float
    loss: Interval
    questions: int
    prompts: int
    num_compressed: int
    metric: str

    @classmethod
    def from_results(cls, results: Sequence[PromptResult], plan: int, max_lossless_tokens: int) -> "TaskScore":
        """Aggregate the prompts of a task for the plan with this index."""
        answers = [answer for result in results for answer in result.plans[plan].answers]
        full = [answer for result in results for answer in result.full]
        closed_book = [answer for result in results for answer in result.closed_book]
        prompt_of_question = [result.name for result in results for _ in result.full]
        losses = [reference.score - answer.score for reference, answer in zip(full, answers, strict=True)]
        return cls(
            score=fmean(answer.score for answer in answers),
            nll=fmean(answer.nll for answer in answers),
            full_score=fmean(answer.score for answer in full),
            full_nll=fmean(answer.nll for answer in full),
            closed_book_score=fmean(answer.score for answer in closed_book),
            closed_book_nll=fmean(answer.nll for answer in closed_book),
            chance=fmean(chance for result in results for chance in result.chance),
            loss=bootstrap_mean(losses, prompt_of_question),
            questions=len(answers),
            prompts=len(results),
            num_compressed=sum(result.tokens > max_lossless_tokens for result in results),
            metric=" ".join(dict.fromkeys(metric for result in results for metric in result.metrics)),
        )

    def as_json(self) -> dict[str, Any]:
        """Return the record that users' scripts read."""
        return {
            "score": self.score,
            "answer_nll": self.nll,
            "chance": self.chance,
            "n": self.questions,
            "metric": self.metric,
            "prompts": self.prompts,
            "num_compressed": self.num_compressed,
            "full": {"score": self.full_score, "answer_nll": self.full_nll},
            "closed_book": {"score": self.closed_book_score, "answer_nll": self.closed_book_nll},
            "loss": nan_to_null(asdict(self.loss)),
        }


@dataclass(frozen=True)
class Evaluation:
    """One plan over all windows and prompts.

    Attributes:
        name: the plan's name or file.
        plan: the plan.
        scores: its score on each window.
        context_gain: what the context of each window is worth, in nats per token; see `WindowResult`.
        short_context: tokens of the short context in that gain.
        num_compressed: windows so long that the plan evicted entries.
        tasks: its score on each task.
        peak_task_bytes: peak bytes of the cache on any prompt.
        speed: its speed, if it was measured.
    """

    name: str
    plan: BudgetPlan
    scores: tuple[WindowScore, ...]
    context_gain: tuple[float, ...]
    short_context: int = 0
    num_compressed: int = 0
    tasks: Mapping[str, TaskScore] = field(default_factory=dict)
    peak_task_bytes: int = 0
    speed: Speed | None = None

    def values(self, metric: str) -> tuple[float, ...]:
        """Return one of `WINDOW_METRICS` of each window."""
        if metric == "context_gain":
            return self.context_gain
        return tuple(getattr(score, metric) for score in self.scores)

    def mean(self, metric: str) -> Interval:
        """Return the mean of one of `WINDOW_METRICS` over the windows, with its interval over documents."""
        return bootstrap_mean(self.values(metric), self.documents)

    def paired_difference(self, other: "Evaluation", metric: str) -> Interval:
        """Return this plan's `dnll` or `kl` minus the other's on the same windows; above 0 the other is better."""
        pairs = zip(self.values(metric), other.values(metric), strict=True)
        return bootstrap_mean([mine - theirs for mine, theirs in pairs], self.documents)

    @property
    def is_full_cache(self) -> bool:
        """Whether the plan is the full cache."""
        return self.plan.allocation.method == "full"

    @property
    def documents(self) -> list[str]:
        """The document of each window."""
        return [score.document for score in self.scores]

    @property
    def allocated_bytes(self) -> int:
        """The peak bytes of the cache on any window or prompt."""
        return max([self.peak_task_bytes, *(score.allocated_bytes for score in self.scores)])

    def as_json(self) -> dict[str, Any]:
        """Return the record that users' scripts read."""
        plan = self.plan
        return {
            "name": self.name,
            "plan": {
                "bytes_per_sequence": plan.bytes_per_sequence,
                "full_bytes_per_sequence": plan.full_bytes_per_sequence,
                "ratio": plan.ratio,
                "digest": plan.digest,
            },
            "allocated_bytes": self.allocated_bytes,
            "num_compressed": self.num_compressed,
            "windows": [
                {
                    "name": score.window,
                    "nll_full": score.nll_full,
                    "nll": score.nll,
                    "dnll": score.dnll,
                    "kl": score.kl,
                    "context_gain": gain,
                }
                for score, gain in zip(self.scores, self.context_gain, strict=True)
            ],
            "tasks": {name: score.as_json() for name, score in self.tasks.items()},
            "mean": {metric: self.mean(metric).mean for metric in WINDOW_METRICS},
            "interval": {metric: nan_to_null(asdict(self.mean(metric))) for metric in WINDOW_METRICS},
            "speed": asdict(self.speed) if self.speed else None,
        }


def aggregate_results(
    plans: Sequence[ResolvedPlan],
    windows: Sequence[WindowResult],
    prompts: Sequence[PromptResult],
    speeds: Mapping[str, Speed] | None = None,
) -> list[Evaluation]:
    """Return an evaluation of each plan; every result lists the plans in this order."""
    tasks = dict.fromkeys(result.task for result in prompts)
    by_task = {task: [result for result in prompts if result.task == task] for task in tasks}
    evaluations = []
    for index, named in enumerate(plans):
        max_lossless_tokens = named.plan.max_lossless_tokens
        evaluations.append(
            Evaluation(
                name=named.name,
                plan=named.plan,
                scores=tuple(result.scores[index] for result in windows),
                context_gain=tuple(result.context_gain for result in windows),
                short_context=windows[0].short_context,
                num_compressed=sum(result.tokens > max_lossless_tokens for result in windows),
                tasks={
                    task: TaskScore.from_results(results, index, max_lossless_tokens)
                    for task, results in by_task.items()
                },
                peak_task_bytes=max((result.plans[index].allocated_bytes for result in prompts), default=0),
                speed=(speeds or {}).get(named.name),
            )
        )
    return evaluations


def best_plan(evaluations: Sequence[Evaluation]) -> Evaluation | None:
    """Return the plan with the lowest mean KL, other than full caches."""
    budgeted = [evaluation for evaluation in evaluations if not evaluation.is_full_cache]
    return min(budgeted, key=lambda evaluation: evaluation.mean("kl").mean, default=None)


MIN_CONTEXT_GAIN = 0.05
"""Nats per token that context must be worth before losing it can show."""

RETRIEVAL_TASKS = ("kv_retrieval", "multi_needle", "needle", "passkey")
"""Tasks that a sentence names first, because plans differ most in them."""


def summarize(evaluations: Sequence[Evaluation], texts: Sequence[str] = ()) -> list[str]:
    """Return a sentence on the text, one or more on each plan, and one on the best plan against each other plan.

    `texts` are the names of the texts that were evaluated on; a plan that was made from one of them gets a warning.
    """
    warnings = [
        warning
        for evaluation in evaluations
        for warning in (*_uncompressed_warning(evaluation), *_contamination_warning(evaluation, texts))
    ]
    comparisons = []
    if (best := best_plan(evaluations)) is not None:
        comparisons = [_compare(best, other) for other in evaluations if other is not best and not other.is_full_cache]
    return [_describe_text(evaluations[0]), *map(describe_plan, evaluations), *warnings, *comparisons]


def describe_plan(evaluation: Evaluation) -> str:
    """Return a sentence on a plan's size, quality and speed."""
    plan = evaluation.plan
    size = f"{format_mebibytes(plan.bytes_per_sequence)} of {format_mebibytes(plan.full_bytes_per_sequence)}"
    parts = [
        f"{evaluation.name} keeps {plan.ratio:.1%} of the bytes at {plan.context_length:,} tokens ({size})",
        f"perplexity {format_perplexity_change(evaluation.mean('dnll'))}",
    ]
    # The first two tasks that the full cache can do
    ordered = [*RETRIEVAL_TASKS, *(name for name in evaluation.tasks if name not in RETRIEVAL_TASKS)]
    solvable = [name for name in ordered if name in evaluation.tasks and evaluation.tasks[name].full_score >= 0.5]
    parts += [_describe_task(name, evaluation.tasks[name]) for name in solvable[:2]]
    if speed := evaluation.speed:
        ratio = speed.decode_ratio
        times = "as fast" if 0.95 <= ratio < 1.05 else f"{ratio:.1f} × as fast"
        parts.append(f"decode {times} at {speed.context:,} tokens")
    return "; ".join(parts) + "."


def _describe_task(name: str, score: TaskScore) -> str:
    if score.metric != "exact":
        return f"{name.replace('_', ' ')} {score.full_score:.2f} → {score.score:.2f}"
    before, after = (round(share * score.questions) for share in (score.full_score, score.score))
    return f"{name.replace('_', ' ')} {before} → {after} of {score.questions}"


def _describe_text(evaluation: Evaluation) -> str:
    gain = evaluation.mean("context_gain")
    sentence = (
        f"{pluralize(gain.windows, 'window')} of {pluralize(gain.documents, 'document')}; with all of its context "
        f"instead of {evaluation.short_context} tokens a window gains {gain.mean:.3f} nats per token"
    )
    if gain.mean < MIN_CONTEXT_GAIN:
        return f"{sentence}: context hardly helps on this text, so it cannot show which plan is better."
    return f"{sentence}."


def _uncompressed_warning(evaluation: Evaluation) -> list[str]:
    """Name what was too short for the plan to evict anything, so that its score is the full cache's."""
    if evaluation.is_full_cache:
        return []
    short = []
    if windows := len(evaluation.scores) - evaluation.num_compressed:
        short.append(pluralize(windows, "window"))
    for name, score in evaluation.tasks.items():
        if prompts := score.prompts - score.num_compressed:
            short.append(f"{pluralize(prompts, 'prompt')} of {name}")
    if not short:
        return []
    lossless = f"{evaluation.name} loses nothing of up to {evaluation.plan.max_lossless_tokens:,} tokens"
    return [f"{lossless}, so it was the full cache on {', '.join(short)}."]


def _contamination_warning(evaluation: Evaluation, texts: Sequence[str]) -> list[str]:
    seen = [name for name in evaluation.plan.provenance.corpora if name in texts]
    return [f"{evaluation.name} was made from {', '.join(seen)}, so this is no test on new text."] if seen else []


def _compare(best: Evaluation, other: Evaluation) -> str:
    difference = other.paired_difference(best, "kl")
    bounds = format_bounds(difference, ".4f")
    sentence = (
        f"{best.name} is nearer to the full cache than {other.name} "
        f"by {difference.mean:.4f} nats per token of KL {bounds}".rstrip()
    )
    if math.isnan(difference.low):
        return f"{sentence}; one document gives no interval."
    noise = "" if difference.low > 0 else ", which these windows cannot tell from chance"
    return f"{sentence}{noise}."
