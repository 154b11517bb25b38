from collections.abc import Callable

import pytest

from baklava.allocation import Baklava, Blended, Duo, Pyramid, Uniform
from baklava.allocation.plan_spec import Spec, bits_name, named_plan, pair_of, spec_of
from baklava.errors import UserError
from baklava.eviction import HeavyHitter, Streaming
from baklava.profiling.profile import flat_profile
from baklava.runtime.model_loader import LoadedModel

PARTED = Spec(Pyramid(steepness=0.5), HeavyHitter(recent=0.3, interval=16), (3, 3), 0.2)


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("uniform:0.3", Spec(Uniform(), Streaming(), (16, 16), 0.3)),
        ("uniform", Spec(Uniform(), Streaming(), (16, 16), None)),
        ("baklava+heavy_hitter@k4v2:0.3", Spec(Baklava(), HeavyHitter(), (4, 2), 0.3)),
        ("baklava()@8:1", Spec(Baklava(), Streaming(), (8, 8), 1.0)),
        (
            "blended(curve_power=0.5, bits=curves)+heavy_hitter(recent=6e-1,power=2,staged=true)@k4v2:0.125",
            Spec(Blended(curve_power=0.5, bits="curves"), HeavyHitter(recent=0.6, power=2, staged=True), (4, 2), 0.125),
        ),
        ("blended(layer_power=-1e+0):.5", Spec(Blended(layer_power=-1.0), Streaming(), (16, 16), 0.5)),
        ("pyramid(steepness=0.5)+heavy_hitter(recent=0.3;interval=16)@3:0.2", PARTED),
        ("duo(tokens=64)+streaming(sinks=8):0.5", Spec(Duo(tokens=64), Streaming(sinks=8), (16, 16), 0.5)),
    ],
)
def test_a_name_says_method_knobs_eviction_bits_and_budget(text: str, spec: Spec) -> None:
    assert spec_of(text) == spec


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("pagoda:0.3", "unknown allocation method 'pagoda'; choose one of uniform, baklava"),
        ("uniform+pagoda:0.3", "unknown eviction method 'pagoda'; choose one of streaming"),
        ("duo(token=3):0.3", "knob 'token' of duo is unknown; it has tokens"),
        ("uniform(floor=1):0.3", "knob 'floor' of uniform is unknown; it has none"),
        ("duo(tokens=3,tokens=4):0.3", "knob 'tokens' of duo is given twice"),
        ("duo(tokens=3.5):0.3", r"duo\(tokens=3.5\): '3.5' is not a whole number"),
        ("duo(tokens):0.3", r"duo\(tokens\): '' is not a whole number"),
        ("pyramid(steepness=nan):0.3", "'nan' is not a number"),
        ("greedy(measure=applause):0.3", "'applause' is not one of text, repetition, error"),
        ("blended(bits=any):0.3", "'any' is not one of given, curves"),
        ("uniform+heavy_hitter(power=3):0.3", "'3' is not one of 1, 2"),
        ("uniform+heavy_hitter(staged=yes):0.3", "'yes' is not one of true, false"),
        ("baklava(floor=2):0.3", "floor within"),
        ("uniform@7:0.3", "bits '7' are not stored"),
        ("uniform:much", "budget 'much' is not a number; write uniform:0.3"),
        ("uniform:", "budget '' is not a number; write uniform:0.3"),
        ("best plan:0.3", "cannot be read"),
        ("duo(tokens=3:0.3", "cannot be read; write METHOD:BUDGET"),
        ("models:/demo@champion", "unknown allocation method .models."),
    ],
)
def test_a_name_that_cannot_be_read_is_one_sentence(text: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        spec_of(text)


@pytest.mark.parametrize("name", ["16", "k4v2", "3"])
def test_bits_are_named_as_they_are_read(name: str) -> None:
    assert bits_name(pair_of(name)) == name


def test_a_plan_is_made_of_what_its_name_says(tiny: Callable[..., LoadedModel]) -> None:
    loaded = tiny()
    name = "duo(tokens=64)+heavy_hitter(recent=0.3)@k4v2:0.25"
    plan = named_plan(name, loaded, 2000, lambda: flat_profile(loaded.identity, loaded.geometry)).plan
    assert plan.allocation.knobs == {"tokens": 64}
    assert plan.eviction == HeavyHitter(recent=0.3).choice
    assert {bits for layer in plan.layers if layer for bits in (*layer.key_bits, *layer.value_bits)} == {2, 4}
    assert plan.ratio <= 0.25


def test_a_name_without_a_budget_is_told_how_to_give_one(tiny: Callable[..., LoadedModel]) -> None:
    with pytest.raises(UserError, match=r"names a method without a budget; write duo\(tokens=4\)@4:0.3"):
        named_plan("duo(tokens=4)@4", tiny(), 2000, lambda: pytest.fail("no profile"))
