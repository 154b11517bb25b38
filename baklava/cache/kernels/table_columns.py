"""Columns of the table that a kernel gets: where the entries of a (sequence, KV head) lie, and in which form.

A row is one (sequence, KV head). Addresses and numbers are int64.
"""

NO_SLOT = 1 << 40
"""A slot that is after all others."""

(
    POSITIONS,
    SCORES,
    CENTROIDS,
    CENTROID_KEY,
    CENTROID_VALUE,
    CENTROID_WEIGHT,
    CENTROID_ENTROPY,
    KEY_BLOCK,
    VALUE_BLOCK,
    CHANNEL_ORDER,
    KEY,
) = range(11)
"""Addresses of the state, the number of centroids, the channels that are rotated together (0 for none), and the
address of the order of the key's channels. Keys have the columns below from KEY on, and values from VALUE on."""

(
    SINKS,
    QUANTIZED_START,
    QUANTIZED_STOP,
    RECENT,
    DENSE_BYTES,
    FIRST_CHANNELS,
    FIRST_BITS,
    FIRST_CODES,
    FIRST_SCALES,
    FIRST_MEAN,
    SECOND_BITS,
    SECOND_CODES,
    SECOND_SCALES,
    SECOND_MEAN,
    NUM_STORAGE_COLUMNS,
) = range(15)
"""Slots before QUANTIZED_START are dense at SINKS, those from QUANTIZED_STOP on are dense at RECENT. Quantized entries
have one part, or two if the first has fewer than all channels."""

VALUE = KEY + NUM_STORAGE_COLUMNS
NUM_COLUMNS = VALUE + NUM_STORAGE_COLUMNS

NO_UPDATE, HEAVY_HITTER, KEEP_PROBS = 0, 1, 2
"""What becomes of the probabilities of a decoded token: nothing, new scores of heavy hitters, or they are returned."""
