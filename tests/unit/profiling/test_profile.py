from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from model_families import SHAPE, tiny_model
from torch.nn.functional import cosine_similarity
from transformers import Cohere2Config, GPTNeoXConfig, Olmo2Config

from baklava.allocation import Allocation, Blended, allocate
from baklava.cache.score_predictor import ScorePredictor
from baklava.data.windows import Window
from baklava.errors import UserError
from baklava.eviction import KVzap, KVzip, StreamingLLM
from baklava.plan.budget_plan import BudgetPlan
from baklava.profiling import profiler
from baklava.profiling.profile import Profile, uniform_profile
from baklava.profiling.profiler import cached_profile, measure_profile
from baklava.runtime.model_loader import LoadedModel
from baklava.runtime.prefill import prefill_and_record

Maker = Callable[..., LoadedModel]


def windows(count: int, tokens: int = 20) -> list[Window]:
    draw = torch.Generator().manual_seed(3)
    return [
        Window(f"w{i}", f"d{i}", tuple(torch.randint(1, 64, (tokens,), generator=draw).tolist()), tokens - 5)
        for i in range(count)
    ]


def test_importance_is_one_minus_the_mean_cosine_of_a_heads_input_and_output(tiny: Maker) -> None:
    loaded, cut = tiny(), windows(2)
    measured = measure_profile(loaded, cut)
    layer = loaded.model.model.layers[0]
    similar = []
    for window in cut:
        hidden = layer.input_layernorm(loaded.model.model.embed_tokens(torch.tensor([window.ids])))
        seen: list[torch.Tensor] = []
        hook = layer.self_attn.o_proj.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
        loaded.model(torch.tensor([window.ids]), use_cache=False)
        hook.remove()
        output = seen[0].view(20, 4, 8)
        value = layer.self_attn.v_proj(hidden).view(20, 2, 8).repeat_interleave(2, 1)
        similar.append(cosine_similarity(value, output, dim=-1))
    expected = 1 - torch.cat(similar).mean(0)
    assert measured.importance["value"][0] == pytest.approx(expected.tolist(), abs=1e-5)


def test_a_changed_copy_has_a_digest_of_its_own(tiny: Maker) -> None:
    loaded = tiny()
    profile = uniform_profile(loaded.identity, loaded.geometry)
    digest = profile.digest
    assert profile.model_copy().digest == digest
    assert profile.model_copy(update={"windows": "others"}).digest != digest


def test_key_channels_are_ordered_by_what_they_add_to_the_logits(tiny: Maker) -> None:
    loaded = tiny(head_dim=32)
    attention = loaded.model.model.layers[1].self_attn
    loud = 5, 21  # a pair that rotary embedding turns into each other
    with torch.no_grad():
        attention.k_proj.weight.view(2, 32, -1)[0, loud] *= 20
    measured = measure_profile(loaded, windows(2))
    assert measured.key_channels is not None
    assert {int(measured.key_channels[1][0][i : i + 2], 16) for i in (0, 2)} == set(loud)
    assert sorted(bytes.fromhex(measured.key_channels[0][1])) == list(range(32))
    assert plan_of(Blended(), measured).key_channels == measured.key_channels
    assert measure_profile(tiny(head_dim=8), windows(1)).key_channels is None


def test_scores_are_predicted_by_what_the_repetition_looked_at(tiny: Maker) -> None:
    loaded, cut = tiny(), windows(2, tokens=150)
    measured = measure_profile(loaded, cut)
    assert measured.score_predictors is not None
    plan = allocate(measured, budget=0.5, context_length=150, method=Blended(), eviction=KVzap(eviction_interval=4))
    assert plan.score_predictors == measured.score_predictors
    assert plan_of(Blended(), measured).score_predictors is None
    with pytest.raises(UserError, match="no score predictors"):
        allocate(
            measured.model_copy(update={"score_predictors": None}),
            budget=0.5,
            context_length=150,
            method=Blended(),
            eviction=KVzap(eviction_interval=4),
        )
    context = loaded.as_batch(cut[0].ids[: cut[0].context_length])
    recording = prefill_and_record(loaded, context, [KVzip()]).recording
    for index, heads in enumerate(measured.score_predictors):
        assert heads is not None
        rotary = recording.rotary_shifts[index]
        assert rotary is not None
        predicted = ScorePredictor.decode(heads).predict(recording.keys[index], recording.values[index], rotary)
        pairs = torch.stack([predicted, recording.reconstruction[index].log()])[..., 4:].flatten(1)
        assert torch.corrcoef(pairs)[0, 1] > 0.3


def test_layer_importance_compares_the_hidden_state_before_and_after_attention(tiny: Maker) -> None:
    loaded, cut = tiny(), windows(1)
    layer = loaded.model.model.layers[0]
    before = loaded.model.model.embed_tokens(torch.tensor([cut[0].ids]))
    after: list[torch.Tensor] = []
    hook = layer.post_attention_layernorm.register_forward_pre_hook(lambda _, args: after.append(args[0].detach()))
    measured = measure_profile(loaded, cut)
    hook.remove()
    expected = 1 - cosine_similarity(before.detach(), after[0], dim=-1).mean()
    assert measured.layer_importance[0] == pytest.approx(expected.item(), abs=1e-5)


def test_a_window_costs_a_forward_a_prefill_its_repetition_and_two_continuations(tiny: Maker) -> None:
    loaded, calls = tiny(), []
    hook = loaded.model.register_forward_hook(lambda *_: calls.append(1))
    measured = measure_profile(loaded, windows(3))
    hook.remove()
    assert len(calls) == 3 * 5
    assert set(measured.importance) == {"value", "key", "query", "hidden"}
    for grid in measured.importance.values():
        assert all(0 <= importance <= 2 for row in grid for importance in row)


def test_the_hidden_slice_is_left_out_if_heads_do_not_divide_it(tiny: Maker) -> None:
    assert "hidden" not in measure_profile(tiny(hidden_size=48), windows(1)).importance


def test_a_model_of_one_query_head_is_profiled(tiny: Maker) -> None:
    measured = measure_profile(tiny(kv_heads=1, group=1), windows(1))
    assert [len(row) for row in measured.importance["value"]] == [1, 1]


@pytest.mark.parametrize("config", [Olmo2Config, Cohere2Config, GPTNeoXConfig])
def test_a_model_of_other_norms_has_the_layer_importance_of_its_sum(config: Any) -> None:
    loaded = LoadedModel.of(tiny_model(config(**SHAPE)))
    measured = measure_profile(loaded, windows(1))
    assert len(measured.layer_importance) == 4
    assert all(0 < importance < 2 for importance in measured.layer_importance)


def test_profiling_removes_its_hooks_even_if_it_fails(tiny: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise IndexError

    loaded = tiny()
    measure_profile(loaded, windows(1))
    monkeypatch.setattr(loaded.model.lm_head, "forward", fail)
    with pytest.raises(IndexError):
        measure_profile(loaded, windows(1))
    modules = loaded.model.modules()
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in modules)


def test_a_context_too_long_to_repeat_is_measured_without_repetition(tiny: Maker) -> None:
    whole = measure_profile(tiny(max_position_embeddings=190), windows(1, tokens=100))
    short = measure_profile(tiny(max_position_embeddings=189), windows(1, tokens=100))
    assert whole.curves is not None
    assert short.curves is not None
    assert short.rankings == {"heavy_hitter": whole.rankings["heavy_hitter"]}
    assert whole.curves.losses.keys() - short.curves.losses.keys() == {"repetition"}
    assert short.curves.losses["text"] == whole.curves.losses["text"]
    plan_of(Blended(reconstruction_power=0, curve_power=1), short)
    with pytest.raises(UserError, match=r"no reconstruction ranking, .* choose another method, or a lower --context"):
        plan_of(Blended(), short)


def plan_of(method: Allocation, measured: Profile) -> BudgetPlan:
    return allocate(measured, budget=0.9, context_length=200, method=method, eviction=StreamingLLM())


def test_a_context_that_is_all_sinks_is_refused(tiny: Maker) -> None:
    with pytest.raises(UserError, match=r"a context of 4 tokens is all sinks.*; raise --context"):
        measure_profile(tiny(), windows(1, tokens=9))


def test_a_profile_is_measured_once_and_read_back_equal(
    tiny: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BAKLAVA_CACHE", str(tmp_path))
    loaded = tiny()
    first = cached_profile(loaded, windows(1))
    loaded.model.forward = None
    assert cached_profile(loaded, windows(1)) == first
    [file] = (tmp_path / "profiles").iterdir()
    for content in (b"{", b"\xff\xfe\x80"):
        file.write_bytes(content)
        with pytest.raises(UserError, match="remove it and profile again"):
            Profile.read(file)


@pytest.mark.parametrize("unusable", ["file", "broken"])
def test_a_cache_that_cannot_be_used_costs_a_warning_and_no_profile(
    tiny: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], unusable: str
) -> None:
    monkeypatch.setenv("BAKLAVA_CACHE", str(tmp_path))
    loaded = tiny()
    if unusable == "file":
        (tmp_path / "profiles").touch()
        expected = "cannot be written"
    else:
        cached_profile(loaded, windows(1))
        next((tmp_path / "profiles").iterdir()).write_text("{")
        expected = "cannot be read, so the model is profiled again"
    capsys.readouterr()
    assert cached_profile(loaded, windows(1)) == measure_profile(loaded, windows(1))
    assert [expected in line for line in capsys.readouterr().err.splitlines() if "warning" in line] == [True]


def test_ctrl_c_while_profiling_says_that_nothing_is_kept(
    tiny: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setenv("BAKLAVA_CACHE", str(tmp_path))
    loaded = tiny()
    loaded.model.forward = interrupt
    with pytest.raises(KeyboardInterrupt):
        cached_profile(loaded, windows(1))
    assert (
        capsys.readouterr().err.splitlines()[-1].startswith("stopped while profiling: nothing of the profile is kept")
    )
    assert not list(tmp_path.iterdir())


def test_a_profile_of_other_code_is_measured_again(
    tiny: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BAKLAVA_CACHE", str(tmp_path))
    cached_profile(tiny(), windows(1))
    monkeypatch.setattr(profiler, "source_digest", lambda module: "other code")
    cached_profile(tiny(), windows(1))
    assert len(list((tmp_path / "profiles").iterdir())) == 2
