from collections.abc import Callable
from pathlib import Path

import pytest

from baklava.allocation import Baklava, Blended, DuoAttention, PyramidKV, Uniform
from baklava.allocation.plan_spec import PlanSpec, check_plan, parse_spec, resolve_plan
from baklava.cache import attention
from baklava.errors import UserError
from baklava.eviction import HeavyHitter, StreamingLLM
from baklava.plan.budget_plan import full_cache_plan
from baklava.profiling.profile import uniform_profile
from baklava.runtime.model_loader import LoadedModel

WITH_SEMICOLON = PlanSpec(PyramidKV(steepness=0.5), HeavyHitter(recent_ratio=0.3, eviction_interval=16), (3, 3), 0.2)


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("uniform:0.3", PlanSpec(Uniform(), StreamingLLM(), (16, 16), 0.3)),
        ("baklava+heavy_hitter@k4v2:0.3", PlanSpec(Baklava(), HeavyHitter(), (4, 2), 0.3)),
        ("baklava+heavy_hitter@k4v2:30%", PlanSpec(Baklava(), HeavyHitter(), (4, 2), 0.3)),
        ("baklava()@8:1", PlanSpec(Baklava(), StreamingLLM(), (8, 8), 1.0)),
        (
            "blended(curve_power=0.5, bits=curves)"
            "+heavy_hitter(recent_ratio=6e-1,power=2,residual_length=8)@k4v2:0.125",
            PlanSpec(
                Blended(curve_power=0.5, bits="curves"),
                HeavyHitter(recent_ratio=0.6, power=2, residual_length=8),
                (4, 2),
                0.125,
            ),
        ),
        ("blended(layer_power=-1e+0):.5", PlanSpec(Blended(layer_power=-1.0), StreamingLLM(), (16, 16), 0.5)),
        ("pyramidkv(steepness=0.5)+heavy_hitter(recent_ratio=0.3;eviction_interval=16)@3:0.2", WITH_SEMICOLON),
        (
            "duo_attention(tokens=64)+streaming_llm(sinks=8):0.5",
            PlanSpec(DuoAttention(tokens=64), StreamingLLM(sinks=8), (16, 16), 0.5),
        ),
    ],
)
def test_a_spec_names_method_parameters_eviction_bits_and_budget(text: str, spec: PlanSpec) -> None:
    assert parse_spec(text) == spec


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("pagoda:0.3", "unknown allocation method 'pagoda'; choose one of uniform, baklava"),
        ("uniform+pagoda:0.3", "unknown eviction method 'pagoda'; choose one of streaming_llm"),
        ("duo_attention(token=3):0.3", "parameter 'token' of duo_attention is unknown; its parameters are tokens"),
        ("uniform(floor=1):0.3", "parameter 'floor' of uniform is unknown; its parameters are none"),
        ("duo_attention(tokens=3,tokens=4):0.3", "parameter 'tokens' of duo_attention is repeated"),
        ("duo_attention(tokens=3.5):0.3", r"duo_attention\(tokens=3.5\): '3.5' is not an integer"),
        ("duo_attention(tokens):0.3", r"duo_attention\(tokens\): '' is not an integer"),
        ("pyramidkv(steepness=nan):0.3", "'nan' is not a number"),
        ("greedy(measure=applause):0.3", "'applause' is not one of text, repetition, error"),
        ("blended(bits=any):0.3", "'any' is not one of fixed, curves"),
        ("uniform+heavy_hitter(power=3):0.3", "'3' is not one of 1, 2"),
        ("uniform+heavy_hitter(residual_length=yes):0.3", "'yes' is not an integer"),
        ("baklava(floor=2):0.3", "floor within"),
        ("uniform@7:0.3", "bits '7' are not supported"),
        ("uniform:much", "budget 'much' is not a share of the bytes; write uniform:0.3 or uniform:30%"),
        ("uniform:", "budget '' is not a share of the bytes; write uniform:0.3"),
        ("uniform:30", "budget 30.0 must be above 0 and at most 1"),
        ("duo_attention(tokens=4)@4", r"a method without a budget; write duo_attention\(tokens=4\)@4:0.3"),
        ("best plan:0.3", "cannot be parsed"),
        ("duo_attention(tokens=3:0.3", "cannot be parsed; write METHOD:BUDGET"),
        ("models:/demo@champion", "unknown allocation method .models."),
    ],
)
def test_an_invalid_spec_is_one_sentence(text: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        parse_spec(text)


def test_a_plan_is_made_as_its_spec_says(tiny: Callable[..., LoadedModel]) -> None:
    loaded = tiny()
    name = "duo_attention(tokens=64)+heavy_hitter(recent_ratio=0.3)@k4v2:0.25"
    plan = resolve_plan(name, loaded, 2000, lambda: uniform_profile(loaded.identity, loaded.geometry)).plan
    assert plan.allocation.params == {"tokens": 64}
    assert plan.eviction == HeavyHitter(recent_ratio=0.3).config
    assert {bits for layer in plan.layers if layer for bits in (*layer.key_bits, *layer.value_bits)} == {2, 4}
    assert plan.ratio <= 0.25


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("pagoda:0.3", "unknown allocation method"),
        ("pagoda", "cannot read plan pagoda"),
        ("pagoda.json", "cannot read plan pagoda.json"),
        ("models:/pagoda@champion", "there is no tracking database"),
        ("wide.json", "the plan was made for tiny"),
    ],
)
def test_a_misspelt_plan_is_refused_without_the_model(
    spec: str, said: str, tiny: Callable[..., LoadedModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/none.db")
    loaded = tiny()
    full_cache_plan(loaded.identity, loaded.geometry, 64).write(tmp_path / "narrow.json")
    other = loaded.identity.model_copy(update={"config_hash": "0"})
    full_cache_plan(other, loaded.geometry, 64).write(tmp_path / "wide.json")
    for right in ("full", "uniform:0.3", "narrow.json"):
        check_plan(right, loaded.identity, loaded.geometry)
    with pytest.raises(UserError, match=said):
        check_plan(spec, loaded.identity, loaded.geometry)


def test_a_method_that_predicts_needs_a_profile_whatever_spreads_the_bytes(tiny: Callable[..., LoadedModel]) -> None:
    loaded, spec = tiny(), "uniform+kvzap(eviction_interval=4)@16:0.5"
    with pytest.raises(UserError, match="needs a profile"):
        resolve_plan(spec, loaded, 200)
    with pytest.raises(UserError, match="no score predictors"):
        resolve_plan(spec, loaded, 200, lambda: uniform_profile(loaded.identity, loaded.geometry))


def test_a_plan_that_does_not_suit_the_model_is_refused_before_it_is_used(
    tiny: Callable[..., LoadedModel], tmp_path: Path
) -> None:
    loaded, spec = tiny(), "uniform+attention_matching(eviction_interval=4)@16:0.5"
    resolve_plan(spec, loaded, 200).plan.write(tmp_path / "plan.json")
    attention.register_rotary_shift(loaded.model.model.layers[0].self_attn, None)
    for name in (spec, str(tmp_path / "plan.json")):
        with pytest.raises(UserError, match="another eviction method"):
            resolve_plan(name, loaded, 200)
