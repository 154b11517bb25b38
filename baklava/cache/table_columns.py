"""Columns of the table of a layer: where the entries of a (sequence, KV head) lie, in which form, and how they change.

A row is one (sequence, KV head). Addresses and numbers are int64. Kernels get nothing else about a cache, and count in
the columns of `COUNTERS`.
"""

NO_SLOT = 1 << 40
"""A slot that is after all others."""

(FILLED, SINCE_EVICTION, LAST_POSITION, NUM_COUNTERS) = range(4)
"""Entries, tokens since the last eviction, and the position of the newest token. They are the same in all rows of a
group."""

COUNTERS = slice(NUM_COUNTERS)

(
    CAPACITY,
    SLOTS,
    RING_LENGTH,
    SINK_TOKENS,
    UPDATE,
    DISTANCE,
    SQUARED,
    BY_MAX,
    EVICTS,
    INTERVAL,
    RETAINED,
    RESIDUAL_START,
    RECENT_WINDOW,
    POWER,
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
) = range(NUM_COUNTERS, NUM_COUNTERS + 25)
"""The budget, the slots that are allocated, and the length of a ring after its sinks (0 for scored entries).

Then what happens to scores: what becomes of the probabilities (NO_UPDATE, HEAVY_HITTER or KEEP_PROBS), with the
distance, power 2 and the reduction "max" of heavy hitters; whether the kernel itself evicts, after how many tokens, how
many entries it retains, from which slot on entries keep their order, how many of the newest tokens it never evicts, and
of which power of the attention scores are means (the bits of a float32; 0 if they are none).

Then addresses of the state, the number of centroids, the channels that are rotated together (0 for none), and the
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
