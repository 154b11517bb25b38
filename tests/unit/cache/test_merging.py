"""What a head evicts goes on in a few centroids."""

import copy
from collections.abc import Callable

import pytest
import torch
from plan_factory import make_plan, random_ids, with_chunked_prefill
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from baklava.cache.attention import AttentionParams, attend_values, attention_probs
from baklava.cache.head_groups.centroids import Centroids
from baklava.errors import UserError
from baklava.eviction import Eviction, HeavyHitter, KeyDiff, StreamingLLM
from baklava.plan.budget_plan import BudgetPlan
from baklava.runtime.model_loader import LoadedModel
from baklava.runtime.prefill import prefill

Maker = Callable[..., LoadedModel]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def of(key: Tensor, value: Tensor, weight: Tensor, count: int, iterations: int = 4) -> Centroids:
    return Centroids.empty(key, key.shape[1], count).merge(key, value, weight, iterations)


def test_equal_entries_are_as_good_as_their_centroid() -> None:
    key, value = draw(1, 2, 3, 8).repeat_interleave(5, 2), draw(1, 2, 3, 8, seed=1).repeat_interleave(5, 2)
    summary = of(key, value, torch.ones(1, 2, 15), 3).entries(torch.float32)
    query, held, given = draw(1, 2, 2, 4, 8, seed=2), draw(1, 2, 6, 8, seed=3), draw(1, 2, 6, 8, seed=4)
    kernel = AttentionParams(0.4)
    exact = attend_values(attention_probs(query, torch.cat([key, held], 2), None, kernel), torch.cat([value, given], 2))
    attention = attention_probs(query, held, None, kernel, summary)
    torch.testing.assert_close(attend_values(attention, given, summary), exact, atol=2e-3, rtol=2e-3)


def test_a_centroid_is_the_weighted_mean_of_its_members_and_weighs_as_many() -> None:
    key, value, weight = draw(1, 1, 40, 4), draw(1, 1, 40, 4, seed=1), draw(1, 1, 40, seed=2).abs()
    found = of(key, value, weight, 1)
    share = (weight / weight.sum())[0, 0]
    torch.testing.assert_close(found.key[0, 0, 0].float(), share @ key[0, 0], atol=1e-3, rtol=1e-2)
    torch.testing.assert_close(found.value[0, 0, 0].float(), share @ value[0, 0], atol=1e-3, rtol=1e-2)
    scaled = of(key, value, 100 * weight, 1)
    bias = float(found.entries(torch.float32).bias)
    assert bias == pytest.approx(float(scaled.entries(torch.float32).bias), abs=1e-4)
    assert bias == pytest.approx(float(-(share * share.log()).sum()), abs=1e-4)
    equal = of(key, value, torch.ones(1, 1, 40), 1).entries(torch.float32)
    assert float(equal.bias.exp()) == pytest.approx(40, rel=1e-4)


def test_members_that_come_late_count_as_those_that_came_first() -> None:
    key, value, weight = draw(1, 1, 60, 4), draw(1, 1, 60, 4, seed=1), draw(1, 1, 60, seed=2).abs()
    whole = of(key, value, weight, 1)
    parts = of(key[:, :, :25], value[:, :, :25], weight[:, :, :25], 1)
    parts = parts.merge(key[:, :, 25:], value[:, :, 25:], weight[:, :, 25:])
    for mine, all_at_once in zip(parts.tensors, whole.tensors, strict=True):
        torch.testing.assert_close(mine, all_at_once, atol=2e-3, rtol=2e-2)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_centroids_follow_what_comes_for_ever(dtype: torch.dtype) -> None:
    found = Centroids.empty(torch.empty(1, 1, 0, 4, dtype=dtype), 1, 1)
    steps = torch.linspace(1, 4, 1500)
    for step in steps:
        entries = torch.full((1, 1, 16, 4), float(step), dtype=dtype)
        found = found.merge(entries, entries, torch.ones(1, 1, 16))
    assert float(found.key.mean()) == pytest.approx(float(steps.mean()), rel=0.02)
    assert float(found.entries(dtype).bias.exp()) == pytest.approx(1500 * 16, rel=1e-3)


def test_a_prompt_is_folded_in_without_a_copy_of_it() -> None:
    key, value = (draw(1, 2, 40_000, 64, seed=seed).half() for seed in (0, 1))
    largest, given = [0], {each.untyped_storage().data_ptr() for each in (key, value)}

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor) and result.untyped_storage().data_ptr() not in given:
                largest.append(result.untyped_storage().nbytes())
            return result

    with Watch():
        of(key, value, torch.ones(1, 2, 40_000), 4)
    assert max(largest) < key.untyped_storage().nbytes() / 5


def test_more_centroids_are_better_and_none_is_spent_on_entries_without_weight() -> None:
    key, value, weight = draw(1, 3, 200, 8), draw(1, 3, 200, 8, seed=1), torch.ones(1, 3, 200)
    off = []
    for count in (1, 4, 16):
        found = of(key, value, weight, count)
        assert float(found.weight.sum()) == pytest.approx(600)
        assert int((found.weight > 0).sum()) == 3 * count
        distance = torch.cdist(key, found.key.float()).square()
        off.append(float(distance.amin(-1).mean()))
    assert off[0] > off[1] > off[2]
    half = torch.cat([torch.zeros(1, 3, 100), weight[..., 100:]], 2)
    torch.testing.assert_close(
        of(key, value, half, 4).key, of(key[:, :, 100:], value[:, :, 100:], weight[..., 100:], 4).key
    )


def test_centroids_without_members_are_never_seen() -> None:
    summary = Centroids.empty(draw(1, 2, 1, 8), 2, 3).entries(torch.float32)
    attention = attention_probs(draw(1, 2, 2, 4, 8), draw(1, 2, 6, 8), None, AttentionParams(0.4), summary)
    assert float(attention[..., :3].abs().max()) == 0


def centroid_plan(loaded: LoadedModel, count: int, bits: int, eviction: type[Eviction] = HeavyHitter) -> BudgetPlan:
    knobs = {"distance": 0} if eviction is HeavyHitter else {}
    method = eviction(sinks=2, eviction_interval=4, recent_ratio=0.2, centroids=count, **knobs)
    return make_plan(loaded, [[14, 30], [20, 20]], method, bits=bits)


@pytest.mark.slow
@torch.inference_mode()
@pytest.mark.parametrize("bits", [32, 4])
@pytest.mark.parametrize("chunk", [None, 9])
def test_centroids_are_the_same_together_and_one_by_one_and_cost_what_the_plan_reserves(
    tiny: Maker, bits: int, chunk: int | None
) -> None:
    loaded, ids = tiny(), random_ids(1, 37, seed=3)
    logits = {}
    for count in (0, 3):
        plan = centroid_plan(loaded, count, bits)
        plan = with_chunked_prefill(plan, chunk) if chunk else plan
        one_by_one, _ = prefill(loaded, plan, random_ids(1, 80))
        together = copy.deepcopy(one_by_one)
        slow = torch.cat([loaded.model(t[None], past_key_values=one_by_one).logits for t in ids.T], 1)
        with together.teacher_forcing():
            fast = loaded.model(ids, past_key_values=together).logits
        torch.testing.assert_close(fast, slow, atol=1e-3, rtol=1e-3)
        one_by_one.check_integrity(80 + ids.shape[1])
        assert together.nbytes == one_by_one.nbytes <= one_by_one.reserved_bytes
        logits[count] = fast
    head_dim, heads = loaded.geometry.head_dim, 4
    grown = centroid_plan(loaded, 3, bits).bytes_per_sequence - centroid_plan(loaded, 0, bits).bytes_per_sequence
    assert grown == heads * 3 * (2 * 2 * head_dim + 8)
    assert float((logits[0] - logits[3]).abs().mean()) > 0.01


@torch.inference_mode()
def test_centroids_bring_a_small_cache_nearer_to_the_full_one(tiny: Maker) -> None:
    loaded, ids, after = tiny(), random_ids(4, 80), random_ids(4, 30, seed=1)
    exact = loaded.model(torch.cat([ids, after], 1)).logits[:, 80:]
    off = []
    for count in (0, 4):
        cache, _ = prefill(loaded, centroid_plan(loaded, count, 32), ids)
        off.append(float((loaded.model(after[:, :4], past_key_values=cache).logits - exact[:, :4]).square().mean()))
    assert off[1] < off[0]


@torch.inference_mode()
@pytest.mark.parametrize("bits", [32, 4])
@pytest.mark.parametrize("eviction", [KeyDiff, HeavyHitter])
def test_a_left_padded_batch_has_the_centroids_of_its_rows_alone(
    tiny: Maker, bits: int, eviction: type[Eviction]
) -> None:
    loaded, ids = tiny(), random_ids(2, 40, seed=1)
    plan = centroid_plan(loaded, 3, bits, eviction)
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    first = prefill(loaded, plan, ids, mask)[0]
    alone = prefill(loaded, plan, ids[:1, 9:])[0]
    options, wider = {"logits_to_keep": 1}, mask
    for step in range(9):
        token, at = random_ids(2, 1, seed=8 + step), torch.tensor([[31 + step], [40 + step]])
        wider = torch.cat([wider, torch.ones(2, 1, dtype=torch.long)], 1)
        both = loaded.model(token, attention_mask=wider, position_ids=at, past_key_values=first, **options).logits
        row = loaded.model(token[:1], past_key_values=alone, **options).logits
        torch.testing.assert_close(row, both[:1], atol=1e-3, rtol=1e-3)


@torch.inference_mode()
def test_reordered_rows_take_their_centroids_along(tiny: Maker) -> None:
    loaded = tiny()
    cache, _ = prefill(loaded, centroid_plan(loaded, 3, 4), random_ids(2, 60))
    swapped = copy.deepcopy(cache)
    swapped.reorder_cache(torch.tensor([1, 0]))
    token = random_ids(2, 1, seed=3)
    there = loaded.model(token.flip(0), past_key_values=swapped).logits.flip(0)
    torch.testing.assert_close(there, loaded.model(token, past_key_values=cache).logits, atol=1e-4, rtol=1e-4)


def test_a_ring_has_no_centroids() -> None:
    with pytest.raises(UserError, match="centroids 2: a ring buffer replaces its oldest token"):
        StreamingLLM(centroids=2)
