"""What a comparison of plans says, in plain sentences."""

import math
from collections.abc import Sequence

from baklava.evaluation.formatting import format_bounds, format_mebibytes, format_perplexity_change, pluralize
from baklava.evaluation.results import Evaluation, TaskScore, best_plan

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
