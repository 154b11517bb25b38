"""Which parameters decided how good a trial was."""

import math
import warnings
from collections.abc import Sequence
from statistics import median
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.importance import FanovaImportanceEvaluator, get_param_importances

from tuning.goal import Goal
from tuning.trials import TrialRecord, finished

LEAST_TRIALS = 6
"""Finished trials below which nothing is said; a few times as many say it with some certainty."""

ABSENT = "none"
"""Stands for a choice that a trial did not have."""


def importance(records: Sequence[TrialRecord], goal: Goal) -> dict[str, float]:
    """Share of the spread of the objective that each parameter explains, the largest first; they sum to 1.

    Functional ANOVA (Hutter et al., 2014) by Optuna, on the logarithm of the objective of the drawn trials that scored
    every window. A knob that only some trials have counts as its median in the others, so that what comes of having it
    is put down to the choice that it belongs to. Empty where trials are too few, or all the same.
    """
    trials = compared(records)
    spaces = {name: found for name in _names(trials) if (found := _distribution(name, trials))}
    values = [goal.value(trial.metrics) for trial in trials]
    if len(trials) < LEAST_TRIALS or not spaces or len(set(values)) < 2:
        return {}
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        study = _study(trials, spaces, values)
        shares = get_param_importances(study, evaluator=FanovaImportanceEvaluator(seed=0))
    return {name: value for name, value in shares.items() if math.isfinite(value)}


def compared(records: Sequence[TrialRecord]) -> list[TrialRecord]:
    """The trials that speak of parameters: refinements differ from their base in what has no name."""
    return [record for record in finished(records) if not record.refines]


def numeric(name: str, trials: Sequence[TrialRecord]) -> bool:
    """Whether a parameter is a number that was drawn from a range."""
    return all(isinstance(trial.params[name], float) for trial in trials if name in trial.params)


def _names(trials: Sequence[TrialRecord]) -> list[str]:
    return sorted({name for trial in trials for name in trial.params})


def _study(
    trials: Sequence[TrialRecord], spaces: dict[str, BaseDistribution], values: Sequence[float]
) -> optuna.study.Study:
    study = optuna.create_study()
    for trial, value in zip(trials, values, strict=True):
        params = {name: _value(name, trial, trials) for name in spaces}
        study.add_trial(
            optuna.trial.create_trial(params=params, distributions=spaces, value=math.log(max(value, 1e-12)))
        )
    return study


def _distribution(name: str, trials: Sequence[TrialRecord]) -> BaseDistribution | None:
    """What a parameter was drawn from, as far as the trials show; None where it was the same in all of them."""
    values = {_value(name, trial, trials) for trial in trials}
    if len(values) < 2:
        return None
    if numeric(name, trials):
        return FloatDistribution(min(values), max(values))
    return CategoricalDistribution(sorted(values, key=str))


def _value(name: str, trial: TrialRecord, trials: Sequence[TrialRecord]) -> Any:
    if not numeric(name, trials):
        return trial.params.get(name, ABSENT)
    return trial.params.get(name, median(each.params[name] for each in trials if name in each.params))
