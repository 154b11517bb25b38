"""Models whose layers are not all of one kind are profiled, scored, searched and served as others are."""

import copy
from collections.abc import Callable
from math import prod
from typing import Any

import pytest
import torch
from byte_model import byte_tokenizer
from model_families import FAMILIES, SHAPE, model_pair, tiny_model
from plan_factory import random_ids, with_chunked_prefill
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div
from torch.testing import assert_close
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.masking_utils import eager_mask

from baklava.allocation import METHODS, allocate
from baklava.cache.budgeted_cache import BudgetedCache
from baklava.data.windows import Window
from baklava.evaluation.evaluator import Evaluator
from baklava.evaluation.tasks import Prompt, Question
from baklava.evaluation.window_scoring import prefill_window, score_plan
from baklava.eviction import Eviction, ExpectedAttention, HeavyHitter, KVzip, StreamingLLM
from baklava.plan.budget_plan import AllocationConfig, BudgetPlan, LayerBudget, full_cache_plan
from baklava.profiling.profiler import measure_profile
from baklava.runtime.batched_forward import TokenChunk, batched_forward, decode_step
from baklava.runtime.logprobs import score_continuations
from baklava.runtime.model_loader import LoadedModel
from baklava.runtime.prefill import DensePrefill, compress, prefill, prefill_and_record, prefill_workspace_bytes

CONTEXT, CONTINUATION = 70, 30
PLAIN = ("llama", "qwen2", "qwen3", "mistral", "phi3")
MIXED_FAMILIES = [name for name in FAMILIES if name not in PLAIN]
EVICTIONS = [
    StreamingLLM(sinks=2),
    HeavyHitter(sinks=2, eviction_interval=4, distance=0, centroids=2),
    KVzip(sinks=2, eviction_interval=4),
    ExpectedAttention(sinks=2, eviction_interval=4, window=20),
]

every_mixed_family = pytest.mark.parametrize("family", MIXED_FAMILIES)
every_eviction = pytest.mark.parametrize("eviction", EVICTIONS, ids=lambda eviction: eviction.name)


def tight_plan(loaded: LoadedModel, eviction: Eviction, bits: Any = 32) -> BudgetPlan:
    """Return a plan of 14 to 33 entries per head."""
    geometry = loaded.geometry
    same = (bits,) * geometry.kv_heads
    capacities = [tuple(14 + (7 * layer + 5 * head) % 20 for head in range(geometry.kv_heads)) for layer in range(9)]
    layers = [LayerBudget(tokens=row, key_bits=same, value_bits=same) for row in capacities]
    return BudgetPlan(
        model=loaded.identity,
        geometry=geometry,
        context_length=CONTEXT + CONTINUATION,
        eviction=eviction.config,
        allocation=AllocationConfig(method="by hand", budget=1.0),
        layers=geometry.spread(layers, None),
        sliding_bits=max(16, bits),
    )


def text() -> Window:
    return Window("w", "d", tuple(random_ids(1, CONTEXT + CONTINUATION)[0].tolist()), CONTEXT)


@torch.inference_mode()
def decoded_logits(loaded: LoadedModel, cache: BudgetedCache, tokens: Tensor) -> Tensor:
    """Logits after each token, one by one."""
    steps = [loaded.model(token[None, None], past_key_values=cache).logits[0] for token in tokens]
    return torch.cat(steps)


@torch.inference_mode()
def slow_score(loaded: LoadedModel, window: Window, plan: BudgetPlan) -> tuple[float, float]:
    """(NLL, KL to transformers' own cache) of the continuation, one token per forward as a server decodes."""
    ids = torch.tensor([window.ids])
    context, rest = ids[:, :CONTEXT], ids[0, CONTEXT:]
    full, (budgeted, first) = DynamicCache(config=loaded.model.config), prefill(loaded, plan, context)
    expected = [loaded.model(context, past_key_values=full).logits[0, -1:]]
    expected += [loaded.model(token[None, None], past_key_values=full).logits[0] for token in rest[:-1]]
    theirs = torch.cat(expected).log_softmax(-1)
    ours = torch.cat([first, decoded_logits(loaded, budgeted, rest[:-1])]).log_softmax(-1)
    assert budgeted.nbytes <= plan.bytes_per_sequence
    kl = kl_div(ours, theirs, log_target=True, reduction="batchmean")
    return float(cross_entropy(ours, rest)), float(kl)


@every_mixed_family
@every_eviction
@pytest.mark.parametrize("bits", [32, 16])
def test_the_fast_score_is_that_of_the_cache_as_it_is_served(family: str, eviction: Eviction, bits: int) -> None:
    loaded, _ = model_pair(family)
    plan = tight_plan(loaded, eviction, bits)
    fast = score_plan(loaded, prefill_window(loaded, text(), [eviction]), plan)
    nll, kl = slow_score(loaded, text(), plan)
    assert fast.nll == pytest.approx(nll, abs=1e-4 if bits == 32 else 1e-3)
    assert fast.kl == pytest.approx(kl, abs=2e-3)
    assert fast.kl > 1e-4
    assert fast.allocated_bytes <= plan.bytes_per_sequence


@pytest.mark.parametrize("eviction", EVICTIONS[:2], ids=lambda eviction: eviction.name)
def test_layers_that_share_quantized_keys_read_what_their_owner_reads(eviction: Eviction) -> None:
    loaded, _ = model_pair("gemma4 shared")
    plan = tight_plan(loaded, eviction, 8)
    fast = score_plan(loaded, prefill_window(loaded, text(), [eviction]), plan)
    nll, kl = slow_score(loaded, text(), plan)
    assert fast.nll == pytest.approx(nll, abs=2e-3)
    assert fast.kl == pytest.approx(kl, abs=2e-3)


@torch.inference_mode()
def test_a_shared_layer_that_nobody_reads_is_noticed() -> None:
    loaded, _ = model_pair("gemma4 shared")
    cache, _ = prefill(loaded, tight_plan(loaded, EVICTIONS[0]), random_ids(1, CONTEXT))
    cache.check_integrity(CONTEXT)
    cache.budgeted_layers[1].pending_shared = 1
    with pytest.raises(RuntimeError, match="1 layers that share the keys of layer 2 have not read them"):
        cache.check_integrity(CONTEXT)


def ring_reference(plan: BudgetPlan) -> Callable[..., tuple[Tensor, None]]:
    """Return dense attention over a whole text, in which each head sees after the context what its ring would hold."""

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, **options: Any) -> Any:
        group, tokens = query.shape[1] // key.shape[1], query.shape[2]
        logits = query @ key.repeat_interleave(group, 1).transpose(2, 3) * options["scaling"]
        if softcap := options.get("softcap"):
            logits = torch.tanh(logits / softcap) * softcap
        logits = logits + mask
        if budget := plan.layers[plan.geometry.kv_layer(module.layer_idx)]:
            capacity = torch.tensor(budget.tokens).repeat_interleave(group)[:, None, None]
            rows, entries = torch.arange(tokens)[:, None], torch.arange(tokens)
            sinks = plan.eviction.sinks
            visible = (rows < CONTEXT) | (entries < sinks) | (entries > rows - (capacity - sinks))
            logits = logits.masked_fill(~visible, -torch.inf)
        if (learned := options.get("s_aux")) is not None:
            logits = torch.cat([logits, learned.view(1, -1, 1, 1).expand(len(query), -1, tokens, 1)], -1)
        probs = logits.softmax(-1)[..., :tokens]
        return (probs @ value.repeat_interleave(group, 1)).transpose(1, 2), None

    return attend


@torch.inference_mode()
@every_mixed_family
def test_budgets_do_what_masks_over_the_whole_text_would(family: str) -> None:
    loaded, eager = model_pair(family)
    plan, ids = tight_plan(loaded, EVICTIONS[0]), torch.tensor([text().ids])
    cache, first = prefill(loaded, plan, ids[:, :CONTEXT])
    found = torch.cat([first, decoded_logits(loaded, cache, ids[0, CONTEXT:])])
    AttentionInterface.register("ring_reference", ring_reference(plan))
    AttentionMaskInterface.register("ring_reference", eager_mask)
    reference = copy.deepcopy(eager)
    reference.set_attn_implementation("ring_reference")
    expected = reference(ids, use_cache=False).logits[0, CONTEXT - 1 :]
    assert_close(found, expected, atol=3e-3, rtol=1e-3)  # Nemotron-H rounds most
    full = eager(ids, use_cache=False).logits[0, CONTEXT - 1 :]
    assert (found - full).abs().mean() > 30 * (found - expected).abs().mean()


@torch.inference_mode()
@every_mixed_family
def test_the_bytes_of_a_full_cache_are_those_that_its_plan_promises(family: str) -> None:
    loaded, _ = model_pair(family)
    plan, geometry = tight_plan(loaded, EVICTIONS[0]), loaded.geometry
    cache, _ = prefill(loaded, plan, random_ids(1, CONTEXT))
    # Between two forwards transformers keeps a window without the token that the next one brings.
    next_tokens = sum(prod(geometry.head_shape(layer)) for layer, window in enumerate(geometry.windows) if window)
    assert cache.nbytes == plan.bytes_per_sequence - next_tokens * 2 * 4


@every_mixed_family
def test_a_plan_that_covers_the_text_loses_nothing(family: str) -> None:
    loaded, _ = model_pair(family)
    plan = full_cache_plan(loaded.identity, loaded.geometry, CONTEXT + CONTINUATION, bits=32)
    score = score_plan(loaded, prefill_window(loaded, text(), ()), plan)
    assert score.kl < 1e-6
    assert score.dnll == pytest.approx(0, abs=1e-4)
    nll, _ = slow_score(loaded, text(), plan)
    assert score.nll_full == pytest.approx(nll, abs=1e-4)


@torch.inference_mode()
@every_mixed_family
@every_eviction
def test_a_recorded_prompt_continues_as_a_prefilled_one(family: str, eviction: Eviction) -> None:
    loaded, _ = model_pair(family)
    plan, ids, rest = tight_plan(loaded, eviction), random_ids(2, CONTEXT), random_ids(1, 20, seed=7)[0]
    recorded = prefill_and_record(loaded, ids, [eviction])
    (first, logits), (second, expected) = compress(loaded, recorded, plan), prefill(loaded, plan, ids)
    assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    for token in rest:
        step = token.expand(2, 1)
        ours, theirs = (loaded.model(step, past_key_values=cache).logits for cache in (first, second))
        assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    again, _ = compress(loaded, recorded, plan)  # the recording is as it was
    fresh, _ = prefill(loaded, plan, ids)
    ours, theirs = (loaded.model(ids[:, :1], past_key_values=cache).logits for cache in (again, fresh))
    assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@torch.inference_mode()
@every_mixed_family
@pytest.mark.parametrize("eviction", [*EVICTIONS[:2], EVICTIONS[3]], ids=lambda eviction: eviction.name)
def test_a_prompt_in_steps_is_cached_as_in_one(family: str, eviction: Eviction) -> None:
    loaded, _ = model_pair(family)
    plan, ids, rest = tight_plan(loaded, eviction, 16), random_ids(1, CONTEXT), random_ids(1, 20, seed=7)[0]
    whole, expected = prefill(loaded, plan, ids)
    task = DensePrefill(loaded, plan, ids, None)
    promised = plan.bytes_per_sequence + prefill_workspace_bytes(plan, CONTEXT, 4)
    while (result := task.step(17)) is None:
        assert task.nbytes <= promised
    assert_close(result[1], expected, atol=1e-4, rtol=1e-4)
    assert_close(decoded_logits(loaded, result[0], rest), decoded_logits(loaded, whole, rest), atol=2e-3, rtol=1e-3)
    result[0].check_integrity(CONTEXT + len(rest))


@torch.inference_mode()
@every_mixed_family
@pytest.mark.parametrize("chunk", [9, 33])
def test_a_prompt_in_chunks_that_the_budget_covers_changes_nothing(family: str, chunk: int) -> None:
    loaded, eager = model_pair(family)
    ids, mask = random_ids(2, 60), torch.ones(2, 60, dtype=torch.long)
    mask[0, :13] = 0
    plan = with_chunked_prefill(full_cache_plan(loaded.identity, loaded.geometry, 90, bits=32), chunk)
    cache, logits = prefill(loaded, plan, ids, mask)
    assert_close(logits, eager(ids, attention_mask=mask, use_cache=False).logits[:, -1], atol=1e-4, rtol=1e-4)
    assert cache.get_seq_length() == 60


@torch.inference_mode()
@every_mixed_family
@every_eviction
def test_sequences_decode_together_and_from_copies_as_alone(family: str, eviction: Eviction) -> None:
    loaded, _ = model_pair(family)
    plan, prompts = tight_plan(loaded, eviction), [random_ids(1, n, seed=n) for n in (25, 40, 61)]
    caches = [prefill(loaded, plan, ids)[0] for ids in prompts]
    kept = [cache.copy() for cache in caches]
    rest = random_ids(3, 12, seed=5)
    alone = torch.stack([decoded_logits(loaded, own, row) for own, row in zip(caches, rest, strict=True)], 1)
    together = torch.stack([decode_step(loaded, kept, tokens.tolist()) for tokens in rest.T])
    assert_close(together, alone, atol=1e-4, rtol=1e-4)
    chunk = random_ids(1, 21, seed=9)[0]
    copied, whole = kept[1].copy(), kept[1].copy()
    expected = loaded.model(chunk[None], past_key_values=whole).logits[:, -1]
    chunks = [TokenChunk(kept[0], chunk[:1]), TokenChunk(copied, chunk)]
    logits, errors = batched_forward(loaded, chunks)
    assert errors == {}
    assert_close(logits[1:], expected, atol=1e-4, rtol=1e-4)


@torch.inference_mode()
def test_a_decode_step_of_a_model_with_states_that_fails_leaves_the_prompt_beside_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loaded, _ = model_pair("qwen3_5")
    plan, ids = tight_plan(loaded, EVICTIONS[1]), random_ids(1, 21, seed=9)[0]
    caches = [prefill(loaded, plan, random_ids(1, 25 + tokens, seed=tokens))[0] for tokens in range(3)]
    expected = loaded.model(ids[None], past_key_values=caches[2].copy()).logits[:, -1]

    def explode(*args: object) -> None:
        raise MemoryError("no memory")

    monkeypatch.setattr(caches[1].budgeted_layers[0].groups[0], "maybe_evict", explode)
    chunks = [TokenChunk(caches[0], ids[:1]), TokenChunk(caches[2], ids), TokenChunk(caches[1], ids[:1])]
    logits, errors = batched_forward(loaded, chunks)
    assert [type(errors.get(number)) for number in range(3)] == [MemoryError, type(None), MemoryError]
    assert_close(logits[1:2], expected, atol=1e-4, rtol=1e-4)
    with pytest.raises(MemoryError, match="no memory"):  # nothing else has a result
        batched_forward(loaded, [TokenChunk(caches[0], ids[:1]), TokenChunk(caches[1], ids[:1])])


@torch.inference_mode()
@every_mixed_family
def test_rows_take_what_every_layer_holds_along(family: str) -> None:
    loaded, _ = model_pair(family)
    plan, ids, rows = tight_plan(loaded, EVICTIONS[1]), random_ids(3, CONTEXT), torch.tensor([2, 0, 0, 1])
    token = random_ids(4, 1, seed=3)
    cache, _ = prefill(loaded, plan, ids)
    cache.batch_select_indices(rows)
    expected, _ = prefill(loaded, plan, ids[rows])
    ours, theirs = (loaded.model(token, past_key_values=each).logits for each in (cache, expected))
    assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    cache.reorder_cache(torch.tensor([3, 2, 1, 0]))
    expected.reset()
    text_of = torch.cat([ids[rows], token], 1)[[3, 2, 1, 0]]
    loaded.model(text_of[:, :-1], past_key_values=expected)
    loaded.model(text_of[:, -1:], past_key_values=expected)
    ours, theirs = (loaded.model(token, past_key_values=each).logits for each in (cache, expected))
    assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    assert cache.nbytes <= 4 * plan.bytes_per_sequence


@every_mixed_family
def test_every_allocation_finds_a_plan_in_the_profile_and_stays_within_its_bytes(family: str) -> None:
    loaded, _ = model_pair(family)
    profile = measure_profile(loaded, [text()])
    tokens = CONTEXT + CONTINUATION
    prefilled = prefill_window(loaded, text(), [HeavyHitter()])
    for name in METHODS:
        eviction = HeavyHitter(eviction_interval=4)
        plan = allocate(profile, budget=0.8, context_length=tokens, method=METHODS[name](), eviction=eviction)
        assert plan.ratio <= 0.8
        assert score_plan(loaded, prefilled, plan).allocated_bytes <= plan.bytes_per_sequence


@pytest.mark.parametrize("family", ["gemma3", "gemma4 shared", "gpt_oss", "qwen3_next", "lfm2"])
def test_a_plan_that_covers_the_text_answers_as_the_full_cache_does(family: str) -> None:
    config, fields = FAMILIES[family]
    loaded = LoadedModel.of(tiny_model(config(**(SHAPE | fields | {"vocab_size": 128}))), byte_tokenizer())
    questions = (Question(" What is first?", " one!"), Question(" What is last?", " twelve!"))
    prompt = Prompt(
        "p", "a list: one two three four five six seven eight nine ten eleven twelve, and so on.", questions
    )
    plan = full_cache_plan(loaded.identity, loaded.geometry, 130, bits=32)
    result = Evaluator(loaded, [plan]).evaluate_prompt("task", prompt)
    for ours, theirs in zip(result.plans[0].answers, result.full, strict=True):
        assert ours.nll == pytest.approx(theirs.nll, abs=1e-4)
    assert result.plans[0].allocated_bytes <= plan.bytes_per_sequence
    assert len(result.closed_book) == 2


@every_mixed_family
def test_continuations_are_scored_as_they_decode(family: str) -> None:
    loaded, _ = model_pair(family)
    plan, window = tight_plan(loaded, EVICTIONS[1]), text()
    scored = score_continuations(loaded, plan, window.ids[:CONTEXT], [window.ids[CONTEXT:], window.ids[:3]])
    nll, _ = slow_score(loaded, window, plan)
    assert scored[0].log_prob == pytest.approx(-nll * CONTINUATION, abs=2e-3)
