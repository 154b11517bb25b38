"""The samplers that draw trials, by name: Optuna's, told what a search of this kind needs."""

import importlib
import importlib.util
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import optuna
from optuna.distributions import CategoricalDistribution
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, create_trial

from baklava.allocation import Blended
from baklava.errors import UserError
from baklava.eviction import HeavyHitter
from tuning.study.search_space import Params, SearchSpace
from tuning.study.settings import SamplerName

STARTUP_TRIALS = 8
"""Trials, the heuristics among them, before a model of the space is trusted: a quarter of a usual search."""

MAX_POPULATION = 50

Taught = Sequence[FrozenTrial]

CMAES_FIXED_PARAMS = {"allocation": Blended.name, "eviction": HeavyHitter.name}
"""What CMA-ES holds on to: it moves in the numbers that all trials have, and other choices have other numbers."""


@dataclass(frozen=True)
class SamplerConfig:
    """How a search draws: by which sampler, from which seed, how many trials at most."""

    name: SamplerName = "tpe"
    seed: int = 0
    trials: int = 32

    @property
    def fixed(self) -> Mapping[str, str]:
        """Choices that all its trials make."""
        return CMAES_FIXED_PARAMS if self.name == "cmaes" else {}

    def admits(self, params: Params) -> bool:
        """Whether trials with these parameters can teach the sampler anything."""
        return all(params.get(name) == value for name, value in self.fixed.items())

    def sampler(self, known: int, taught: Sequence[FrozenTrial] = ()) -> BaseSampler:
        """The sampler after `known` recorded trials, whose draws it does not repeat.

        `taught` are complete trials for the one that learns only from its own, and would begin anew beside others.
        """
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            return _MAKERS[self.name](self, self.seed + known, taught)


def check_sampler(name: SamplerName, front: bool) -> None:
    """Raise UserError when a sampler cannot do what is asked, or a package that it needs is missing."""
    if name == "cmaes" and front:
        raise UserError("--sampler cmaes lowers one number, and --front asks for several; take nsga2 or tpe")
    if name == "cmaes" and importlib.util.find_spec("cmaes") is None:
        raise UserError("--sampler cmaes needs the package cmaes; run make setup, or pip install cmaes")


def _tpe(sampling: SamplerConfig, seed: int, taught: Taught) -> BaseSampler:
    # Several trials run at once: counting those under way as bad keeps them apart.
    kinds = {"multivariate": True, "group": True, "constant_liar": True}
    return optuna.samplers.TPESampler(seed=seed, n_startup_trials=STARTUP_TRIALS, **kinds)


def _cmaes(sampling: SamplerConfig, seed: int, taught: Taught) -> BaseSampler:
    importlib.import_module("cmaes")  # Optuna would do it amid the first draw, and Tune complain how long that takes
    kinds = {"independent_sampler": _tpe(sampling, seed, taught), "warn_independent_sampling": False}
    free = optuna.samplers.CmaEsSampler(seed=seed, source_trials=[*map(_numeric, taught)] or None, **kinds)
    return optuna.samplers.PartialFixedSampler(dict(sampling.fixed), free)


def _numeric(trial: FrozenTrial) -> FrozenTrial:
    """The trial with the parameters alone that CMA-ES moves in."""
    kinds = {name: kind for name, kind in trial.distributions.items() if not isinstance(kind, CategoricalDistribution)}
    params = {name: trial.params[name] for name in kinds}
    return create_trial(values=trial.values, params=params, distributions=kinds)


def _nsga2(sampling: SamplerConfig, seed: int, taught: Taught) -> BaseSampler:
    # The usual 50 would spend a usual search on its first generation, which is random.
    population = min(MAX_POPULATION, max(STARTUP_TRIALS, sampling.trials // 6))
    return optuna.samplers.NSGAIISampler(population_size=population, seed=seed)


def _random(sampling: SamplerConfig, seed: int, taught: Taught) -> BaseSampler:
    return optuna.samplers.RandomSampler(seed=seed)


def _qmc(sampling: SamplerConfig, seed: int, taught: Taught) -> BaseSampler:
    quiet = {"warn_asynchronous_seeding": False, "warn_independent_sampling": False}
    return optuna.samplers.QMCSampler(qmc_type="sobol", scramble=True, seed=seed, **quiet)


_MAKERS: Mapping[SamplerName, Callable[[SamplerConfig, int, Taught], BaseSampler]] = {
    "tpe": _tpe,
    "cmaes": _cmaes,
    "nsga2": _nsga2,
    "random": _random,
    "qmc": _qmc,
}


def in_space(space: SearchSpace, params: Params) -> bool:
    """Whether the space could have drawn these parameters."""
    try:
        kinds = space.distributions(params)
    except ValueError:
        return False
    return kinds.keys() == params.keys() and all(_holds(kind, params[name]) for name, kind in kinds.items())


def untried(points: Sequence[Params], tried: Sequence[Params]) -> list[Params]:
    """The points that are not among those that were tried, each once."""
    left: list[Params] = []
    for params in points:
        if params not in tried and params not in left:
            left.append(params)
    return left


def _holds(kind: optuna.distributions.BaseDistribution, value: object) -> bool:
    if isinstance(kind, CategoricalDistribution):
        return value in kind.choices
    return isinstance(value, int | float) and kind.low <= value <= kind.high
