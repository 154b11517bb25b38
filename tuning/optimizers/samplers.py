"""Optuna's samplers by name, configured for this search."""

import importlib
import importlib.util
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, create_trial

from baklava.allocation import Blended
from baklava.errors import UserError
from baklava.eviction import HeavyHitter
from tuning.study.search_space import Params, SearchSpace
from tuning.study.settings import SamplerName

STARTUP_TRIALS = 8
"""Trials, including the baselines, before a model of the space is trusted: a quarter of a usual search."""

MAX_POPULATION = 50

CMAES_FIXED_PARAMS = {"allocation": Blended.name, "eviction": HeavyHitter.name}
"""Choices that CMA-ES keeps fixed: it moves in numbers that all trials have, and other choices have other numbers."""


@dataclass(frozen=True)
class SamplerConfig:
    """Which sampler a search uses, its seed, and the number of trials in the search."""

    name: SamplerName = "tpe"
    seed: int = 0
    num_trials: int = 32

    @property
    def fixed_params(self) -> Mapping[str, str]:
        """Choices that all its trials share."""
        return CMAES_FIXED_PARAMS if self.name == "cmaes" else {}

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
