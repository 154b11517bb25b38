import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from byte_model import byte_tokenizer
from model_families import SHAPE, full_cache, model_pair, tiny_model
from plan_factory import make_plan, random_ids
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, MixtralConfig

from baklava.cache.attention import attention_hook
from baklava.errors import UserError
from baklava.eviction import HeavyHitter
from baklava.runtime import precision
from baklava.runtime.batched_forward import decode_step
from baklava.runtime.model_loader import LoadedModel, load
from baklava.runtime.precision import HalfPrecisionLinear, resolve_dtype, round_linear_layers, weights_dtype
from baklava.runtime.prefill import prefill

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def _probe_again() -> Any:
    precision.fastest_cpu_dtype.cache_clear()
    yield
    precision.fastest_cpu_dtype.cache_clear()


@pytest.mark.parametrize("tied", [True, False])
def test_linear_layers_are_rounded_and_nothing_else_is(tied: bool) -> None:
    model = tiny_model(LlamaConfig(**SHAPE, tie_word_embeddings=tied, attention_bias=True))
    exact = model(random_ids(1, 40)).logits
    round_linear_layers(model, torch.bfloat16)
    loaded = LoadedModel.of(model)
    assert loaded.dtype == "bfloat16"
    assert model.dtype == torch.float32
    layer = model.model.layers[0]
    assert isinstance(layer.mlp.up_proj, HalfPrecisionLinear)
    outputs = [each.output_dtype for each in (layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj)]
    assert outputs == [torch.bfloat16, torch.bfloat16, torch.float32]
    assert layer.self_attn.q_proj.bias.dtype == layer.self_attn.q_proj.weight.dtype == torch.bfloat16
    others = [model.lm_head, model.model.embed_tokens, layer.input_layernorm]
    assert {other.weight.dtype for other in others} == {torch.float32}
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    rounded = model(random_ids(1, 40)).logits
    assert rounded.dtype == torch.float32
    assert 0 < (rounded - exact).abs().mean() < 0.05 * exact.abs().mean()


@torch.inference_mode()
def test_layers_that_share_weights_are_rounded_alike() -> None:
    model = tiny_model(LlamaConfig(**SHAPE))
    layers = model.model.layers
    for first, other in ((layers[0].self_attn, layers[2].self_attn), (layers[0].mlp, layers[2].mlp)):
        for name, linear in first.named_children():
            if isinstance(linear, torch.nn.Linear):
                getattr(other, name).weight = linear.weight
    exact = model(random_ids(1, 40)).logits
    round_linear_layers(model, torch.bfloat16)
    assert layers[0].self_attn.v_proj.output_dtype == layers[2].self_attn.v_proj.output_dtype == torch.float32
    loaded = LoadedModel.of(model)
    plan = make_plan(loaded, [[40, 40]] * 4, HeavyHitter(eviction_interval=4))
    cache, _ = prefill(loaded, plan, random_ids(1, 30))
    assert decode_step(loaded, [cache], [1]).dtype == torch.float32
    assert 0 < (model(random_ids(1, 40)).logits - exact).abs().mean() < 0.05 * exact.abs().mean()


@torch.inference_mode()
def test_caches_and_kernels_get_float32_from_rounded_layers() -> None:
    model = tiny_model(LlamaConfig(**SHAPE | {"head_dim": 32}))
    round_linear_layers(model, torch.bfloat16)
    loaded = LoadedModel.of(model)
    plan = make_plan(loaded, [[20, 40], [28, 64]] * 2, HeavyHitter(sinks=2, eviction_interval=4))
    cache, _ = prefill(loaded, plan, random_ids(1, 90))
    assert cache.budgeted_layers[0].groups[0].keys.read(1).dtype == torch.float32
    for token in range(6):
        assert decode_step(loaded, [cache], [token]).dtype == torch.float32
    cache.check_integrity(96)


@pytest.mark.parametrize("family", ["llama", "gpt_oss"])
@torch.inference_mode()
def test_the_attention_of_prompts_rounds_its_factors_where_the_projections_are_rounded(family: str) -> None:
    pair = model_pair(family)
    models = [pair[0].model, copy.deepcopy(pair[0].model)]
    round_linear_layers(models[1], torch.bfloat16)
    seen: list[tuple[int, str | None]] = []
    for model in models:
        cache = full_cache(pair[0])
        with attention_hook(lambda _, query, *rest: seen.append((query.shape[2], rest[-1].fp32_precision))):
            for tokens in (20, 1):
                model(random_ids(1, tokens), past_key_values=cache)
    assert set(seen) == {(20, None), (1, None), (20, "bf16")}


@pytest.mark.parametrize(("speedup", "chosen"), [(4.0, torch.bfloat16), (1.0, torch.float32), (0.2, torch.float32)])
def test_auto_is_whatever_this_cpu_does_faster(
    monkeypatch: pytest.MonkeyPatch, speedup: float, chosen: torch.dtype
) -> None:
    monkeypatch.setattr(precision, "bfloat16_speedup", lambda: speedup)
    assert weights_dtype("auto", CPU) == chosen
    assert weights_dtype("auto", GPU) is None


def test_the_probe_measures_and_leaves_the_threads_as_they_were() -> None:
    threads = torch.get_num_threads()
    assert precision.bfloat16_speedup() > 0
    assert torch.get_num_threads() == threads


def test_scores_are_made_in_float32_on_every_cpu_unless_something_else_is_asked_for() -> None:
    assert weights_dtype(None, CPU) == torch.float32
    assert weights_dtype(None, GPU) is None
    assert weights_dtype("bfloat16", CPU) == weights_dtype("bfloat16", GPU) == torch.bfloat16


def test_what_auto_stands_for_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "bfloat16_speedup", lambda: 3.0)
    assert resolve_dtype("auto") == "bfloat16"
    assert resolve_dtype("float32") == "float32"
    assert resolve_dtype(None) is None


def test_float16_is_refused_on_a_cpu() -> None:
    with pytest.raises(UserError, match=r"float16 overflows in the linear layers of a CPU; choose bfloat16 or float32"):
        weights_dtype("float16", CPU)


def test_a_model_without_plain_linear_layers_is_refused(tmp_path: Path) -> None:
    sizes = {"vocab_size": 256, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}
    GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    assert load(str(tmp_path), dtype="float32").dtype == "float32"
    with pytest.raises(UserError, match=r"dtype bfloat16 changes nothing in .*, which has no plain linear layers"):
        load(str(tmp_path), dtype="bfloat16")


def test_a_model_that_is_hardly_rounded_is_named(caplog: pytest.LogCaptureFixture) -> None:
    experts = {"num_local_experts": 8, "num_experts_per_tok": 1}
    model = tiny_model(MixtralConfig(**SHAPE, **experts))
    assert round_linear_layers(model, torch.bfloat16) > 0
    assert "% of the weights are in linear layers, which compute in bfloat16" in caplog.text


def test_the_digest_tells_precisions_apart_even_if_the_weights_are_the_same() -> None:
    model = tiny_model(LlamaConfig(**SHAPE))
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(weight.bfloat16())
    exact = LoadedModel.of(model).weights_digest
    round_linear_layers(model, torch.bfloat16)
    assert LoadedModel.of(model).weights_digest != exact


def test_an_unknown_precision_is_refused() -> None:
    with pytest.raises(UserError, match="'int8' is none of auto, float32, bfloat16, float16; choose one of them"):
        load("demo", dtype="int8")


@pytest.mark.demo
@torch.inference_mode()
def test_the_demo_model_loses_little_in_bfloat16(demo: LoadedModel) -> None:
    rounded = load("demo", dtype="bfloat16")
    ids = torch.tensor([demo.tokenizer.encode("A cache keeps what will be needed again. " * 12)])
    exact, other = (loaded.model(ids).logits[0].log_softmax(-1) for loaded in (demo, rounded))
    assert 0 < float((exact.exp() * (exact - other)).sum(-1).mean()) < 2e-3
    assert rounded.weights_digest != demo.weights_digest
