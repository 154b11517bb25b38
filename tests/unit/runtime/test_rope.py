"""Models whose RoPE depends on the length of a forward, which transformers decides by its largest position."""

from typing import Any

import pytest
import torch
from engine_client import ask, engine_of
from model_families import SHAPE, tiny_model
from plan_factory import random_ids
from torch.testing import assert_close
from transformers import LlamaConfig, Phi3Config, PhimoeConfig

from baklava.cache.budgeted_cache import BudgetedCache
from baklava.plan.budget_plan import full_cache_plan
from baklava.runtime.batched_forward import decode_step
from baklava.runtime.decode import generate
from baklava.runtime.logprobs import score_suffix
from baklava.runtime.model_loader import LoadedModel
from baklava.runtime.prefill import make_prefill_task, prefill

LONG = {"original_max_position_embeddings": 64, "max_position_embeddings": 512}
LONGROPE = {"rope_type": "longrope", "rope_theta": 10_000.0, "short_factor": [1.0] * 4, "long_factor": [8.0] * 4}
MSCALES = {"short_mscale": 1.0, "long_mscale": 1.5, "original_max_position_embeddings": 64}
MODELS: dict[str, tuple[Any, dict[str, Any]]] = {
    "longrope": (Phi3Config, LONG | {"rope_parameters": LONGROPE}),
    "longrope with mscales": (
        PhimoeConfig,
        LONG | {"rope_parameters": LONGROPE | MSCALES, "num_local_experts": 2, "num_experts_per_tok": 1},
    ),
    "dynamic": (
        LlamaConfig,
        {"max_position_embeddings": 64, "rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}},
    ),
}

model_table = pytest.mark.parametrize("name", MODELS)


def make(name: str) -> LoadedModel:
    config, fields = MODELS[name]
    return LoadedModel.of(tiny_model(config(**(SHAPE | fields))))


def full(loaded: LoadedModel) -> BudgetedCache:
    return BudgetedCache(full_cache_plan(loaded.identity, loaded.geometry, 200, 32))


@torch.inference_mode()
@model_table
def test_a_row_does_not_depend_on_the_length_of_its_neighbours(name: str) -> None:
    loaded = make(name)
    plan = full_cache_plan(loaded.identity, loaded.geometry, 200, 32)
    short, long = random_ids(1, 20), random_ids(1, 100, seed=1)
    alone, _ = prefill(loaded, plan, short)
    expected = decode_step(loaded, [alone], [5])
    caches = [prefill(loaded, plan, ids)[0] for ids in (short, long)]
    assert_close(decode_step(loaded, caches, [5, 7])[:1], expected, atol=1e-5, rtol=1e-5)


@model_table
def test_a_short_request_is_answered_the_same_while_a_long_one_is_decoded(name: str) -> None:
    loaded = make(name)
    plan = full_cache_plan(loaded.identity, loaded.geometry, 200, 32)
    short, long = random_ids(1, 20)[0].tolist(), random_ids(1, 100, seed=1)[0].tolist()
    with engine_of(loaded, plan) as engine:
        alone = ask(engine, short, 8).tokens()
        neighbour = ask(engine, long, 90)
        together = ask(engine, short, 8).tokens()
        neighbour.cancel()
    assert together == alone


@torch.inference_mode()
@model_table
def test_a_prompt_in_parts_equals_the_whole(name: str) -> None:
    loaded, ids = make(name), random_ids(1, 100)
    whole = loaded.model(ids, use_cache=False).logits
    cache = full(loaded)
    parts = [loaded.model(part, past_key_values=cache).logits for part in ids.split([20, 30, 1, 49], 1)]
    assert_close(torch.cat(parts, 1), whole, atol=1e-4, rtol=1e-4)
    task, result = make_prefill_task(loaded, cache.plan, ids), None
    while result is None:
        result = task.step(30)
    assert_close(result[1], whole[:, -1], atol=1e-4, rtol=1e-4)
    log_probs = torch.log_softmax(whole[0, :-1], -1).gather(-1, ids[0, 1:, None]).sum()
    assert score_suffix(loaded, cache.plan, ids[0].tolist(), 99).log_prob == pytest.approx(float(log_probs), abs=1e-2)


@torch.inference_mode()
@model_table
def test_a_text_that_grows_past_the_original_length_stays_in_its_cache(name: str) -> None:
    loaded, prompt = make(name), random_ids(1, 40)
    cache = full(loaded)
    output = loaded.model.generate(prompt, past_key_values=cache, max_new_tokens=60, do_sample=False)
    cache.check_integrity(output.shape[1] - 1)
    choices = loaded.model(output, use_cache=False).logits[0, 39:-1].argmax(-1)
    assert output[0, 40:].tolist() == choices.tolist()
    assert generate(loaded, cache.plan, prompt[0].tolist(), max_new_tokens=60, do_sample=False) == choices.tolist()


@torch.inference_mode()
@pytest.mark.parametrize("name", ["longrope", "longrope with mscales"])
def test_every_length_has_the_frequencies_of_the_longest(name: str) -> None:
    config, fields = MODELS[name]
    theirs = tiny_model(config(**(SHAPE | fields)))
    long, loaded = random_ids(1, 100), make(name)
    assert_close(loaded.model(long).logits, theirs(long).logits, atol=1e-5, rtol=1e-5)
    short = long[:, :20]
    assert_close(loaded.model(short).logits, loaded.model(long).logits[:, :20], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(theirs(short).logits, theirs(long).logits[:, :20], atol=0.1)


@torch.inference_mode()
def test_a_cache_that_the_model_passed_over_fails_its_check() -> None:
    """transformers' Phi3 replaces a cache when a text outgrows its short frequencies, unless we have loaded it."""
    config, fields = MODELS["longrope"]
    model = tiny_model(config(**(SHAPE | fields)))
    cache = full(LoadedModel.of(model))
    del model.prepare_inputs_for_generation
    output = model.generate(random_ids(1, 40), past_key_values=cache, max_new_tokens=60, do_sample=False)
    with pytest.raises(RuntimeError, match=r"has seen \d+ tokens of 99, so the plan was not applied"):
        cache.check_integrity(output.shape[1] - 1)


def test_dynamic_rope_stretches_the_maximum_length() -> None:
    assert make("dynamic").max_length == 256
    assert make("longrope").max_length == 512
