"""Comparison: results over windows and prompts as means, paired differences and intervals, plan by plan."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean
from typing import Any

from baklava.allocation.plan_spec import NamedPlan
from baklava.evaluation.bootstrap import Interval, interval
from baklava.evaluation.evaluator import PromptResult, WindowResult
from baklava.evaluation.speed.latency import Speed
from baklava.evaluation.task_scoring import Answer
from baklava.evaluation.window_scoring import Score

METRICS = ("dnll", "kl", "gain")


@dataclass(frozen=True)
class TaskScore:
    """A plan on one task: `exact` from 0 to 1 (higher is better), NLLs in nats per token of the answer (lower is).

    `metric` is the name of what scored the answers, "exact" where that is exact match. Of the `prompts`, `cut` are so
    long that the plan lost entries of their context. `loss` is the full cache's `exact` minus the plan's, question by
    question, with its interval over prompts.
    """

    exact: float
    nll: float
    full_exact: float
    full_nll: float
    closed_book_exact: float
    closed_book_nll: float
    chance: float
    loss: Interval
    questions: int
    prompts: int
    cut: int
    metric: str

    @classmethod
    def of(cls, results: Sequence[PromptResult], plan: int, lossless: int) -> "TaskScore":
        """The score of the plan with this number, which loses no entry of that many tokens, over prompts of a task."""
        ours = [answer for result in results for answer in result.plans[plan].answers]
        full = [answer for result in results for answer in result.full]
        closed = [answer for result in results for answer in result.closed_book]
        prompts = [result.name for result in results for _ in result.full]
        losses = [theirs.exact - mine.exact for theirs, mine in zip(full, ours, strict=True)]
        return cls(
            *_means(ours),
            *_means(full),
            *_means(closed),
            chance=fmean(chance for result in results for chance in result.chance),
            loss=interval(losses, prompts),
            questions=len(ours),
            prompts=len(results),
            cut=sum(result.tokens > lossless for result in results),
            metric=" ".join(dict.fromkeys(metric for result in results for metric in result.metrics)),
        )

    def as_json(self) -> dict[str, Any]:
        """What other people's scripts read."""
        return {
            "exact": self.exact,
            "answer_nll": self.nll,
            "chance": self.chance,
            "n": self.questions,
            "metric": self.metric,
            "prompts": self.prompts,
            "cut": self.cut,
            "full": {"exact": self.full_exact, "answer_nll": self.full_nll},
            "closed_book": {"exact": self.closed_book_exact, "answer_nll": self.closed_book_nll},
            "loss": _without_nan(asdict(self.loss)),
        }


@dataclass(frozen=True)
class Evaluation:
    """One plan over all windows and prompts.

    `gain` is what context is worth on each window, in nats per token: all of it instead of its last `short` tokens. Of
    the windows, `cut` are so long that the plan lost entries.
    """

    named: NamedPlan
    scores: tuple[Score, ...]
    gain: tuple[float, ...]
    short: int = 0
    cut: int = 0
    tasks: Mapping[str, TaskScore] = field(default_factory=dict)
    answer_bytes: int = 0
    speed: Speed | None = None

    def values(self, metric: str) -> tuple[float, ...]:
        """`dnll`, `kl` or `gain` window by window."""
        return self.gain if metric == "gain" else tuple(getattr(score, metric) for score in self.scores)

    def mean(self, metric: str) -> Interval:
        """Mean of `dnll`, `kl` or `gain` over the windows, with its interval over documents."""
        return interval(self.values(metric), self.documents)

    def above(self, other: "Evaluation", metric: str) -> Interval:
        """This plan's `dnll` or `kl` minus the other's on the same windows; above 0 the other is better."""
        pairs = zip(self.values(metric), other.values(metric), strict=True)
        return interval([mine - theirs for mine, theirs in pairs], self.documents)

    @property
    def keeps_all(self) -> bool:
        """Whether the plan is the full cache."""
        return self.named.plan.allocation.method == "full"

    @property
    def documents(self) -> list[str]:
        """The document of each window."""
        return [score.document for score in self.scores]

    @property
    def allocated_bytes(self) -> int:
        """Most bytes that the cache was measured to hold on any window or prompt."""
        return max([self.answer_bytes, *(score.allocated_bytes for score in self.scores)])

    def as_json(self) -> dict[str, Any]:
        """What other people's scripts read."""
        plan = self.named.plan
        return {
            "name": self.named.name,
            "plan": {
                "bytes_per_sequence": plan.bytes_per_sequence,
                "full_bytes_per_sequence": plan.full_bytes_per_sequence,
                "ratio": plan.ratio,
                "digest": plan.digest,
            },
            "allocated_bytes": self.allocated_bytes,
            "cut": self.cut,
            "windows": [
                {"name": s.window, "nll_full": s.nll_full, "nll": s.nll, "dnll": s.dnll, "kl": s.kl, "gain": gain}
                for s, gain in zip(self.scores, self.gain, strict=True)
            ],
            "tasks": {name: score.as_json() for name, score in self.tasks.items()},
            "mean": {metric: self.mean(metric).mean for metric in METRICS},
            "interval": {metric: _without_nan(asdict(self.mean(metric))) for metric in METRICS},
            "speed": asdict(self.speed) if self.speed else None,
        }


def compare(
    plans: Sequence[NamedPlan],
    windows: Sequence[WindowResult],
    prompts: Sequence[PromptResult],
    speeds: Mapping[str, Speed] | None = None,
) -> list[Evaluation]:
    """An evaluation per plan; the results have the plans in this order."""
    tasks = dict.fromkeys(result.task for result in prompts)
    groups = {task: [result for result in prompts if result.task == task] for task in tasks}
    return [
        Evaluation(
            named,
            tuple(result.scores[number] for result in windows),
            tuple(result.gain for result in windows),
            windows[0].short,
            sum(result.tokens > named.plan.lossless_tokens for result in windows),
            {task: TaskScore.of(group, number, named.plan.lossless_tokens) for task, group in groups.items()},
            max((result.plans[number].allocated_bytes for result in prompts), default=0),
            (speeds or {}).get(named.name),
        )
        for number, named in enumerate(plans)
    ]


def best(evaluations: Sequence[Evaluation]) -> Evaluation | None:
    """The plan with the least KL among those that keep less than everything."""
    budgeted = [each for each in evaluations if not each.keeps_all]
    return min(budgeted, key=lambda each: each.mean("kl").mean, default=None)


def _means(answers: Sequence[Answer]) -> tuple[float, float]:
    reads: tuple[Callable[[Answer], float], ...] = (lambda answer: answer.exact, lambda answer: answer.nll)
    exact, nll = (fmean(map(read, answers)) for read in reads)
    return exact, nll


def _without_nan(values: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has no NaN: a bound that one document cannot give is null."""
    return {name: None if value != value else value for name, value in values.items()}
