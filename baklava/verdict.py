"""The verdict: what a comparison says, in plain sentences."""

import math
from collections.abc import Sequence

from baklava.bootstrap import Interval
from baklava.comparison import Evaluation, TaskScore, best

LEAST_GAIN = 0.05
"""Nats per token that context must be worth before the loss of it can show."""

RETRIEVAL = ("kv_retrieval", "multi_needle", "needle", "passkey")
"""Tasks that a sentence names first: they tell plans apart best."""


def verdict(evaluations: Sequence[Evaluation]) -> list[str]:
    """A sentence about the text, one about each plan, and one about the best plan against each other one."""
    return [*_about_text(evaluations[0]), *map(about, evaluations), *_against(evaluations)]


def about(evaluation: Evaluation) -> str:
    """What one plan keeps, and what that costs and gains."""
    plan = evaluation.named.plan
    held = f"{plan.bytes_per_sequence / 2**20:.3g} of {plan.full_bytes_per_sequence / 2**20:.3g} MiB"
    parts = [f"{evaluation.named.name} keeps {plan.ratio:.1%} of the bytes ({held})"]
    if evaluation.scores:
        parts.append(f"perplexity {percent(evaluation.mean('dnll'))}")
    parts += [_task(name, evaluation.tasks[name]) for name in _named(evaluation)]
    if speed := evaluation.speed:
        parts.append(f"decode {_times(speed.decode_ratio)} at {speed.context:,} tokens")
    return "; ".join(parts) + "."


def _about_text(evaluation: Evaluation) -> list[str]:
    if not evaluation.scores:
        return []
    gain = evaluation.mean("gain")
    told = f"with all of its context instead of {evaluation.short} tokens a window gains {gain.mean:.3f} nats per token"
    sentence = f"{gain.windows} windows of {gain.documents} documents; {told}"
    if gain.mean < LEAST_GAIN:
        return [f"{sentence}: context is worth next to nothing here, so this text cannot tell plans apart."]
    return [f"{sentence}."]


def _against(evaluations: Sequence[Evaluation]) -> list[str]:
    winner = best(evaluations)
    if winner is None:
        return []
    others = [each for each in evaluations if each is not winner and each.named.plan.allocation.method != "full"]
    return [_pair(winner, other) for other in others]


def _pair(winner: Evaluation, other: Evaluation) -> str:
    more = other.above(winner, "kl")
    names = f"{winner.named.name} is nearer to the full cache than {other.named.name}"
    measured = f"by {more.mean:.4f} nats per token of KL {_bounds(more, '.4f')}"
    if math.isnan(more.low):
        return f"{names} {measured}; one document gives no interval."
    return (
        f"{names} {measured}." if more.low > 0 else f"{names} {measured}, which these windows cannot tell from chance."
    )


def _named(evaluation: Evaluation) -> list[str]:
    """The first two tasks that the full cache can do, those of retrieval before all others."""
    known = [*RETRIEVAL, *(task for task in evaluation.tasks if task not in RETRIEVAL)]
    able = [name for name in known if name in evaluation.tasks and evaluation.tasks[name].full_exact >= 0.5]
    return able[:2]


def _task(name: str, score: TaskScore) -> str:
    before, after = (round(exact * score.questions) for exact in (score.full_exact, score.exact))
    return f"{name.replace('_', ' ')} {before} → {after} of {score.questions}"


def percent(dnll: Interval) -> str:
    """A loss in nats per token as a change of perplexity, with its interval."""
    # + 0.0 turns a rounded -0.0 into 0.0
    mean, low, high = (round(100 * math.expm1(value), 1) + 0.0 for value in (dnll.mean, dnll.low, dnll.high))
    return f"{mean:+.1f} %" + ("" if math.isnan(low) else f" [{low:.1f}, {high:.1f}]")


def _bounds(found: Interval, form: str) -> str:
    return "" if math.isnan(found.low) else f"[{found.low:{form}}, {found.high:{form}}]"


def _times(ratio: float) -> str:
    return f"{ratio:.1f} × as fast" if ratio < 0.95 or ratio >= 1.05 else "as fast"
