"""Tiny random models of every family."""

import copy
from functools import cache as once
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    BambaConfig,
    Cohere2Config,
    Exaone4Config,
    FalconH1Config,
    Gemma2Config,
    Gemma3nTextConfig,
    Gemma3TextConfig,
    Gemma4TextConfig,
    GptOssConfig,
    GraniteMoeHybridConfig,
    Lfm2Config,
    LlamaConfig,
    MinistralConfig,
    MistralConfig,
    NemotronHConfig,
    Olmo3Config,
    OlmoHybridConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3_5TextConfig,
    Qwen3Config,
    Qwen3NextConfig,
    SmolLM3Config,
)

from baklava.cache.budgeted_cache import BudgetedCache
from baklava.plan.budget_plan import full_cache_plan
from baklava.runtime.model_loader import LoadedModel

MIXED = ["sliding_attention", "full_attention"] * 2


LINEAR = ["linear_attention", "full_attention"] * 2
GATED_DELTA = {
    "layer_types": LINEAR,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "head_dim": 8,
}
EXPERTS = {
    "num_experts": 2,
    "num_local_experts": 2,
    "num_experts_per_tok": 1,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "shared_intermediate_size": 32,
}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 16}
NEMOTRON = {
    "layers_block_type": ["linear_attention", "mlp", "full_attention", "full_attention"],
    "head_dim": 8,
    "mamba_num_heads": 4,
    "mamba_head_dim": 16,
    "ssm_state_size": 8,
    "n_groups": 1,
    "chunk_size": 16,
}

SHARED = {
    "num_hidden_layers": 7,
    "layer_types": [*MIXED[::-1], *MIXED[:2], "full_attention"],
    "num_kv_shared_layers": 3,
}
GEMMA3N = {"head_dim": 8, "sliding_window": 16, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 128}
GEMMA3N |= {"altup_num_inputs": 2, "laurel_rank": 8, "activation_sparsity_pattern": [0.0] * 7}
GEMMA4 = {
    "head_dim": 8,
    "global_head_dim": 16,
    "num_global_key_value_heads": 1,
    "attention_k_eq_v": True,
    "sliding_window": 16,
    "layer_types": MIXED,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 128,
}


FAMILIES: dict[str, tuple[Any, dict[str, Any]]] = {
    "llama": (LlamaConfig, {}),
    "qwen2": (Qwen2Config, {}),
    "qwen2 sliding": (Qwen2Config, {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 2}),
    "qwen3": (Qwen3Config, {"head_dim": 8}),
    "mistral": (MistralConfig, {"sliding_window": None, "head_dim": 8}),
    "gemma2": (Gemma2Config, {"head_dim": 8, "sliding_window": 16, "attn_logit_softcapping": 2.0}),
    "gemma3": (Gemma3TextConfig, {"head_dim": 8, "sliding_window": 16, "layer_types": MIXED}),
    "gemma3n": (Gemma3nTextConfig, GEMMA3N | SHARED),
    "gemma4": (Gemma4TextConfig, GEMMA4),
    "gemma4 shared": (Gemma4TextConfig, GEMMA4 | SHARED),
    "phi3": (Phi3Config, {}),
    "ministral": (MinistralConfig, {"head_dim": 8, "sliding_window": 16, "layer_types": MIXED}),
    "smollm3": (SmolLM3Config, {"use_sliding_window": True, "sliding_window": 16, "layer_types": MIXED}),
    "cohere2": (Cohere2Config, {"sliding_window": 16, "layer_types": MIXED}),
    "exaone4": (Exaone4Config, {"head_dim": 8, "sliding_window": 16, "layer_types": MIXED}),
    "olmo3": (Olmo3Config, {"sliding_window": 16, "layer_types": MIXED}),
    "gpt_oss": (GptOssConfig, {"head_dim": 8, "sliding_window": 16, "num_local_experts": 2, "num_experts_per_tok": 1}),
    "qwen3_next": (Qwen3NextConfig, GATED_DELTA | EXPERTS),
    "qwen3_5": (Qwen3_5TextConfig, GATED_DELTA),
    "lfm2": (Lfm2Config, {"layer_types": ["conv", "full_attention"] * 2}),
    "granite hybrid": (GraniteMoeHybridConfig, MAMBA | EXPERTS | {"layer_types": LINEAR}),
    "bamba": (BambaConfig, MAMBA | {"attn_layer_indices": [1, 3]}),
    "falcon_h1": (FalconH1Config, MAMBA | {"head_dim": 8, "mamba_d_ssm": 64}),
    "olmo hybrid": (OlmoHybridConfig, GATED_DELTA),
    "nemotron_h": (NemotronHConfig, NEMOTRON),
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
@torch.inference_mode(mode=False)  # whatever the first test runs in, others need gradients
def model_pair(family: str, dtype: torch.dtype = torch.float32) -> tuple[LoadedModel, Any]:
    """A tiny random model that attends through baklava, and its copy that attends as transformers does eagerly."""
    config, fields = FAMILIES[family]
    model = tiny_model(config(**(SHAPE | fields))).to(dtype)
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    return LoadedModel.of(model), eager


def full_cache(loaded: LoadedModel, bits: Any = 32) -> BudgetedCache:
    return BudgetedCache(full_cache_plan(loaded.identity, loaded.geometry, 120, bits))
