from collections.abc import Callable

import pytest
import torch
from plan_factory import make_plan, random_ids

from baklava.cache.budgeted_cache import BudgetedCache
from baklava.cache.rotary_shift import RotaryShift
from baklava.cache.score_predictor import PredictorFit, ScorePredictor, entry_features, mix_orders
from baklava.errors import UserError
from baklava.eviction import AttentionMatching, KVzap
from baklava.plan.budget_plan import BudgetPlan
from baklava.runtime.model_loader import LoadedModel
from baklava.runtime.prefill import compress, prefill_and_record

FULL = RotaryShift(1 / 100.0 ** (torch.arange(0, 16, 2).double() / 16))


def states(tokens: int, seed: int) -> torch.Tensor:
    return torch.randn(1, 2, tokens, 16, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    "rotary",
    [FULL, RotaryShift(FULL.frequencies, True), RotaryShift(FULL.frequencies[:3]), RotaryShift(torch.empty(0))],
)
def test_what_is_predicted_from_does_not_depend_on_positions(rotary: RotaryShift) -> None:
    key, value = states(9, 0), states(9, 1)
    moved = rotary.shift(key, torch.arange(100, 109)[None])
    ours, theirs = (entry_features(each, value, rotary) for each in (key, moved))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    other = entry_features(states(9, 2), value, rotary)
    assert (ours - other).abs().amax() > 0.1


def test_a_fit_finds_what_decides_and_keeps_the_order_in_a_plan() -> None:
    weights = torch.randn(2, entry_features(states(1, 0), states(1, 0), FULL).shape[2])
    fit = PredictorFit()
    for seed in range(3):
        key, value = states(500, seed), states(500, 10 + seed)
        fit.add(
            entry_features(key, value, FULL)[0], ScorePredictor(weights).predict(key, value, FULL)[0].mul(0.1).exp()
        )
    predictor = fit.solve()
    key, value = states(300, 20), states(300, 21)
    expected = ScorePredictor(weights).predict(key, value, FULL)
    for each in (predictor, ScorePredictor.decode(predictor.encode())):
        found = each.predict(key, value, FULL)
        ranks = [scores.argsort(2).argsort(2).double().flatten(0, 1) for scores in (expected, found)]
        assert all(torch.corrcoef(torch.stack(pair))[0, 1] > 0.99 for pair in zip(*ranks, strict=True))


def test_the_share_decides_between_both_orders_and_scores_stay_the_same_numbers() -> None:
    scores, predicted = torch.rand(1, 2, 40), torch.rand(1, 2, 40)
    real = torch.arange(40)[None, None] >= 3
    scores[:, :, :3] = 0.0
    for share, same in ((1.0, predicted), (0.01, scores)):
        ordered = mix_orders(scores, predicted, share, real)
        assert torch.equal(ordered.sort(2).values[:, :, 3:], scores.sort(2).values[:, :, 3:])
        assert (ordered[:, :, :3] < ordered[:, :, 3:].amin(2, keepdim=True)).all()
        assert torch.equal(ordered[:, :, 3:].argsort(2), same[:, :, 3:].argsort(2))


def test_padding_changes_the_order_of_no_row() -> None:
    scores, predicted = torch.rand(1, 2, 40), torch.randn(1, 2, 40)
    pads = torch.full((1, 2, 60), 0.0)
    padded = [torch.cat([pads, each], 2) for each in (scores, predicted)]
    alone = mix_orders(scores, predicted, 0.5, torch.ones(1, 1, 40, dtype=torch.bool))
    beside = mix_orders(*padded, 0.5, torch.arange(100)[None, None] >= 60)
    assert torch.equal(alone.argsort(2), beside[:, :, 60:].argsort(2))


def test_a_decoded_predictor_may_be_used_with_gradients_and_under_autocast() -> None:
    weights = torch.randn(2, entry_features(states(1, 0), states(1, 0), FULL).shape[2])
    encoded = ScorePredictor(weights).encode()
    with torch.inference_mode():
        ScorePredictor.decode(encoded)  # it is kept for others
    key = states(9, 0).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        predicted = ScorePredictor.decode(encoded).predict(key, states(9, 1), FULL)
    assert predicted.dtype == torch.float32
    assert not predicted.requires_grad
    with pytest.raises(UserError, match="weights for entries of"):
        ScorePredictor(weights[:, 1:]).predict(key, states(9, 1), FULL)


@torch.inference_mode()
def test_a_share_changes_what_is_kept_and_needs_no_recording_of_its_own(tiny: Callable[..., LoadedModel]) -> None:
    loaded, shared = tiny(), {"sinks": 2, "eviction_interval": 4, "references": 16, "distance": 3}
    prompt = prefill_and_record(loaded, random_ids(1, 90), [AttentionMatching(**shared)])
    kept = []
    for eviction in (AttentionMatching(**shared), KVzap(**shared, share=0.5), KVzap(**shared, share=1.0)):
        cache, _ = compress(loaded, prompt, make_plan(loaded, [[20, 40], [28, 64]], eviction))
        kept.append([layer.cached_positions(head, 0).tolist() for layer in cache.budgeted_layers for head in range(2)])
    assert kept[0] != kept[1] != kept[2] != kept[0]


def test_a_plan_without_what_its_method_needs_is_refused(tiny: Callable[..., LoadedModel]) -> None:
    plan = make_plan(tiny(), [[20, 40], [28, 64]], KVzap(sinks=2, eviction_interval=4))
    with pytest.raises(UserError, match="has none; give the unchanged plan"):
        BudgetedCache(plan.model_copy(update={"score_predictors": None}))
    for broken in (
        plan.score_predictors[:1],
        (("00",), plan.score_predictors[1]),
        (plan.score_predictors[0], ("zz" * 2,) * 2),
        (plan.score_predictors[0], ("003c" + "007e",) * 2),  # 1, NaN
        (plan.score_predictors[0], ("00fc",) * 2),  # minus infinity
    ):
        with pytest.raises(ValueError, match="score_predictors"):
            BudgetPlan.model_validate({**plan.model_dump(), "score_predictors": broken})
