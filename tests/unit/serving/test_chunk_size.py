"""How much of a prompt a step takes while others decode."""

from serve_app.engine.chunk_size import MIN_PREFILL_CHUNK_TOKENS, PROBE_CHUNK_TOKENS, ChunkSizePolicy


def seconds_of(tokens, decode=0.1, per_token=0.001):
    return decode + per_token * tokens


def observe(policy, tokens, decode=0.1):
    policy.observe_step(True, tokens, seconds_of(tokens, decode))


def policy_with_a_prompt_seen(**options):
    policy = ChunkSizePolicy(128, **options)
    policy.observe_step(False, 512, seconds_of(512, decode=0.0))
    return policy


def test_a_chunk_takes_what_a_decode_batch_allows_which_is_measured_with_and_without_a_chunk():
    policy = policy_with_a_prompt_seen()
    for _ in range(50):
        observe(policy, 0)
        observe(policy, policy.chunk_tokens(decoding=True))
    assert policy.chunk_tokens(decoding=True) == 128  # 1.3 of .1 s are 130 tokens
    for _ in range(31):
        observe(policy, policy.chunk_tokens(decoding=True), decode=0.05)
    assert 0.06 < seconds_of(policy.chunk_tokens(decoding=True), decode=0.0) <= 0.066
    for _ in range(31):
        observe(policy, policy.chunk_tokens(decoding=True), decode=0.001)
    assert policy.chunk_tokens(decoding=True) == MIN_PREFILL_CHUNK_TOKENS


def test_a_tpot_target_narrows_a_step_that_also_decodes():
    policy = policy_with_a_prompt_seen(tpot_target=0.15)
    for _ in range(30):
        observe(policy, policy.chunk_tokens(decoding=True))
    assert 45 <= policy.chunk_tokens(decoding=True) <= 50
    assert policy.chunk_tokens(decoding=False) == 512
    for _ in range(30):
        observe(policy, policy.chunk_tokens(decoding=True), decode=0.2)  # above the target: a prompt goes on slowly
    assert policy.chunk_tokens(decoding=True) == MIN_PREFILL_CHUNK_TOKENS


def test_large_chunks_measure_the_time_per_token_while_others_decode():
    policy = ChunkSizePolicy(10_000)
    assert policy.chunk_tokens(decoding=True) == MIN_PREFILL_CHUNK_TOKENS
    policy.observe_step(False, 512, 5.12)
    for _ in range(30):
        observe(policy, 0)
        observe(policy, 512)
    assert 125 <= policy.chunk_tokens(decoding=True) <= 130


def test_a_short_first_prompt_does_not_make_later_ones_slow():
    policy = ChunkSizePolicy(512)
    policy.observe_step(False, 10, 0.05)  # most of which is the time of the weights
    assert policy.chunk_tokens(decoding=True) == MIN_PREFILL_CHUNK_TOKENS
    observe(policy, 0)
    assert policy.chunk_tokens(decoding=True) == PROBE_CHUNK_TOKENS
    observe(policy, PROBE_CHUNK_TOKENS)
    assert policy.chunk_tokens(decoding=True) in (129, 130)


def test_prompt_tokens_outside_the_decode_forward_are_measured_by_themselves():
    policy = ChunkSizePolicy(512)
    policy.observe_step(False, 512, 0.1)  # an estimate that is five times too low
    for _ in range(30):
        tokens = policy.chunk_tokens(decoding=True)
        policy.observe_step(True, tokens, seconds_of(tokens), prompt_seconds=0.001 * tokens)
    assert policy.chunk_tokens(decoding=True) in (129, 130)
    policy.observe_step(True, 0, 0.1, prompt_seconds=0.0)
    assert policy.chunk_tokens(decoding=True) in (129, 130)
