"""Which parameters decided how good a trial was."""

import math
import warnings
from collections.abc import Sequence
from statistics import median
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.importance import FanovaImportanceEvaluator, get_param_importances

from tuning.study.objective import Goal, subsample
from tuning.study.trial import TrialRecord, finished_trials

MIN_TRIALS = 6
"""Finished trials below which there is no result; it takes a few times as many for some certainty."""

MAX_TRIALS = 500
"""Trials that are evaluated, spread evenly over the search: four times as many take half a minute."""

ABSENT = "none"
"""Stands for a choice that a trial did not have."""


def param_importances(records: Sequence[TrialRecord], goal: Goal) -> dict[str, float]:
    """Return the share of the objective's variance that each parameter explains, the largest first; they sum to 1.

    Functional ANOVA (Hutter et al., 2014) by Optuna, on the logarithm of the objective of the sampled trials that
    scored every window. A parameter that only some trials have counts as its median in the others, so that the effect
    of having it is attributed to the choice that it belongs to. Empty if trials are too few, or all the same.
    """
    trials = subsample(comparable_trials(records), MAX_TRIALS)
    columns: dict[str, list[Any]] = {}
    for name in sorted({name for trial in trials for name in trial.params}):
        values = _column(name, trials)
        if len(set(values)) > 1:
            columns[name] = values
    objectives = [goal.objective_value(trial.metrics) for trial in trials]
    if len(trials) < MIN_TRIALS or not columns or len(set(objectives)) < 2:
        return {}
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        study = _study(columns, objectives)
        shares = get_param_importances(study, evaluator=FanovaImportanceEvaluator(seed=0))
    return {name: float(value) for name, value in shares.items() if math.isfinite(value)}


def comparable_trials(records: Sequence[TrialRecord]) -> list[TrialRecord]:
    """Return the finished trials without refinements, which differ from their base in no named parameter."""
    return [record for record in finished_trials(records) if not record.parent_trial]


def is_numeric(name: str, trials: Sequence[TrialRecord]) -> bool:
    """Return whether a parameter is a number that was sampled from a range."""
    return all(isinstance(trial.params[name], float) for trial in trials if name in trial.params)


def _column(name: str, trials: Sequence[TrialRecord]) -> list[Any]:
    """The parameter's value in every trial, and a stand-in where a trial does not have it."""
    absent = ABSENT
    if is_numeric(name, trials):
        absent = median(trial.params[name] for trial in trials if name in trial.params)
    return [trial.params.get(name, absent) for trial in trials]


def _study(columns: dict[str, list[Any]], objectives: Sequence[float]) -> optuna.study.Study:
    study = optuna.create_study()
    distributions = {name: _distribution(column) for name, column in columns.items()}
    for number, objective in enumerate(objectives):
        params = {name: column[number] for name, column in columns.items()}
        value = math.log(max(objective, 1e-12))
        study.add_trial(optuna.trial.create_trial(params=params, distributions=distributions, value=value))
    return study


def _distribution(column: Sequence[Any]) -> BaseDistribution:
    """What a parameter was sampled from, as far as the trials show."""
    if all(isinstance(value, float) for value in column):
        return FloatDistribution(min(column), max(column))
    return CategoricalDistribution(sorted(set(column), key=str))
