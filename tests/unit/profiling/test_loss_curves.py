"""Loss curves and rankings of a profile, against their definitions."""

from collections.abc import Callable

import pytest
import torch
from model_families import model_pair
from plan_factory import random_ids
from torch import Tensor

from baklava.cache.attention import attend_values, attention_probs
from baklava.data.windows import Window
from baklava.eviction import HeavyHitter
from baklava.plan.geometry import CacheGeometry
from baklava.profiling.loss_curves import (
    QUERY_STRIDE,
    CurveGrid,
    LayerTrace,
    RetainedSet,
    RetentionModel,
    attention_output,
    layer_losses,
    trace_layers,
)
from baklava.profiling.profiler import build_ranking, measure_profile
from baklava.runtime.model_loader import LoadedModel
from baklava.runtime.prefill import prefill_and_record

Maker = Callable[..., LoadedModel]
CONTEXT, CONTINUATION = 60, 24


def traces_of(loaded: LoadedModel, ids: Tensor, draws: int = 1) -> list[LayerTrace]:
    recording = prefill_and_record(loaded, ids[:, :CONTEXT], ()).recording
    passes = [trace_layers(loaded, recording, ids[:, CONTEXT:], seed) for seed in range(draws)]
    return [
        LayerTrace(first.query, first.key, first.value, torch.cat([p[i].gradient for p in passes]), first.params)
        for i, first in enumerate(passes[0])
    ]


def test_a_continuation_attends_as_the_model_does_and_leaves_no_gradients(tiny: Maker) -> None:
    loaded, ids = tiny(), random_ids(1, CONTEXT + CONTINUATION)
    layer = traces_of(loaded, ids)[0]
    weights = layer.weights(0, layer.key[0], 1)
    assert weights.unnormalized.shape == (2, CONTINUATION, CONTEXT + CONTINUATION)
    assert int((weights.unnormalized[0, 0] > 0).sum()) <= CONTEXT + 1
    assert all(parameter.grad is None and parameter.requires_grad for parameter in loaded.model.parameters())


def test_a_head_that_keeps_everything_loses_nothing_and_fewer_entries_lose_more(tiny: Maker) -> None:
    loaded, ids = tiny(), random_ids(1, CONTEXT + CONTINUATION)
    layer = traces_of(loaded, ids)[1]
    eviction = HeavyHitter(sinks=2, eviction_interval=2)
    scores = torch.rand(2, CONTEXT, generator=torch.Generator().manual_seed(0))
    grid = CurveGrid(eviction, (12, 40, 200), ((16, 16), (4, 4), (2, 2)))
    kl, error = layer_losses(layer, scores, grid)
    assert kl[:, 0, 2].max() < 1e-9
    assert error[:, 0, 2].max() < 1e-4
    for losses in (kl, error):
        assert (losses[:, 0, 0] > losses[:, 0, 1]).all()
        assert (losses[:, 0, 2] < losses[:, 1, 2]).all()
        assert (losses[:, 1, 2] < losses[:, 2, 2]).all()


def test_a_head_is_modelled_to_keep_sinks_the_best_and_the_newest() -> None:
    context, entries, capacity = 20, 30, 12
    order = torch.randperm(context, generator=torch.Generator().manual_seed(1))
    queries = torch.arange(context, entries)
    scores = torch.empty(context).scatter_(0, order, torch.arange(context, 0, -1.0))
    mask = RetentionModel(scores, queries, HeavyHitter(sinks=2, recent_ratio=0.5, eviction_interval=2)).mask(
        capacity, entries
    )
    newest, quota = int(0.5 * (capacity - 2 - 2)) + 1, capacity - 2 - 5 - 1
    for row, query in enumerate(queries.tolist()):
        competing = [p for p in [*order.tolist(), *range(context, entries)] if 2 <= p <= query - newest]
        held = {0, 1, *competing[:quota], *range(query - newest + 1, query + 1)}
        assert set(mask[row].nonzero()[:, 0].tolist()) == held
        assert len(held) == capacity - 1


def test_a_head_large_enough_for_all_is_modelled_to_keep_all() -> None:
    queries = torch.arange(20, 30)
    mask = RetentionModel(torch.arange(20.0), queries, HeavyHitter(sinks=2, eviction_interval=2)).mask(30, 30)
    assert torch.equal(mask, torch.arange(30) <= queries[:, None])


def test_centroids_lower_the_curves_where_entries_are_evicted_and_nowhere_else(tiny: Maker) -> None:
    loaded, ids = tiny(), random_ids(1, CONTEXT + CONTINUATION)
    layer, scores = traces_of(loaded, ids)[1], torch.rand(2, CONTEXT, generator=torch.Generator().manual_seed(0))
    errors = []
    for centroids in (0, 4):
        grid = CurveGrid(HeavyHitter(sinks=2, eviction_interval=2, centroids=centroids), (12, 200), ((16, 16),))
        errors.append(layer_losses(layer, scores, grid)[1][:, 0])
    assert float(errors[1][:, 0].mean()) < float(errors[0][:, 0].mean())
    assert torch.equal(errors[0][:, 1], errors[1][:, 1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_models_in_half_precision_have_curves_too(tiny: Maker, dtype: torch.dtype) -> None:
    loaded = tiny()
    scores = torch.rand(2, CONTEXT, generator=torch.Generator().manual_seed(0))
    grid = CurveGrid(HeavyHitter(sinks=2, eviction_interval=2, centroids=4), (12, 40), ((16, 16), (4, 4)))
    exact, _ = layer_losses(traces_of(loaded, random_ids(1, CONTEXT + CONTINUATION))[1], scores, grid)
    half = LoadedModel.of(loaded.model.to(dtype), tokenizer=None, id="half")
    found, _ = layer_losses(traces_of(half, random_ids(1, CONTEXT + CONTINUATION))[1], scores, grid)
    assert bool(found.isfinite().all())
    assert float((found.log() - exact.log()).abs().mean()) < 1


def test_the_loss_of_a_pair_is_that_of_keys_and_values_together() -> None:
    grid = CurveGrid(HeavyHitter(), (10,), ((16, 16), (8, 4), (4, 4)))
    keys, values = torch.tensor([[[1.0], [1.5], [3.0]]]), torch.tensor([[[1.0], [2.0]]])
    assert (grid.key_bits, grid.value_bits) == ((16, 8, 4), (16, 4))
    assert grid.combine(keys, values)[0, :, 0].tolist() == [1.0, 2.5, 4.0]


@pytest.mark.slow
def test_the_predicted_loss_is_the_kl_that_a_small_error_makes(tiny: Maker) -> None:
    """Second order is exact for small errors: a head is pushed a little at one token, and the KL is measured."""
    loaded, ids = tiny(), random_ids(1, CONTEXT + CONTINUATION)
    layer, row = traces_of(loaded, ids, draws=400)[1], 7
    push = 0.05 * torch.randn(2, 8, generator=torch.Generator().manual_seed(2))
    predicted = (layer.gradient[:, 0, :, row] * push).sum((1, 2)).square().mean() / 2

    def pushed(module: torch.nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        output = args[0].clone()
        output[:, CONTEXT + row, :16] += push.flatten()
        return (output,)

    with torch.no_grad():
        full = loaded.model(ids).logits[0, CONTEXT:].log_softmax(-1)
        hook = loaded.model.model.layers[1].self_attn.o_proj.register_forward_pre_hook(pushed)
        other = loaded.model(ids).logits[0, CONTEXT:].log_softmax(-1)
        hook.remove()
    measured = (full.exp() * (full - other)).sum()
    assert float(predicted) == pytest.approx(float(measured), rel=0.25)


def test_a_ranking_omits_the_sinks_and_falls_with_the_rank() -> None:
    scores = torch.rand(2, 50, generator=torch.Generator().manual_seed(0))
    scores[:, :4] = 9.0
    geometry = CacheGeometry(layers=1, kv_heads=2, query_group=1, head_dim=8, windows=(None,))
    found = build_ranking([[scores]], 4, geometry)
    assert found.tokens == 46
    assert found.ranks[0] == 1
    assert found.ranks[-1] == 46
    head = found.scores[0][0][1]
    assert head[0] == pytest.approx(float(scores[1, 4:].max().log()), abs=1e-3)
    assert list(head) == sorted(head, reverse=True)


@pytest.mark.parametrize("family", ["gemma2", "gpt_oss"])
def test_softcaps_and_learned_sinks_are_part_of_the_attention_that_is_measured(family: str) -> None:
    loaded, _ = model_pair(family)
    layers = traces_of(loaded, random_ids(1, CONTEXT + CONTINUATION))
    assert len(layers) == len(loaded.geometry.full_attention_layers)
    for layer in layers:
        at = torch.arange(CONTEXT, CONTEXT + CONTINUATION)[::QUERY_STRIDE]
        visible = at[:, None] >= torch.arange(CONTEXT + CONTINUATION)
        probs = attention_probs(
            layer.query[None, :, :, ::QUERY_STRIDE], layer.key[None], visible[None, None], layer.params
        )
        expected = attend_values(probs, layer.value[None])[0]
        for head in range(2):
            weights = layer.weights(head, layer.key[head], QUERY_STRIDE)
            found = attention_output(layer, head, weights, layer.value[head], RetainedSet(visible, None))
            torch.testing.assert_close(found, expected[head], atol=1e-5, rtol=1e-4)


def test_layers_that_slide_have_importance_only() -> None:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        use_sliding_window=True,
        sliding_window=16,
        layer_types=["full_attention", "sliding_attention"],
    )
    loaded = LoadedModel.of(Qwen2ForCausalLM(config).eval(), tokenizer=None, id="sliding")
    ids = tuple(random_ids(1, 40)[0].tolist())
    measured = measure_profile(loaded, [Window("w", "d", ids, 30)])
    assert measured.curves is not None
    for layers in (*measured.curves.losses.values(), *(ranking.scores[0] for ranking in measured.rankings.values())):
        assert [len(layer) for layer in layers] == [2, 0]
    assert len(measured.importance["value"]) == 2
