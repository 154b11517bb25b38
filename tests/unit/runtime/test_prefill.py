from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from plan_factory import make_plan, random_ids, with_chunked_prefill
from torch import Tensor
from transformers import DynamicCache

from baklava.cache.budgeted_cache import BudgetedCache
from baklava.cache.recording_layer import RecordingCache
from baklava.errors import UserError
from baklava.eviction import Eviction, ExpectedAttention, HeavyHitter, KeyDiff, KVzip, SnapKV, StreamingLLM
from baklava.plan.budget_plan import full_cache_plan
from baklava.runtime.context_reconstruction import add_reconstruction_scores
from baklava.runtime.model_loader import LoadedModel
from baklava.runtime.prefill import prefill, prefill_and_record

Maker = Callable[..., LoadedModel]


@torch.inference_mode()
@pytest.mark.parametrize("chunk", [1, 7, 16, 100])
def test_chunks_of_a_prompt_that_the_budget_covers_change_nothing(tiny: Maker, chunk: int) -> None:
    loaded, ids = tiny(), random_ids(2, 60)
    plan = with_chunked_prefill(full_cache_plan(loaded.identity, loaded.geometry, 80, bits=32), chunk)
    cache, logits = prefill(loaded, plan, ids)
    torch.testing.assert_close(logits, loaded.model(ids).logits[:, -1], atol=1e-4, rtol=1e-4)
    assert cache.get_seq_length() == 60


@torch.inference_mode()
@pytest.mark.parametrize(
    "eviction",
    [
        StreamingLLM(),
        HeavyHitter(eviction_interval=4, distance=0),
        SnapKV(eviction_interval=4),
        KeyDiff(eviction_interval=4),
        ExpectedAttention(),
    ],
    ids=str,
)
def test_a_chunked_plan_caches_the_same_whether_layers_or_prefill_cut_the_prompt_into_chunks(
    tiny: Maker, eviction: Eviction
) -> None:
    loaded, ids = tiny(), random_ids(2, 90)
    mask = torch.ones_like(ids)
    mask[0, :13] = 0
    plan = with_chunked_prefill(make_plan(loaded, [[40, 50], [45, 45]], eviction), 16)
    cache, logits = prefill(loaded, plan, ids, mask)
    whole = BudgetedCache(plan)
    at_once = loaded.model(ids, attention_mask=mask, past_key_values=whole).logits[:, -1]
    torch.testing.assert_close(at_once, logits, atol=1e-5, rtol=1e-5)
    for layer, head, row in [(0, 0, 0), (0, 1, 1), (1, 0, 1), (1, 1, 0)]:
        assert torch.equal(whole.cached_positions(layer, head, row), cache.cached_positions(layer, head, row))


@torch.inference_mode()
@pytest.mark.parametrize("chunk", [None, 1, 5, 30])
def test_generate_continues_a_padded_prefill_as_it_would_without_one(tiny: Maker, chunk: int | None) -> None:
    loaded, ids = tiny(), random_ids(3, 40)
    mask = torch.ones_like(ids)
    mask[0, :13], mask[2, :1] = 0, 0
    plan = full_cache_plan(loaded.identity, loaded.geometry, 80, bits=32)
    plan = with_chunked_prefill(plan, chunk) if chunk else plan
    options = {"attention_mask": mask, "max_new_tokens": 20, "do_sample": False}
    expected = loaded.model.generate(ids, past_key_values=DynamicCache(), **options)[:, 40:]
    cache, _ = prefill(loaded, plan, ids[:, :-1], mask[:, :-1])
    assert torch.equal(loaded.model.generate(ids, past_key_values=cache, **options)[:, 40:], expected)
    assert torch.equal(loaded.model.generate(ids, past_key_values=BudgetedCache(plan), **options)[:, 40:], expected)
    assert cache.cached_positions(0, 0, row=0)[0] == 0


@pytest.mark.parametrize("bits", [32, 4])
@pytest.mark.parametrize(
    "eviction", [StreamingLLM(), HeavyHitter(eviction_interval=4, distance=0, centroids=2)], ids=str
)
def test_what_was_prefilled_and_copied_in_inference_mode_goes_on_without_it(
    tiny: Maker, eviction: Eviction, bits: int
) -> None:
    loaded, ids = tiny(), random_ids(2, 40)
    plan = make_plan(loaded, [[14, 24], [20, 20]], eviction, bits=bits)
    cache, _ = prefill(loaded, plan, ids)
    with torch.inference_mode():
        copied, expected = cache.copy(), cache.copy()
        logits = [loaded.model(ids[:, :1], past_key_values=expected).logits for _ in range(6)]
    with torch.no_grad():
        found = [loaded.model(ids[:, :1], past_key_values=copied).logits for _ in range(6)]
    torch.testing.assert_close(found, logits)
    text = torch.cat([ids, ids[:, :1]], 1)
    assert loaded.model.generate(text, past_key_values=cache, max_new_tokens=4, do_sample=False).shape == (2, 45)


@torch.inference_mode()
def test_a_masked_prompt_allocates_at_most_a_block_of_its_probabilities(tiny: Maker) -> None:
    loaded, ids = tiny(layers=1), random_ids(2, 3000)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    prefill(loaded, full_cache_plan(loaded.identity, loaded.geometry, 3001), ids[:, :300], mask[:, :300])
    before = resident_bytes()
    prefill(loaded, full_cache_plan(loaded.identity, loaded.geometry, 3001), ids, mask)
    # A mask over all queries at once would be 2 x 4 x 3000 x 3000 floats, 288 MB.
    assert peak_bytes() - before < 150 << 20


def resident_bytes() -> int:
    """Return the bytes in memory now, and count the peak from here."""
    Path("/proc/self/clear_refs").write_text("5")
    return status("VmRSS")


def peak_bytes() -> int:
    return status("VmHWM")


def status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name))


@torch.inference_mode()
def test_a_chunk_attends_to_the_cached_entries_and_itself(tiny: Maker) -> None:
    loaded, ids = tiny(layers=1), random_ids(1, 40)
    plan = with_chunked_prefill(make_plan(loaded, [[12, 12]], StreamingLLM(sinks=2)), 10)
    cache, logits = prefill(loaded, plan, ids)
    # The last chunk sees the two sinks, the ten tokens before it, and itself; one layer has no memory but its entries.
    visible = torch.cat([torch.arange(2), torch.arange(20, 40)])
    expected = loaded.model(ids[:, visible], position_ids=visible[None], past_key_values=DynamicCache()).logits[:, -1]
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    assert cache.cached_positions(0, 0).tolist() == [0, 1, *range(30, 40)]


@torch.inference_mode()
def test_a_chunked_plan_is_not_compressed_from_a_dense_recording(tiny: Maker) -> None:
    loaded = tiny()
    full = RecordingCache(loaded.geometry, (), 20)
    loaded.model(random_ids(1, 20), past_key_values=full)
    plan = with_chunked_prefill(full_cache_plan(loaded.identity, loaded.geometry, 30), 8)
    with pytest.raises(UserError, match="prefill with the plan"):
        BudgetedCache.from_recording(plan, full.to_recording())


def reference_reconstruction_scores(loaded: LoadedModel, ids: Tensor) -> Tensor:
    """Return the largest probability that each entry gets while the text is repeated once, from eager attention."""
    twice = torch.cat([ids, ids], 1)
    loaded.model.set_attn_implementation("eager")
    weights = loaded.model(twice, output_attentions=True, use_cache=False).attentions
    loaded.model.set_attn_implementation("baklava")
    tokens = ids.shape[1]
    received = torch.stack(weights)[:, :, :, tokens:, :tokens].amax(3)
    return received.unflatten(2, (loaded.geometry.kv_heads, -1)).amax(3)


@torch.inference_mode()
def test_reconstruction_scores_are_the_largest_attention_during_a_repetition(tiny: Maker) -> None:
    loaded, ids = tiny(), random_ids(2, 50)
    full = RecordingCache(loaded.geometry, (), 50)
    loaded.model(ids, past_key_values=full)
    scores = add_reconstruction_scores(loaded, ids, full.to_recording()).reconstruction
    torch.testing.assert_close(torch.stack(scores), reference_reconstruction_scores(loaded, ids), atol=1e-5, rtol=1e-4)


@torch.inference_mode()
def test_reconstruction_keeps_the_best_scored_entries_and_continues(tiny: Maker) -> None:
    loaded, ids = tiny(), random_ids(1, 50)
    eviction = KVzip(sinks=2, eviction_interval=4, recent_ratio=0.25)
    plan = make_plan(loaded, [[20, 24], [22, 22]], eviction)
    cache, logits = prefill(loaded, plan, ids)
    torch.testing.assert_close(logits, loaded.model(ids).logits[:, -1], atol=1e-5, rtol=1e-5)
    scores = reference_reconstruction_scores(loaded, ids)[0, 0, 0]
    newest = eviction.recent_window(20)
    scores[:2], scores[50 - newest :] = torch.inf, torch.inf
    assert cache.cached_positions(0, 0).tolist() == scores.topk(20 - 4).indices.sort().values.tolist()
    for number, token in enumerate(random_ids(60, 1, seed=3), 51):
        loaded.model(token[None], past_key_values=cache)
        cache.check_integrity(number)
    assert len(cache.cached_positions(1, 1)) <= 22


@torch.inference_mode()
def test_after_a_repetition_scores_are_those_of_heavy_hitters_in_the_order_of_the_reconstruction(tiny: Maker) -> None:
    loaded, ids = tiny(), random_ids(1, 50)
    kvzip, hitter = KVzip(), HeavyHitter()
    recording = prefill_and_record(loaded, ids, [kvzip, hitter]).recording
    for own, reconstruction in zip(recording.scores, recording.reconstruction, strict=True):
        scores, hits = own[kvzip.score_key], own[hitter.score_key]
        torch.testing.assert_close(scores.sort(2).values, hits.sort(2).values)
        assert torch.equal(scores.argsort(dim=2, stable=True), reconstruction.argsort(dim=2, stable=True))
    assert (kvzip.decoding.score_key, kvzip.attention_power) == (hitter.score_key, 2)


@torch.inference_mode()
def test_reconstruction_refuses_what_it_cannot_repeat(tiny: Maker) -> None:
    loaded, ids = tiny(max_position_embeddings=64), random_ids(2, 40)
    plan = make_plan(loaded, [[20, 24], [22, 22]], KVzip(eviction_interval=4))
    with pytest.raises(UserError, match=r"baklava\.runtime\.prefill\.prefill"):
        loaded.model(ids, past_key_values=BudgetedCache(plan))
    with pytest.raises(UserError, match="exceed the 64 positions"):
        prefill(loaded, plan, ids)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    with pytest.raises(UserError, match="rows without padding"):
        prefill(loaded, plan, ids, mask)
    with pytest.raises(UserError, match="whole prompts, not chunks"):
        prefill(loaded, with_chunked_prefill(plan, 16), ids)
    with pytest.raises(UserError, match="at least one token"):
        prefill(loaded, plan, ids[:, :0])
