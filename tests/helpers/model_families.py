"""Tiny random models of every family."""

import copy
from functools import cache as once
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)

from baklava.cache.budgeted_cache import BudgetedCache
from baklava.plan.budget_plan import full_cache_plan
from baklava.runtime.model_loader import LoadedModel

MIXED = ["sliding_attention", "full_attention"] * 2


FAMILIES: dict[str, tuple[Any, dict[str, Any]]] = {
    "llama": (LlamaConfig, {}),
    "qwen2": (Qwen2Config, {}),
    "qwen2 sliding": (Qwen2Config, {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 2}),
    "qwen3": (Qwen3Config, {"head_dim": 8}),
    "mistral": (MistralConfig, {"sliding_window": None, "head_dim": 8}),
    "gemma2": (Gemma2Config, {"head_dim": 8, "sliding_window": 16, "attn_logit_softcapping": 2.0}),
    "gemma3": (Gemma3TextConfig, {"head_dim": 8, "sliding_window": 16, "layer_types": MIXED}),
    "phi3": (Phi3Config, {}),
    "gpt_oss": (GptOssConfig, {"head_dim": 8, "sliding_window": 16, "num_local_experts": 2, "num_experts_per_tok": 1}),
}


TOKENS = {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}


SHAPE = TOKENS | {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.25,  # the usual .02 gives logits so flat that a wrong cache goes unseen
}


def tiny_model(config: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config).eval()


@once
def model_pair(family: str, dtype: torch.dtype = torch.float32) -> tuple[LoadedModel, Any]:
    """A tiny random model that attends through baklava, and its copy that attends as transformers does eagerly."""
    config, fields = FAMILIES[family]
    model = tiny_model(config(**(SHAPE | fields))).to(dtype)
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    return LoadedModel.of(model), eager


def full_cache(loaded: LoadedModel, bits: Any = 32) -> BudgetedCache:
    return BudgetedCache(full_cache_plan(loaded.identity, loaded.geometry, 120, bits))
