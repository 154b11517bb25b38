"""Softmax and scores of the attention of a prompt, between two products that PyTorch computes.

Nothing is read twice from memory that a cache holds: a block of logits becomes probabilities in place, and those are
added to the scores of heavy hitters. numba compiles again if this file changes, but not if `numba_decode` does.
"""

import numpy as np

from baklava.cache.kernels.numba_decode import LOWEST, ONE, ZERO, compiled, exp

LANES = 64
"""Numbers that are compared with one another at a time: LLVM makes no vectors of a maximum over one row."""


@compiled
def largest_of(row, lanes):
    """Return the largest number of a row; `lanes` is memory of that many numbers."""
    largest, whole = LOWEST, len(row) // LANES * LANES
    for j in range(LANES):
        lanes[j] = LOWEST
    for start in range(0, whole, LANES):
        for j in range(LANES):
            lanes[j] = max(lanes[j], row[start + j])
    for j in range(LANES):
        largest = max(largest, lanes[j])
    for t in range(whole, len(row)):
        largest = max(largest, row[t])
    return largest


@compiled
def cap_and_bias(row, bias, scaling, softcap):
    """Apply the softcap and the bias of the first entries to the logits of a query; return the scale that is left."""
    factor = scaling
    if softcap > ZERO:
        for t in range(len(row)):
            row[t] = np.tanh(row[t] * scaling / softcap) * softcap
        factor = ONE
    for t in range(len(bias)):
        row[t] += bias[t] / factor
    return factor


@compiled
def exponentiate(row, largest, factor):
    """Replace the logits of a query by their exponentials, of which the largest is 1, and return the sum."""
    total = ZERO
    for t in range(len(row)):
        power = exp((row[t] - largest) * factor)
        row[t] = power
        total += power
    return total


@compiled
def softmax_rows(logits, totals, bias, sinks, num_visible, scaling, softcap, first, stop):
    """Replace logits by probabilities without their common factor, for some of the queries.

    A query sees the entries up to its own, and the probabilities of the others are 0.

    Args:
        logits: float32 [rows, group, queries, entries] before the scale, which is changed.
        totals: float32 [rows, group, queries], which gets what the probabilities are to be divided by.
        bias: float32 [rows, count], which is added to the logits of the first entries.
        sinks: Learned sink logits [rows, group], or of size 0.
        num_visible: Entries that the first query sees; each other query sees one more than the query before it.
        scaling: Factor of the logits.
        softcap: Softcap of the logits, or 0.
        first: The first query.
        stop: The query after the last.
    """
    lanes = np.empty(LANES, np.float32)
    for h in range(logits.shape[0]):
        for g in range(logits.shape[1]):
            for q in range(first, stop):
                row = logits[h, g, q]
                visible = row[: num_visible + q]
                factor = cap_and_bias(visible, bias[h], scaling, softcap)
                largest, total = largest_of(visible, lanes), ZERO
                if sinks.size:
                    largest = max(largest, sinks[h, g] / factor)
                    total = exp(sinks[h, g] - largest * factor)
                totals[h, g, q] = total + exponentiate(visible, largest, factor)
                for t in range(len(visible), len(row)):
                    row[t] = ZERO


@compiled
def _reduce(probs, totals, by_max, reduced):
    """Write the maximum or the mean over the group."""
    for t in range(len(reduced)):
        reduced[t] = ZERO
    for g in range(len(totals)):
        row, factor = probs[g], ONE / totals[g]
        if by_max:
            for t in range(len(reduced)):
                reduced[t] = max(reduced[t], row[t] * factor)
        else:
            factor /= np.float32(len(totals))
            for t in range(len(reduced)):
                reduced[t] += row[t] * factor


@compiled
def add_scores(
    probs, totals, weights, query_positions, key_positions, distance, squared, by_max, sums, skipped, first, stop
):
    """Add the attention of queries to the sums of some of the entries, reduced over the group of each KV head.

    Args:
        probs: float32 [rows, group, queries, entries], to be divided by their totals.
        totals: float32 [rows, group, queries].
        weights: float32 [queries].
        query_positions: int32 [queries].
        key_positions: int32 [rows, scored entries or more].
        distance: Only queries at least this many tokens after an entry count.
        squared: Whether the squares are added.
        by_max: Whether a group is reduced by its maximum, else by its mean.
        sums: float32 [rows, scored entries or more], which is changed.
        skipped: Entries before those that are scored.
        first: The first entry, counted from there.
        stop: The entry after the last.
    """
    reduced = np.empty(stop - first, np.float32)
    for h in range(probs.shape[0]):
        positions, own = key_positions[h, first:stop], sums[h, first:stop]
        for q in range(probs.shape[2]):
            if weights[q] == ZERO:
                continue
            _reduce(probs[h, :, q, skipped + first : skipped + stop], totals[h, :, q], by_max, reduced)
            if squared:
                for t in range(len(reduced)):
                    reduced[t] *= reduced[t]
            weight, last = weights[q], query_positions[q] - distance
            for t in range(len(reduced)):
                own[t] += weight * reduced[t] if positions[t] <= last else ZERO
