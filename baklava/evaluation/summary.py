"""The verdict: what a comparison says, in plain sentences."""

import math
from collections.abc import Sequence

from baklava.evaluation.formatting import bounds, counted, mebibytes, percent
from baklava.evaluation.results import Evaluation, TaskScore, best

LEAST_GAIN = 0.05
"""Nats per token that context must be worth before the loss of it can show."""

RETRIEVAL = ("kv_retrieval", "multi_needle", "needle", "passkey")
"""Tasks that a sentence names first: they tell plans apart best."""


def verdict(evaluations: Sequence[Evaluation], texts: Sequence[str] = ()) -> list[str]:
    """A sentence about the text, one or more about each plan, one about the best plan against each other one.

    `texts` are the names of what was evaluated on: a plan that was made from one of them is told.
    """
    warnings = [sentence for each in evaluations for sentence in (*_uncut(each), *_seen_before(each, texts))]
    return [_about_text(evaluations[0]), *map(about, evaluations), *warnings, *_against(evaluations)]


def about(evaluation: Evaluation) -> str:
    """What one plan keeps, and what that costs and gains."""
    plan = evaluation.named.plan
    held = f"{mebibytes(plan.bytes_per_sequence)} of {mebibytes(plan.full_bytes_per_sequence)}"
    parts = [
        f"{evaluation.named.name} keeps {plan.ratio:.1%} of the bytes at {plan.context_length:,} tokens ({held})",
        f"perplexity {percent(evaluation.mean('dnll'))}",
    ]
    parts += [_task(name, evaluation.tasks[name]) for name in _named(evaluation)]
    if speed := evaluation.speed:
        parts.append(f"decode {_times(speed.decode_ratio)} at {speed.context:,} tokens")
    return "; ".join(parts) + "."


def _about_text(evaluation: Evaluation) -> str:
    gain = evaluation.mean("gain")
    told = f"with all of its context instead of {evaluation.short} tokens a window gains {gain.mean:.3f} nats per token"
    sentence = f"{counted(gain.windows, 'window')} of {counted(gain.documents, 'document')}; {told}"
    if gain.mean < LEAST_GAIN:
        return f"{sentence}: context is worth next to nothing here, so this text cannot tell plans apart."
    return f"{sentence}."


def _uncut(evaluation: Evaluation) -> list[str]:
    """What was too short for the plan to lose anything, so that its score is the full cache's."""
    if evaluation.keeps_all:
        return []
    tasks = {name: score.prompts - score.cut for name, score in evaluation.tasks.items() if score.cut < score.prompts}
    short = [f"{counted(count, 'prompt')} of {name}" for name, count in tasks.items()]
    if windows := len(evaluation.scores) - evaluation.cut:
        short.insert(0, counted(windows, "window"))
    lossless = evaluation.named.plan.lossless_tokens
    told = f"{evaluation.named.name} loses nothing of up to {lossless:,} tokens, so it was the full cache on"
    return [f"{told} {', '.join(short)}."] if short else []


def _seen_before(evaluation: Evaluation, texts: Sequence[str]) -> list[str]:
    seen = [name for name in evaluation.named.plan.provenance.corpora if name in texts]
    return [f"{evaluation.named.name} was made from {', '.join(seen)}, so this is no test on new text."] if seen else []


def _against(evaluations: Sequence[Evaluation]) -> list[str]:
    winner = best(evaluations)
    if winner is None:
        return []
    return [_pair(winner, other) for other in evaluations if other is not winner and not other.keeps_all]


def _pair(winner: Evaluation, other: Evaluation) -> str:
    more = other.above(winner, "kl")
    names = f"{winner.named.name} is nearer to the full cache than {other.named.name}"
    measured = f"by {more.mean:.4f} nats per token of KL {bounds(more, '.4f')}".rstrip()
    if math.isnan(more.low):
        return f"{names} {measured}; one document gives no interval."
    noise = "" if more.low > 0 else ", which these windows cannot tell from chance"
    return f"{names} {measured}{noise}."


def _named(evaluation: Evaluation) -> list[str]:
    """The first two tasks that the full cache can do, those of retrieval before all others."""
    known = [*RETRIEVAL, *(task for task in evaluation.tasks if task not in RETRIEVAL)]
    able = [name for name in known if name in evaluation.tasks and evaluation.tasks[name].full_exact >= 0.5]
    return able[:2]


def _task(name: str, score: TaskScore) -> str:
    if score.metric != "exact":
        return f"{name.replace('_', ' ')} {score.full_exact:.2f} → {score.exact:.2f}"
    before, after = (round(exact * score.questions) for exact in (score.full_exact, score.exact))
    return f"{name.replace('_', ' ')} {before} → {after} of {score.questions}"


def _times(ratio: float) -> str:
    return f"{ratio:.1f} × as fast" if ratio < 0.95 or ratio >= 1.05 else "as fast"
