"""How much of a prompt a step prefills while others decode."""

from serve_app.engine.chunk_size import MIN_PREFILL_CHUNK_TOKENS, ChunkSizePolicy


def seconds_of(tokens, weights=0.05, per_token=0.001):
    return weights + per_token * tokens


def observe_prefill(policy, tokens):
    policy.observe_prefill(tokens, seconds_of(tokens))


def test_a_chunk_takes_what_a_decode_batch_allows_weights_and_tokens_measured_apart():
    """A mean per token would take small chunks for slow ones, and make them smaller still."""
    policy = ChunkSizePolicy(128)
    observe_prefill(policy, 512)
    for _ in range(50):
        policy.observe_decode(0.1)
        observe_prefill(policy, policy.chunk_tokens(decoding=True))
    chunk = policy.chunk_tokens(decoding=True)
    assert 0.11 < seconds_of(chunk) < 0.13 + 0.001
    for _ in range(31):
        policy.observe_decode(0.01)
    assert policy.chunk_tokens(decoding=True) == MIN_PREFILL_CHUNK_TOKENS
    for _ in range(30):
        policy.observe_decode(10.0)
    assert policy.chunk_tokens(decoding=True) == 128


def test_a_step_that_processed_no_tokens_is_not_measured():
    policy = ChunkSizePolicy(128)
    assert policy.chunk_tokens(decoding=True) == MIN_PREFILL_CHUNK_TOKENS
    policy.observe_prefill(0, 5.0)
    observe_prefill(policy, 512)
    for _ in range(20):
        policy.observe_decode(0.1)
    assert policy.chunk_tokens(decoding=True) > MIN_PREFILL_CHUNK_TOKENS
    assert policy.chunk_tokens(decoding=False) == 512
