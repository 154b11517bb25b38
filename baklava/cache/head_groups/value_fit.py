"""Fit the values that are kept of a prompt, so that reference queries get the outputs that the full cache gave them.

The weights of the attention do not depend on values, so this is a ridge regression per head (Zweiger et al., arXiv
2602.16284, fit values in this way). The weights are those of keys as they are stored, so the fit also makes up for the
noise of their codes.
"""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from baklava.cache.head_groups.references import PromptEntries, References, context_logits
from baklava.cache.kernels.prompt_attention import can_attend_prompt
from baklava.cache.kernels.reference_attention import reference_probs

HELD_OUT_EVERY = 3
"""Every third reference is held out, to see whether a fit to the others helps."""

Columns = Float[Tensor, "batch heads columns head_dim"]
"""Values of centroids and entries, centroids first."""

Weights = Float[Tensor, "batch heads rows columns"]
"""Weights that references give to them, with the query heads of a KV head stacked."""

Outputs = Float[Tensor, "batch heads rows head_dim"]


def fit_values(
    references: References,
    kept: PromptEntries,
    origin: Columns,
    is_fitted: Bool[Tensor, "batch heads columns"],
    ridge: float,
    store: Callable[[Columns], Columns],
) -> tuple[Columns, Bool[Tensor, "batch heads"]]:
    """Return values with which what is kept answers the references as the full cache did, and the heads that gain.

    The values v of each head minimise |P v - t|² + λ |v - v0|². P are the weights of the references, t their outputs
    without what their own blocks give them, and λ = ridge · mean((t - P v0)²) / mean(v0²). A head gains if values that
    are fitted without them serve the held-out references better, once they are stored.

    Args:
        references: Queries and the outputs that they should get.
        kept: Entries and centroids as they are read.
        origin: v0.
        is_fitted: Which columns are fitted; the others stay as they are read.
        ridge: As above.
        store: Returns values as they are read after they have been stored.
    """
    weights, target, value = _regression(references, kept)
    is_fitted = is_fitted[..., None]
    origin = torch.where(is_fitted, origin, value)
    residual = target - weights @ origin
    count = int(is_fitted.sum(2).max())
    index = None
    if not bool(is_fitted[:, :, :count].all()):
        index = (~is_fitted[..., 0]).to(torch.uint8).sort(stable=True, dim=-1).indices[..., :count]
    fitted, size = _select(weights, is_fitted, index, count), _mean_size(origin, is_fitted)
    num_real = references.is_real.sum(-1)[:, None] * references.query.shape[2]
    held_out = torch.arange(references.query.shape[3], device=weights.device) % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
    held_out = held_out.repeat(references.query.shape[2])

    def fit(rows: Tensor, share: float) -> Columns:
        error = residual[:, :, rows].square().sum((2, 3)) / (num_real * share).clamp(min=1)
        change = _ridge_solution(fitted[:, :, rows], residual[:, :, rows], ridge * error / size)
        if index is None:
            return torch.cat([origin[:, :, :count] + change, origin[:, :, count:]], 2)
        return origin.scatter_add(2, index[..., None].expand(change.shape), change)

    test_weights, test_target = weights[:, :, held_out], target[:, :, held_out]
    trial = torch.where(is_fitted, store(fit(~held_out, 1 - 1 / HELD_OUT_EVERY)), value)
    errors = [(test_target - test_weights @ values).square().sum((2, 3)) for values in (value, trial)]
    return fit(torch.ones_like(held_out), 1.0), errors[1] < errors[0]


def _regression(references: References, kept: PromptEntries) -> tuple[Weights, Outputs, Columns]:
    """Return the weights of the columns, what they should add up to, and the values as they are; 0 for no reference."""
    group, count = references.query.shape[2:4]
    own_log_sum, own_output = references.own_log_sum, references.own_output
    if not kept.padded and can_attend_prompt(references.query, kept.key):
        key, value, bias = kept.key, kept.value, kept.key.new_empty(*kept.key.shape[:2], 0)
        if (centroids := kept.centroids) is not None:
            key, value = torch.cat([centroids.key, key], 2), torch.cat([centroids.value, value], 2)
            bias = centroids.bias
        rows = references.query.flatten(2, 3), own_log_sum.flatten(2, 3)
        powers, totals = reference_probs(*rows, key, bias, references.params)
        weights = powers.div_(totals[..., None]).view(*key.shape[:2], group * count, -1)
    else:
        logits, value = context_logits(references.query, kept, references.params)
        logits = logits.flatten(2, 3)
        own = own_log_sum.flatten(2, 3)[..., None]
        weights = (logits - torch.logaddexp(logits.logsumexp(-1, keepdim=True), own)).exp()
    target = references.output.flatten(2, 3) - (1 - weights.sum(3, keepdim=True)) * own_output.flatten(2, 3)
    if not bool(references.is_real.all()):
        is_real = references.is_real[:, None, None].expand(-1, 1, group, -1).flatten(2, 3)[..., None]
        weights, target = weights * is_real, target * is_real
    return weights, target, value


def _select(
    weights: Weights, is_fitted: Tensor, index: Tensor | None, count: int
) -> Float[Tensor, "batch heads rows {count}"]:
    """Return the columns that are fitted; rows and heads that have fewer get zeros."""
    if index is None:
        return weights[..., :count]
    chosen = weights.gather(3, index[:, :, None].expand(*weights.shape[:3], count))
    return chosen * is_fitted[..., 0].gather(2, index)[:, :, None]


def _mean_size(origin: Columns, is_fitted: Tensor) -> Float[Tensor, "batch heads"]:
    sizes = (origin.square() * is_fitted).sum((2, 3)) / is_fitted.sum((2, 3)).clamp(min=1)
    return sizes.clamp(min=torch.finfo(torch.float32).tiny)


def _ridge_solution(weights: Weights, residual: Outputs, ridge: Float[Tensor, "batch heads"]) -> Columns:
    """Return the changes that minimise |W x - r|² + ridge |x|², by whichever of the two Gram matrices is smaller."""
    rows, columns = weights.shape[2:]
    across = weights.transpose(2, 3)
    gram = weights @ across if rows < columns else across @ weights
    # Not every device has 64 bits.
    gram = gram.to("cpu" if gram.device.type == "mps" else gram.device, torch.float64)
    # A head without residual has no ridge.
    gram.diagonal(dim1=-2, dim2=-1).add_(ridge.to(gram)[..., None].clamp(min=1e-12))
    factor, failed = torch.linalg.cholesky_ex(gram)
    right = residual if rows < columns else across @ residual
    solution = torch.cholesky_solve(right.to(gram), factor).masked_fill(failed[..., None, None] != 0, 0).to(weights)
    return across @ solution if rows < columns else solution
