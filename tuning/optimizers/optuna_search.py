"""The Optuna searcher with its samplers, and the rule that stops trials early; all start from recorded trials."""

import importlib
import importlib.util
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, TrialState, create_trial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher
from ray.tune.search.optuna import OptunaSearch

from baklava.allocation import Blended
from baklava.errors import UserError
from baklava.eviction import AttentionMatching
from tuning.optimizers.baselines import initial_params
from tuning.study.interrupt import StopFlag
from tuning.study.objective import Metrics
from tuning.study.search_space import Params, SearchSpace, SearchTask
from tuning.study.settings import SamplerName
from tuning.study.trial import DECODE_SECONDS, GRACE_WINDOWS, TrialRecord, finished_trials, geometric_mean

STARTUP_TRIALS = 8
"""Trials, including the baselines, before a model of the space is trusted: a quarter of a usual search."""

MAX_POPULATION = 50


@dataclass(frozen=True)
class SamplerConfig:
    """Which sampler a search uses, its seed, the number of trials in the search, and the best eviction method."""

    name: SamplerName = "tpe"
    seed: int = 0
    num_trials: int = 32
    eviction: str = AttentionMatching.name

    @property
    def fixed_params(self) -> Mapping[str, str]:
        """Choices that all its trials share.

        CMA-ES moves in numbers that all trials have, and other choices have other numbers.
        """
        return {"allocation": Blended.name, "eviction": self.eviction} if self.name == "cmaes" else {}

    def is_compatible(self, params: Params) -> bool:
        """Return whether the sampler can learn from trials with these parameters."""
        return all(params.get(name) == value for name, value in self.fixed_params.items())

    def build(self, num_recorded: int, source_trials: Sequence[FrozenTrial] = ()) -> BaseSampler:
        """Return the sampler.

        Args:
            num_recorded: Trials recorded so far; a resumed search does not repeat their draws.
            source_trials: Complete trials for CMA-ES, which otherwise learns only from trials of its own.
        """
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            return self._build(self.seed + num_recorded, source_trials)

    def _build(self, seed: int, source_trials: Sequence[FrozenTrial]) -> BaseSampler:
        match self.name:
            case "tpe":
                return _tpe(seed)
            case "cmaes":
                importlib.import_module("cmaes")  # during the first draw, Tune would complain how long that takes
                cmaes = optuna.samplers.CmaEsSampler(
                    seed=seed,
                    source_trials=[*map(_numeric_only, source_trials)] or None,
                    independent_sampler=_tpe(seed),
                    warn_independent_sampling=False,
                )
                return optuna.samplers.PartialFixedSampler(dict(self.fixed_params), cmaes)
            case "nsga2":
                # The usual 50 would spend a usual search on its first generation, which is random.
                population = min(MAX_POPULATION, max(STARTUP_TRIALS, self.num_trials // 6))
                return optuna.samplers.NSGAIISampler(population_size=population, seed=seed)
            case "random":
                return optuna.samplers.RandomSampler(seed=seed)
            case "qmc":
                quiet = {"warn_asynchronous_seeding": False, "warn_independent_sampling": False}
                return optuna.samplers.QMCSampler(qmc_type="sobol", scramble=True, seed=seed, **quiet)


def check_sampler(name: SamplerName, front: bool) -> None:
    """Raise UserError if a sampler does not support the goal, or a package that it needs is missing."""
    if name == "cmaes" and front:
        raise UserError("--sampler cmaes minimises one number, and --front needs several; take nsga2 or tpe")
    if name == "cmaes" and importlib.util.find_spec("cmaes") is None:
        raise UserError("--sampler cmaes needs the package cmaes; run make setup, or pip install cmaes")


def in_space(space: SearchSpace, params: Params) -> bool:
    """Return whether the space could have produced these parameters."""
    try:
        distributions = space.distributions(params)
    except ValueError:
        return False
    return distributions.keys() == params.keys() and all(
        _contains(distribution, params[name]) for name, distribution in distributions.items()
    )


def untried(points: Sequence[Params], tried: Sequence[Params]) -> list[Params]:
    """Return the points that are not among the tried ones, each once."""
    remaining: list[Params] = []
    for params in points:
        if params not in tried and params not in remaining:
            remaining.append(params)
    return remaining


def _tpe(seed: int) -> BaseSampler:
    # Several trials run at once: counting the running ones as bad keeps them apart.
    options = {"multivariate": True, "group": True, "constant_liar": True}
    return optuna.samplers.TPESampler(seed=seed, n_startup_trials=STARTUP_TRIALS, **options)


def _numeric_only(trial: FrozenTrial) -> FrozenTrial:
    """The trial with only the parameters that CMA-ES moves in."""
    numeric = {
        name: distribution
        for name, distribution in trial.distributions.items()
        if not isinstance(distribution, CategoricalDistribution)
    }
    params = {name: trial.params[name] for name in numeric}
    return create_trial(values=trial.values, params=params, distributions=numeric)


def _contains(distribution: BaseDistribution, value: object) -> bool:
    if isinstance(distribution, CategoricalDistribution):
        return value in distribution.choices
    return isinstance(value, int | float) and distribution.low <= value <= distribution.high


MAX_LOSS_RATIO = 1.5
"""KL over the best trial's on the same windows above which a trial is stopped."""

MAX_RESAMPLES = 16
"""Times that parameters are sampled again because they were sampled before; after that, the duplicate is scored."""


class PlanOptunaSearch(OptunaSearch):
    """OptunaSearch that tells stopped and failed trials from finished ones, and starts from recorded trials.

    Tune passes the last report of a stopped trial as if it were its result; a mean over the first windows would enter
    the sampler's model as if it were over all of them. Optuna has states for both cases. For a front it minimises two
    values, size and loss, or three with the decode time.

    Args:
        task: What is searched.
        sampler: Which sampler samples.
        recorded: Earlier trials of this search.
        stop: Whether to start no more trials.
        warm_trials: Trials of an earlier search.
        enqueued_params: Parameters that are tried before the baselines.
    """

    def __init__(
        self,
        task: SearchTask,
        sampler: SamplerConfig,
        recorded: Sequence[TrialRecord],
        stop: StopFlag,
        warm_trials: Sequence[TrialRecord] = (),
        enqueued_params: Sequence[Params] = (),
    ) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        space = task.space
        self.num_windows = len(task.windows)
        self.stop = stop
        self.suggested = [record.params for record in (*warm_trials, *recorded)]
        frozen = [
            _frozen_trial(record, task) for record in (*warm_trials, *recorded) if sampler.is_compatible(record.params)
        ]
        complete = [trial for trial in frozen if trial.state is TrialState.COMPLETE]
        first = [params for params in (*enqueued_params, *initial_params(space)) if sampler.is_compatible(params)]
        minimised = ["ratio", "objective", *([DECODE_SECONDS] if task.goal.latency else [])]
        super().__init__(
            space.suggest,
            metric=minimised if task.goal.front else "objective",
            mode=["min"] * len(minimised) if task.goal.front else "min",
            points_to_evaluate=untried(first, [record.params for record in recorded]),
            sampler=sampler.build(len(recorded), complete),
        )
        for trial in frozen:
            self._ot_study.add_trial(trial)

    def suggest(self, trial_id: str) -> Params | str | None:
        """Return the parameters of the next trial, or FINISHED if a stop was requested."""
        if self.stop.requested:
            return Searcher.FINISHED
        params = super().suggest(trial_id)
        for _ in range(MAX_RESAMPLES):
            if params not in self.suggested:
                break
            self._ot_study.tell(self._ot_trials.pop(trial_id), state=TrialState.FAIL)
            params = super().suggest(trial_id)
        self.suggested.append(params)
        return params

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Report the running mean after one more window to Optuna."""
        if "failed" not in result:
            super().on_trial_result(trial_id, result)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Report a trial that scored all windows, was stopped, or failed: complete, pruned or failed in Optuna."""
        failed = error or not result or "failed" in result
        complete = result if result and len(result.get("windows", ())) == self.num_windows else None
        super().on_trial_complete(trial_id, complete, error=failed)


class RelativeLossPruner(FIFOScheduler):
    """Stops a trial whose KL exceeds `MAX_LOSS_RATIO` times that of the best trial that is no larger.

    All trials are scored on the same windows in the same order, so that the best trial is compared on the windows seen
    so far. It compares KLs even if the search minimises something else, since they are the least noisy. If the budget
    is fixed, all plans count as equally large. It is disabled if latency counts: a plan that loses more may be the
    fastest. docs/lab-notes.md compares it with other rules.
    """

    def __init__(self, task: SearchTask, recorded: Sequence[TrialRecord]) -> None:
        super().__init__()
        self.compares_sizes = task.goal.samples_budget
        self.num_windows = len(task.windows)
        self.disabled = task.goal.latency
        self.completed: list[tuple[float, list[float]]] = []
        for record in finished_trials(recorded):
            self.completed.append((self._size(record.metrics), _kls(record.windows)))

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Return whether the trial continues."""
        if "failed" in result or self.disabled:
            return TrialScheduler.CONTINUE
        size, kls = self._size(result), _kls(result["windows"])
        if len(kls) == self.num_windows:
            self.completed.append((size, kls))
        rivals = [rival_kls for rival_size, rival_kls in self.completed if rival_size <= size]
        if not rivals or not GRACE_WINDOWS <= len(kls) < self.num_windows:
            return TrialScheduler.CONTINUE
        best = min(rivals, key=geometric_mean)[: len(kls)]
        too_lossy = geometric_mean(kls) > MAX_LOSS_RATIO * geometric_mean(best)
        return TrialScheduler.STOP if too_lossy else TrialScheduler.CONTINUE

    def _size(self, metrics: Metrics) -> float:
        return metrics["ratio"] if self.compares_sizes else 0.0


def _kls(windows: Sequence[dict[str, Any]]) -> list[float]:
    return [window["kl"] for window in windows]


def _frozen_trial(record: TrialRecord, task: SearchTask) -> optuna.trial.FrozenTrial:
    goal = task.goal
    values = None
    if record.status == "finished":
        values = list(goal.pareto_values(record.metrics)) if goal.front else [goal.objective_value(record.metrics)]
    intermediate = {}
    if not goal.front:  # Optuna has no intermediate values for several objectives
        for step in range(1, len(record.windows) + 1):
            intermediate[step] = goal.objective_value(record.metrics_after(step))
    states = {"finished": TrialState.COMPLETE, "pruned": TrialState.PRUNED, "failed": TrialState.FAIL}
    return create_trial(
        state=states[record.status],
        values=values,
        params=record.params,
        distributions=task.space.distributions(record.params),
        intermediate_values=intermediate,
    )
