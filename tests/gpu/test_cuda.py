"""What the CPU says and what a GPU says: the same, within rounding. Skipped where there is no CUDA device.

`BAKLAVA_TEST_DEVICE=cpu` runs them against the CPU itself, all but those that ask the device's allocator.
"""

import copy
import gc
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from engine_client import ask, engine_of
from plan_factory import make_plan, with_chunked_prefill, with_mixed_precision
from torch import Tensor
from torch.testing import assert_close
from transformers import DynamicCache
from triton_step import Budget, Layer

from baklava.allocation import Blended, allocate
from baklava.cache.attention import AttentionParams
from baklava.cache.budgeted_cache import BudgetedCache
from baklava.cache.kernels import triton_decode
from baklava.data.windows import Window
from baklava.evaluation.window_scoring import median_decode_seconds, score_plan
from baklava.evaluation.window_scoring import prefill_window as prefilled
from baklava.eviction import (
    TOVA,
    Eviction,
    ExpectedAttention,
    HeavyHitter,
    KeyDiff,
    KeyNorm,
    KVzip,
    SnapKV,
    StreamingLLM,
)
from baklava.plan.budget_plan import BudgetPlan, full_cache_plan
from baklava.profiling.profiler import measure_profile
from baklava.runtime.logprobs import score_continuations
from baklava.runtime.model_loader import LoadedModel
from baklava.runtime.prefill import prefill
from tuning.workers.scoring_worker import to_devices, to_host

Maker = Callable[..., LoadedModel]

DEVICE = os.environ.get("BAKLAVA_TEST_DEVICE", "cuda")
pytestmark = pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="there is no CUDA device")
on_cuda = pytest.mark.skipif(DEVICE == "cpu", reason="a CPU's memory has no allocator that could be asked")

EVICTIONS = [
    StreamingLLM(sinks=2),
    HeavyHitter(sinks=2, eviction_interval=4, distance=0),
    HeavyHitter(sinks=1, eviction_interval=6, power=1, stride=3, distance=0, centroids=2),
    TOVA(sinks=1, eviction_interval=3),
    SnapKV(sinks=2, eviction_interval=4, window=3),
    KeyNorm(sinks=2, eviction_interval=5),
    KeyDiff(sinks=0, eviction_interval=4),
    ExpectedAttention(sinks=2, eviction_interval=4, window=6),
]
every_eviction = pytest.mark.parametrize("eviction", EVICTIONS, ids=str)
some_evictions = pytest.mark.parametrize("eviction", EVICTIONS[:3], ids=str)


def moved(loaded: LoadedModel, dtype: torch.dtype = torch.float32, device: str = DEVICE) -> LoadedModel:
    """A copy of a tiny model in this dtype on a device."""
    return LoadedModel.of(copy.deepcopy(loaded.model).to(device=device, dtype=dtype), id=loaded.identity.id)


def different_ids(rows: int, tokens: int) -> Tensor:
    """No token twice in a row: two of them have keys of one norm in the first layer, and rounding would choose."""
    draw = torch.Generator().manual_seed(0)
    return torch.stack([torch.randperm(255, generator=draw)[:tokens] + 1 for _ in range(rows)])


def seen_of(model: LoadedModel, plan: BudgetPlan, ids: Tensor, prompt: int, mask: Tensor | None = None) -> Any:
    """Logits of a prompt and of the tokens behind it, one by one, on the CPU; and the positions that heads kept."""
    ids, mask = ids.to(model.device), None if mask is None else mask.to(model.device)
    cache, logits = prefill(model, plan, ids[:, :prompt], None if mask is None else mask[:, :prompt])
    made = [logits]
    for t in range(prompt, ids.shape[1]):
        known = {} if mask is None else {"attention_mask": mask[:, : t + 1]}
        with torch.inference_mode():
            made.append(model.model(ids[:, t : t + 1], past_key_values=cache, **known).logits[:, -1])
    cache.check_integrity(ids.shape[1])
    grid = [(layer, head, row) for layer in range(2) for head in range(2) for row in range(len(ids))]
    return torch.stack(made).float().cpu(), [cache.cached_positions(*at).tolist() for at in grid]


def tight(loaded: LoadedModel, eviction: Eviction, bits: int = 16) -> BudgetPlan:
    return make_plan(loaded, [[14, 40], [25, 25]], eviction, bits=bits)


def shared(ours: list[list[int]], theirs: list[list[int]]) -> float:
    """Share of the positions that both kept."""
    both = sum(len(set(one) & set(other)) for one, other in zip(ours, theirs, strict=True))
    return both / sum(map(len, ours))


def wrong(found: Tensor, expected: Tensor) -> float:
    """Relative error. Packed, what differs by a rounding may differ by a level, so single values say little."""
    return float((found - expected).norm() / expected.norm())


@every_eviction
@pytest.mark.parametrize("bits", [32, 16, 8, 4])
def test_the_device_retains_the_same_entries_and_gives_the_same_logits_as_the_cpu(
    tiny: Maker, eviction: Eviction, bits: int
) -> None:
    loaded, ids = tiny(vocab_size=256), different_ids(2, 110)
    plan = tight(loaded, eviction, bits)
    expected, kept = seen_of(loaded, plan, ids, 80)
    found, held = seen_of(moved(loaded), plan, ids, 80)
    assert held == kept
    assert wrong(found, expected) < 5e-3


@some_evictions
@pytest.mark.parametrize("bits", [5, 3])
def test_mixed_precision_keys_on_the_device_equal_those_on_the_cpu(tiny: Maker, eviction: Eviction, bits: int) -> None:
    loaded, ids = tiny(vocab_size=256, head_dim=32), different_ids(2, 110)
    plan = with_mixed_precision(loaded, tight(loaded, eviction, bits))
    expected, kept = seen_of(loaded, plan, ids, 80)
    found, held = seen_of(moved(loaded), plan, ids, 80)
    assert held == kept
    assert wrong(found, expected) < 5e-3


@every_eviction
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bits", [16, 4])
def test_in_half_precision_nearly_the_same_entries_are_retained(
    tiny: Maker, eviction: Eviction, dtype: torch.dtype, bits: int
) -> None:
    loaded, ids = tiny(vocab_size=256, head_dim=32), different_ids(2, 110)
    plan = tight(loaded, eviction, bits)
    expected, kept = seen_of(moved(loaded, dtype, "cpu"), plan, ids, 80)
    found, held = seen_of(moved(loaded, dtype), plan, ids, 80)
    assert bool(found.isfinite().all())
    assert shared(held, kept) >= (1 if isinstance(eviction, StreamingLLM) else 0.75)
    if isinstance(eviction, StreamingLLM):
        assert wrong(found, expected) < 0.1


@some_evictions
def test_rows_padded_on_the_left_are_on_the_device_what_they_are_on_the_cpu(tiny: Maker, eviction: Eviction) -> None:
    loaded, ids, mask = tiny(vocab_size=256), different_ids(3, 100), torch.ones(3, 100, dtype=torch.long)
    mask[1, :30] = mask[2, :75] = 0
    plan = tight(loaded, eviction)
    expected, kept = seen_of(loaded, plan, ids, 70, mask)
    found, held = seen_of(moved(loaded), plan, ids, 70, mask)
    assert held == kept
    assert wrong(found, expected) < 5e-3


@some_evictions
def test_a_prompt_in_chunks_is_on_the_device_what_it_is_on_the_cpu(tiny: Maker, eviction: Eviction) -> None:
    loaded, ids = tiny(vocab_size=256), different_ids(2, 100)
    plan = with_chunked_prefill(tight(loaded, eviction), 24)
    expected, kept = seen_of(loaded, plan, ids, 80)
    found, held = seen_of(moved(loaded), plan, ids, 80)
    assert held == kept
    assert wrong(found, expected) < 5e-3


def test_a_prompt_is_repeated_on_the_device_as_on_the_cpu(tiny: Maker) -> None:
    loaded, ids = tiny(vocab_size=256), different_ids(1, 100)
    plan = tight(loaded, KVzip(sinks=2, eviction_interval=4))
    expected, kept = seen_of(loaded, plan, ids, 80)
    found, held = seen_of(moved(loaded), plan, ids, 80)
    assert held == kept
    assert wrong(found, expected) < 5e-3


@torch.inference_mode()
@every_eviction
@pytest.mark.parametrize("bits", [16, 4])
def test_tokens_that_are_forced_see_what_they_see_one_by_one(tiny: Maker, eviction: Eviction, bits: int) -> None:
    loaded, ids = moved(tiny(vocab_size=256)), different_ids(1, 110)
    plan = tight(loaded, eviction, bits)
    expected, _ = seen_of(loaded, plan, ids, 80)
    cache, _ = prefill(loaded, plan, ids[:, :80].to(loaded.device))
    with cache.teacher_forcing():
        found = loaded.model(ids[:, 80:].to(loaded.device), past_key_values=cache).logits[0]
    assert wrong(found.cpu(), expected[1:, 0]) < 5e-3


@torch.inference_mode()
@some_evictions
@pytest.mark.parametrize("options", [{"num_beams": 3}, {"do_sample": False}], ids=str)
def test_generate_gives_the_tokens_of_the_cpu(tiny: Maker, eviction: Eviction, options: dict[str, Any]) -> None:
    loaded, ids = tiny(vocab_size=256), different_ids(2, 80)
    on_device = moved(loaded)
    plan = tight(loaded, eviction)
    made = [
        model.model.generate(
            ids.to(model.device), past_key_values=BudgetedCache(plan), max_new_tokens=24, pad_token_id=0, **options
        ).cpu()
        for model in (loaded, on_device)
    ]
    assert torch.equal(*made)


@on_cuda
@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bits", [16, 4])
@pytest.mark.parametrize("eviction", [StreamingLLM(), HeavyHitter(centroids=4)], ids=str)
def test_the_allocator_has_the_bytes_of_the_cache_and_a_plan_frees_the_rest(
    tiny: Maker, eviction: Eviction, bits: int, dtype: torch.dtype
) -> None:
    loaded, ids = moved(tiny(vocab_size=256, head_dim=64), dtype), torch.randint(1, 256, (8, 4096), device=DEVICE)
    plan = make_plan(loaded, [[512, 512], [256, 600]], eviction, bits=bits, context_length=4096)
    full, in_full = filled(loaded, DynamicCache, ids)
    entries = sum(layer.keys.nbytes + layer.values.nbytes for layer in full.layers)
    del full
    cache, in_plan = filled(loaded, lambda: BudgetedCache(plan), ids)
    assert 0.95 * plan.bytes_per_sequence * len(ids) <= cache.nbytes <= plan.bytes_per_sequence * len(ids)
    # Blocks of 512 bytes; what a ring knows of positions, a rotation of signs, is not the cache's.
    assert abs(in_plan - cache.nbytes) < 0.02 * cache.nbytes + 100_000
    assert in_full - in_plan > 0.95 * (entries - cache.nbytes)


def filled(loaded: LoadedModel, make: Callable[[], Any], ids: Tensor) -> tuple[Any, int]:
    """A cache after a prompt and some tokens, and how many bytes more than before the allocator holds."""
    fed(loaded, make(), ids[:, :700])  # first forwards leave workspaces behind for good
    gc.collect()
    before, cache = torch.cuda.memory_allocated(), make()
    fed(loaded, cache, ids)
    gc.collect()
    return cache, torch.cuda.memory_allocated() - before


def fed(loaded: LoadedModel, cache: Any, ids: Tensor) -> None:
    loaded.model(ids[:, :-40], past_key_values=cache, logits_to_keep=1)
    for t in range(ids.shape[1] - 40, ids.shape[1]):
        loaded.model(ids[:, t : t + 1], past_key_values=cache)


def test_a_model_is_profiled_and_its_plans_are_scored_as_on_the_cpu(tiny: Maker) -> None:
    loaded, ids = tiny(vocab_size=256, head_dim=32), different_ids(2, 160).tolist()
    windows = [Window(f"w{row}", f"d{row}", tuple(each), 120) for row, each in enumerate(ids)]
    on_device = moved(loaded)
    ours, theirs = measure_profile(on_device, windows), measure_profile(loaded, windows)
    assert_close(torch.tensor(ours.importance["value"]), torch.tensor(theirs.importance["value"]), atol=1e-4, rtol=1e-3)
    assert_close(torch.tensor(ours.layer_importance), torch.tensor(theirs.layer_importance), atol=1e-4, rtol=1e-3)
    assert ours.rankings.keys() == theirs.rankings.keys()
    assert ours.curves is not None
    eviction = HeavyHitter(eviction_interval=8, distance=0, centroids=2)
    for bits in ((16, 16), (4, 3)):
        plan = allocate(ours, budget=0.5, context_length=160, method=Blended(), eviction=eviction, bits=bits, step=1)
        scores = [score_plan(model, prefilled(model, windows[0], [eviction]), plan) for model in (on_device, loaded)]
        assert scores[0].kl == pytest.approx(scores[1].kl, abs=2e-3, rel=0.02)
        assert scores[0].nll == pytest.approx(scores[1].nll, abs=2e-3)
        assert scores[0].allocated_bytes == scores[1].allocated_bytes <= plan.bytes_per_sequence


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_model_in_half_precision_is_profiled_and_scored(tiny: Maker, dtype: torch.dtype) -> None:
    loaded = moved(tiny(vocab_size=256, head_dim=32), dtype)
    window = Window("w", "d", tuple(different_ids(1, 160)[0].tolist()), 120)
    measured = measure_profile(loaded, [window])
    eviction = HeavyHitter(eviction_interval=8, distance=0, centroids=2)
    plan = allocate(measured, budget=0.3, context_length=160, method=Blended(), eviction=eviction, bits=(4, 4), step=1)
    held = prefilled(loaded, window, [eviction])
    found = score_plan(loaded, held, plan)
    assert 0 < found.kl < 20
    assert median_decode_seconds(loaded, held, plan) > 0
    assert score_plan(loaded, held, full_cache_plan(loaded.identity, loaded.geometry, 160)).kl < 0.05


def test_a_window_that_was_in_host_memory_is_scored_as_before(tiny: Maker) -> None:
    loaded = moved(tiny(vocab_size=256))
    window = Window("w", "d", tuple(different_ids(1, 110)[0].tolist()), 80)
    on_device, plan = prefilled(loaded, window, EVICTIONS[:3]), tight(loaded, EVICTIONS[1])
    away, devices = to_host(on_device)
    assert away.full_nll.device.type == "cpu"
    before, after = (score_plan(loaded, each, plan) for each in (on_device, to_devices(away, devices)))
    assert (after.nll, after.kl) == pytest.approx((before.nll, before.kl), abs=1e-5)


def test_continuations_of_one_context_are_as_likely_as_on_the_cpu(tiny: Maker) -> None:
    loaded, ids = tiny(vocab_size=256), different_ids(1, 110)[0].tolist()
    plan, texts = tight(loaded, EVICTIONS[1], 4), [ids[80:], ids[85:100], ids[80:81]]
    ours, theirs = (score_continuations(model, plan, ids[:80], texts) for model in (moved(loaded), loaded))
    assert [each.log_prob for each in ours] == pytest.approx([each.log_prob for each in theirs], abs=5e-2)


@some_evictions
def test_a_server_writes_on_the_device_what_it_writes_on_the_cpu(tiny: Maker, eviction: Eviction) -> None:
    loaded, prompt = tiny(vocab_size=256), different_ids(1, 80)[0].tolist()
    plan = tight(loaded, eviction)

    def written(model: LoadedModel, **wishes: float) -> list[int]:
        with engine_of(model, plan) as engine:
            return ask(engine, prompt, 40, ignore_eos=True, **wishes).tokens()

    assert written(moved(loaded)) == written(loaded)
    assert len(written(moved(loaded), temperature=1.0, seed=1)) == 40


@on_cuda
@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "eviction",
    [StreamingLLM(sinks=2), HeavyHitter(eviction_interval=4, residual_length=7, centroids=4), KeyNorm()],
    ids=str,
)
def test_the_triton_kernels_decode_as_the_reference_does(eviction: Eviction, dtype: torch.dtype) -> None:
    assert triton_decode.is_available(torch.device(DEVICE))
    budgets = [Budget(400, 4, 3), Budget(2000, 16, 16), Budget(90, 8, 6), Budget(600, 5, 2, mixed=True)]
    layer = Layer(budgets, eviction, rows=2, group=4, head_dim=128, prompt=1500, dtype=dtype, device=DEVICE)
    for softcap in (None, None, 30.0, None, None):
        layer.step(AttentionParams(layer.head_dim**-0.5, softcap, torch.zeros(16, device=DEVICE)))
