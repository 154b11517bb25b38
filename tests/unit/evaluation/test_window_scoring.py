from collections.abc import Callable

import pytest
import torch
from plan_factory import make_plan, random_ids, with_chunked_prefill
from torch.nn.functional import cross_entropy, kl_div
from transformers import DynamicCache

from baklava.allocation import Baklava, allocate
from baklava.allocation.plan_spec import resolve_plan
from baklava.data.documents import load_documents
from baklava.data.windows import Window, cut_windows
from baklava.errors import UserError
from baklava.evaluation.evaluator import Evaluator
from baklava.evaluation.results import aggregate_results
from baklava.evaluation.window_scoring import prefill_window, score_plan
from baklava.eviction import (
    TOVA,
    AttentionMatching,
    Eviction,
    ExpectedAttention,
    HeavyHitter,
    KeyDiff,
    KVzip,
    SnapKV,
    StreamingLLM,
)
from baklava.plan.budget_plan import BudgetPlan, full_cache_plan
from baklava.profiling.profile import Profile
from baklava.profiling.profiler import cached_profile
from baklava.runtime.model_loader import LoadedModel
from baklava.runtime.prefill import prefill

Maker = Callable[..., LoadedModel]

FITTING = AttentionMatching(eviction_interval=4, references=30, fit_references=30, centroids=2)
EVICTIONS = [
    StreamingLLM(),
    HeavyHitter(eviction_interval=8, distance=0),
    HeavyHitter(sinks=1, eviction_interval=5, recent_ratio=0.3, reduction="max", power=2, distance=7),
    TOVA(eviction_interval=4),
    SnapKV(eviction_interval=6, window=4),
    KeyDiff(eviction_interval=4),
    ExpectedAttention(eviction_interval=8, window=12),
    KVzip(eviction_interval=8),
    FITTING,
    HeavyHitter(eviction_interval=4, distance=0, fit_references=12),
]


@torch.inference_mode()
def slow_score(loaded: LoadedModel, window: Window, plan: BudgetPlan) -> tuple[float, float]:
    """(NLL, KL to transformers' own cache) of the continuation, one token per forward as a server decodes."""
    ids = torch.tensor([window.ids])
    full = DynamicCache()
    budgeted, first = prefill(loaded, plan, ids[:, : window.context_length])
    nll = kl = 0.0
    for position in range(window.context_length, len(window.ids)):
        part = ids[:, : window.context_length] if position == window.context_length else ids[:, position - 1 : position]
        expected = loaded.model(part, past_key_values=full, logits_to_keep=1).logits[0].log_softmax(-1)
        if position > window.context_length:
            first = loaded.model(part, past_key_values=budgeted, logits_to_keep=1).logits[:, -1]
        actual = first.log_softmax(-1)
        nll += float(cross_entropy(actual, ids[0, position : position + 1]))
        kl += float(kl_div(actual, expected, log_target=True, reduction="sum"))
        assert budgeted.nbytes <= plan.bytes_per_sequence
    return nll / window.continuation_length, kl / window.continuation_length


@pytest.mark.slow
@pytest.mark.parametrize("eviction", EVICTIONS, ids=str)
@pytest.mark.parametrize("continuation", [1, 2, 61])
def test_the_fast_score_is_the_slow_one(tiny: Maker, eviction: Eviction, continuation: int) -> None:
    loaded = tiny()
    window = Window("w", "d", tuple(random_ids(1, 80 + continuation)[0].tolist()), 80)
    plan = make_plan(loaded, [[20, 33], [16, 90]], eviction)
    fast = score_plan(loaded, prefill_window(loaded, window, [eviction]), plan)
    nll, kl = slow_score(loaded, window, plan)
    assert fast.nll == pytest.approx(nll, abs=1e-4)
    assert fast.kl == pytest.approx(kl, abs=1e-3)
    assert fast.allocated_bytes <= plan.bytes_per_sequence


@pytest.mark.parametrize("eviction", EVICTIONS[:2], ids=str)
def test_the_fast_score_rounds_to_16_bits_as_a_server_does(tiny: Maker, eviction: Eviction) -> None:
    loaded = tiny()
    window = Window("w", "d", tuple(random_ids(1, 140)[0].tolist()), 80)
    plan = make_plan(loaded, [[20, 33], [16, 90]], eviction, bits=16)
    nll, _ = slow_score(loaded, window, plan)
    assert score_plan(loaded, prefill_window(loaded, window, [eviction]), plan).nll == pytest.approx(nll, abs=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("eviction", [*EVICTIONS[:2], FITTING, TOVA(eviction_interval=4, residual_length=7)], ids=str)
@pytest.mark.parametrize("bits", [8, 4, 2])
def test_the_fast_score_packs_as_a_server_does(tiny: Maker, eviction: Eviction, bits: int) -> None:
    loaded = tiny()
    window = Window("w", "d", tuple(random_ids(1, 110)[0].tolist()), 80)
    plan = make_plan(loaded, [[20, 33], [16, 90]], eviction, bits=bits)
    nll, _ = slow_score(loaded, window, plan)
    assert score_plan(loaded, prefill_window(loaded, window, [eviction]), plan).nll == pytest.approx(nll, abs=1e-4)


@pytest.mark.parametrize("eviction", [*EVICTIONS[:2], FITTING], ids=str)
def test_a_chunked_plan_is_scored_as_it_prefills(tiny: Maker, eviction: Eviction) -> None:
    loaded = tiny()
    window = Window("w", "d", tuple(random_ids(1, 140)[0].tolist()), 100)
    plan = with_chunked_prefill(make_plan(loaded, [[20, 33], [16, 40]], eviction), 24)
    fast = score_plan(loaded, prefill_window(loaded, window, [eviction]), plan)
    nll, kl = slow_score(loaded, window, plan)
    assert fast.nll == pytest.approx(nll, abs=1e-4)
    assert fast.kl == pytest.approx(kl, abs=1e-3)


def test_one_prefill_serves_many_plans_and_is_not_changed_by_them(tiny: Maker) -> None:
    loaded = tiny()
    window = Window("w", "d", tuple(random_ids(1, 140)[0].tolist()), 80)
    prefilled = prefill_window(loaded, window, EVICTIONS)
    plans = [make_plan(loaded, [[20, 33], [16, 90]], eviction) for eviction in EVICTIONS]
    first = [score_plan(loaded, prefilled, plan).nll for plan in plans]
    assert [score_plan(loaded, prefilled, plan).nll for plan in plans] == first
    alone = [
        score_plan(loaded, prefill_window(loaded, window, [e]), p).nll for e, p in zip(EVICTIONS, plans, strict=True)
    ]
    assert alone == pytest.approx(first, abs=1e-4)


def test_an_eviction_that_was_not_observed_is_rejected(tiny: Maker) -> None:
    loaded = tiny()
    prefilled = prefill_window(loaded, Window("w", "d", tuple(random_ids(1, 60)[0].tolist()), 50), [StreamingLLM()])
    with pytest.raises(UserError, match="was not observed"):
        score_plan(loaded, prefilled, make_plan(loaded, [[20, 20]] * 2, HeavyHitter(eviction_interval=4, distance=0)))
    with pytest.raises(UserError, match="was made for"):
        score_plan(loaded, prefilled, make_plan(tiny(layers=1), [[20, 20]], StreamingLLM()))


@pytest.fixture(scope="module")
def demo_profile(demo: LoadedModel) -> Profile:
    return cached_profile(
        demo, cut_windows(load_documents(["botocore"]), demo.tokenizer, context=160, continuation=32)[:1]
    )


@pytest.mark.demo
def test_the_demo_model_scores_fast_as_it_would_be_served_and_the_full_plan_loses_nothing(
    demo: LoadedModel, demo_profile: Profile
) -> None:
    documents = load_documents(["ifcraft"])
    window = cut_windows(documents, demo.tokenizer, context=512, continuation=48)[0]
    full = full_cache_plan(demo.identity, demo.geometry, 560)
    whole = score_plan(demo, prefill_window(demo, window, ()), full)
    assert whole.kl < 1e-5
    assert abs(whole.dnll) < 4 * (2 * whole.kl / 48) ** 0.5  # four standard errors of a mean over 48 tokens
    assert whole.allocated_bytes <= full.bytes_per_sequence == full.full_bytes_per_sequence
    short = cut_windows(documents, demo.tokenizer, context=256, continuation=16)[0]
    evictions = (StreamingLLM(), HeavyHitter(eviction_interval=16, distance=0))
    prefilled = prefill_window(demo, short, evictions)
    for eviction in evictions:
        plan = allocate(demo_profile, budget=0.3, context_length=272, method=Baklava(), eviction=eviction)
        fast = score_plan(demo, prefilled, plan)
        nll, kl = slow_score(demo, short, plan)
        assert (fast.nll, fast.kl) == pytest.approx((nll, kl), abs=1e-3)
        assert 0 < fast.allocated_bytes <= plan.bytes_per_sequence <= 0.3 * plan.full_bytes_per_sequence


@pytest.mark.demo
def test_heavy_hitters_in_the_right_heads_beat_uniform_sinks_and_recent_on_unseen_text(
    demo: LoadedModel, demo_profile: Profile
) -> None:
    test_windows = cut_windows(load_documents(["ifcraft"]), demo.tokenizer, context=512, continuation=96)[:2]
    names = ("uniform:0.2", "baklava+heavy_hitter:0.2")
    plans = [resolve_plan(name, demo, 608, lambda: demo_profile) for name in names]
    evaluator = Evaluator(demo, [named.plan for named in plans])
    evaluations = aggregate_results(plans, [evaluator.evaluate_window(window) for window in test_windows], [])
    uniform, ours = (evaluation.mean("kl").mean for evaluation in evaluations)
    assert ours < uniform / 1.2
