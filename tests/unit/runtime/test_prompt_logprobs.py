"""A prompt that is scored step by step is as likely as one that is scored at once."""

from statistics import median

import pytest
import torch
from plan_factory import make_plan, random_ids, with_bits

from baklava.errors import UserError
from baklava.eviction import HeavyHitter, StreamingLLM
from baklava.plan.budget_plan import full_cache_plan
from baklava.runtime.logprobs import PromptLogprobsTask, score_suffix, token_logprobs


def score_in_steps(loaded, plan, ids, size, top=2):
    task = PromptLogprobsTask(loaded, plan, ids, len(ids) + 5, top)
    while not (done := task.step(size)):
        assert 0 < task.nbytes <= plan.bytes_for(len(ids) + 5)
    return task.token_logprobs, *done


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 9, 1000])
@pytest.mark.parametrize("bits", [(16, 16), (4, 3)])
@pytest.mark.parametrize(
    "eviction", [StreamingLLM(sinks=2), HeavyHitter(eviction_interval=4, distance=0, centroids=2)], ids=str
)
@torch.inference_mode()
def test_steps_of_any_size_score_as_a_suffix_is_scored_and_the_cache_continues(tiny, eviction, bits, size):
    """One token at a time is rounded otherwise, so on a text here and there a code differs, and all after it."""
    loaded, differences, losses = tiny(head_dim=16), [], []
    plan = with_bits(make_plan(loaded, [[12, 20], [16, 24]], eviction), [bits, bits])
    full = full_cache_plan(loaded.identity, loaded.geometry, 90, bits=32)
    for seed in range(5):
        ids = random_ids(1, 80, seed=seed)[0].tolist()
        scored, cache, logits = score_in_steps(loaded, plan, ids, size)
        expected = score_suffix(loaded, plan, ids, 79)
        differences.append(abs(sum(token.logprob for token in scored) - expected.log_prob))
        assert [token.id for token in scored] == ids[1:]
        assert all(token.id == token.top[0][0] for token in scored) == expected.is_greedy
        assert all(token.top[0][1] >= token.top[1][1] for token in scored)
        cache.check_integrity(80)
        assert logits.shape == (1, 64)
        losses.append(abs(score_suffix(loaded, full, ids, 79).log_prob - expected.log_prob))
    assert median(differences) < 0.02
    assert size == 1 or max(differences) < 0.05
    assert max(losses) > 1


def test_one_token_has_no_likelihood_but_a_cache(tiny):
    loaded = tiny()
    scored, cache, _ = score_in_steps(loaded, make_plan(loaded, [[20, 40], [28, 64]], StreamingLLM()), [5], 3)
    assert (scored, cache.get_seq_length()) == ([], 1)
    with pytest.raises(UserError, match="0 tokens"):
        PromptLogprobsTask(loaded, make_plan(loaded, [[20, 40], [28, 64]], StreamingLLM()), [])


def test_alternatives_are_those_of_the_logits():
    logits = torch.tensor([[0.0, 2.0, 1.0], [5.0, 0.0, 0.0]])
    first, second = token_logprobs(logits, [2, 0], 2)
    assert [token for token, _ in first.top] == [1, 2]
    assert first.logprob == pytest.approx(float(logits[0].log_softmax(-1)[2]))
    assert dict(first.top)[2] == pytest.approx(first.logprob)
    assert second.top[0] == (0, pytest.approx(second.logprob))
    assert token_logprobs(logits, [2], 0)[0].top == ()
