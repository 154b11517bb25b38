"""Softmax and scores of reference queries, between the products that PyTorch computes."""

import numpy as np

from baklava.cache.kernels.numba_decode import ONE, ZERO, compiled, exp
from baklava.cache.kernels.numba_prompt import LANES, cap_and_bias, exponentiate, largest_of


@compiled
def softmax_with_rest(logits, rest, totals, bias, scaling, softcap, first, stop):
    """Replace logits by probabilities without their common factor, for some of the queries.

    Args:
        logits: float32 [rows, queries, entries] before the scale, which is changed.
        rest: float32 [rows, queries], logarithm of the sum of exponentials over what a query attends to in addition.
        totals: float32 [rows, queries], which gets what the probabilities are to be divided by.
        bias: float32 [rows, count], which is added to the logits of the first entries.
        scaling: Factor of the logits.
        softcap: Softcap of the logits, or 0.
        first: The first query.
        stop: The query after the last.
    """
    lanes = np.empty(LANES, np.float32)
    for h in range(logits.shape[0]):
        for q in range(first, stop):
            row = logits[h, q]
            factor = cap_and_bias(row, bias[h], scaling, softcap)
            largest = max(largest_of(row, lanes), rest[h, q] / factor)
            totals[h, q] = exp(rest[h, q] - largest * factor) + exponentiate(row, largest, factor)


@compiled
def add_errors(probs, totals, products, value_sizes, output_sizes, errors, mass, skipped, first, stop):
    """Add the errors that entries would leave to references, the largest of each query group, for some of the entries.

    Args:
        probs: float32 [rows, group, queries, entries], to be divided by their totals.
        totals: float32 [rows, group, queries].
        products: float32 [rows, group, queries, scored entries] of outputs and values.
        value_sizes: float32 [rows, scored entries], squared norms.
        output_sizes: float32 [rows, group, queries], squared norms.
        errors: float32 [rows, scored entries], which is changed.
        mass: float32 [rows, scored entries], which gets the sums of squared probabilities.
        skipped: Entries before those that are scored.
        first: The first entry, counted from there.
        stop: The entry after the last.
    """
    size = stop - first
    error, square = np.empty(size, np.float32), np.empty(size, np.float32)
    two = np.float32(2)
    for h in range(probs.shape[0]):
        sizes, own_errors, own_mass = value_sizes[h, first:stop], errors[h, first:stop], mass[h, first:stop]
        for q in range(probs.shape[2]):
            for t in range(size):
                error[t] = ZERO
                square[t] = ZERO
            for g in range(probs.shape[1]):
                row = probs[h, g, q, skipped + first : skipped + stop]
                product, factor, own = products[h, g, q, first:stop], ONE / totals[h, g, q], output_sizes[h, g, q]
                for t in range(size):
                    share = row[t] * factor
                    share *= share
                    square[t] = max(square[t], share)
                    error[t] = max(error[t], share * (sizes[t] + own - two * product[t]))
            for t in range(size):
                own_errors[t] += error[t]
                own_mass[t] += square[t]
