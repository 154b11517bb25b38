"""How much of a prompt a step takes while others decode."""

from serve_app.engine.chunk_size import MIN_PREFILL_CHUNK_TOKENS, PROBE_CHUNK_TOKENS, ChunkSizePolicy

BATCH = 8


def seconds_of(tokens, decode=0.1, per_token=0.001):
    return decode + per_token * tokens


def run(policy, steps, decode=0.1, per_token=0.001, batch=BATCH):
    """Run steps that decode, each with as many prompt tokens as the policy wants, and return these."""
    chosen = []
    for _ in range(steps):
        chosen.append(policy.chunk_tokens(batch))
        policy.observe_step(batch, chosen[-1], seconds_of(chosen[-1], decode, per_token))
    return chosen


def policy_with_a_prompt_seen(**options):
    policy = ChunkSizePolicy(512, **options)
    policy.observe_step(0, 512, seconds_of(512, decode=0.0))
    return policy


def test_a_chunk_takes_what_a_decode_batch_allows_which_is_measured_by_itself_from_time_to_time():
    policy = policy_with_a_prompt_seen()
    chosen = run(policy, 40)
    assert [step for step, tokens in enumerate(chosen) if not tokens] == [0, 17, 34]
    assert {tokens for tokens in chosen if tokens} <= {129, 130}  # 1.3 of .1 s
    assert run(policy, 150, decode=0.05)[-1] in (64, 65)
    assert run(policy, 150, decode=0.001)[-1] == MIN_PREFILL_CHUNK_TOKENS
    assert run(policy, 150, decode=1)[-1] == 512


def test_a_wrong_estimate_of_a_token_corrects_itself():
    """Such as that of a prompt whose tokens take longer the more there are before them."""
    policy = ChunkSizePolicy(512)
    policy.observe_step(0, 512, 0.1)  # five times too low
    chosen = run(policy, 12)
    assert chosen[1] == 512
    assert all(tokens <= 260 for tokens in chosen[2:])
    assert chosen[-1] in (129, 130)


def test_a_tpot_target_narrows_a_step_that_also_decodes():
    policy = policy_with_a_prompt_seen(tpot_target=0.15)
    assert 45 <= run(policy, 30)[-1] <= 50
    assert policy.chunk_tokens(0) == 512
    assert run(policy, 150, decode=0.2)[-1] == MIN_PREFILL_CHUNK_TOKENS  # above the target: a prompt goes on slowly


def test_a_short_first_prompt_does_not_make_later_ones_slow():
    policy = ChunkSizePolicy(512)
    policy.observe_step(0, 10, 0.05)  # most of which is the time of the weights
    assert run(policy, 3) == [0, PROBE_CHUNK_TOKENS, 130]


def test_prompt_tokens_outside_the_decode_forward_are_measured_by_themselves():
    policy = ChunkSizePolicy(512)
    policy.observe_step(0, 512, 0.1)  # five times too low
    policy.observe_step(BATCH, 0, 0.1)
    for _ in range(30):
        tokens = policy.chunk_tokens(BATCH)
        policy.observe_step(BATCH, tokens, seconds_of(tokens), prompt_seconds=0.001 * tokens)
    assert policy.chunk_tokens(BATCH) in (129, 130)
    policy.observe_step(BATCH, 0, 0.1, prompt_seconds=0.0)
    assert policy.chunk_tokens(BATCH) in (129, 130)


def test_a_batch_of_another_size_is_measured_before_tokens_are_chosen_for_it():
    policy = policy_with_a_prompt_seen()
    run(policy, 20)
    assert run(policy, 4, decode=0.02, batch=1) == [0, 26, 26, 26]  # 1.3 of .02 s
    assert run(policy, 3) == [0, 130, 130]


def test_short_prompts_enter_in_as_many_steps_and_teach_nothing():
    policy = policy_with_a_prompt_seen()
    run(policy, 4, decode=0.02, batch=1)
    chosen = []
    for batch in range(2, 14):
        chosen.append(policy.chunk_tokens(batch, tokens_left=5))
        policy.observe_step(batch, 5, 0.02 + 0.01 * batch)
    assert chosen == [MIN_PREFILL_CHUNK_TOKENS] * 12
    assert policy.chunk_tokens(14, tokens_left=17) == 0
    policy.observe_step(14, 0, 0.16)
    assert policy.chunk_tokens(14, tokens_left=4096) == 208  # 1.3 of .16 s
    for _ in range(16):
        assert policy.chunk_tokens(14, tokens_left=1) > 0
        policy.observe_step(14, 1, 0.161)
    assert policy.chunk_tokens(14, tokens_left=1) == 0
    assert policy.chunk_tokens(14, tokens_left=0) == 0  # what is left of a dense prompt takes as long as a chunk
