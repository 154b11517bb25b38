"""Compiled against plain decoding of a tiny model, in a process of its own: no compiler follows checked signatures.

Usage: compiling.py EVICTION BITS [COMPILER]; prints JSON. It runs on `BAKLAVA_TEST_DEVICE`, usually the CPU.
"""

import json
import os
import sys
import warnings

import torch
from plan_factory import plan_of, random_ids
from torch._dynamo.utils import counters
from transformers import LlamaConfig, LlamaForCausalLM

from baklava.cache.budgeted_cache import BudgetedCache
from baklava.eviction import method_of
from baklava.runtime.model_loader import LoadedModel
from baklava.runtime.torch_compile import compiled

OPTIONS = {"max_new_tokens": 40, "do_sample": False}


@torch.inference_mode()
def main(eviction: str, bits: str, compiler: str | None = None) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    shape = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.25, "eos_token_id": None}
    device = os.environ.get("BAKLAVA_TEST_DEVICE", "cpu")
    model = LlamaForCausalLM(LlamaConfig(**shape, **heads, pad_token_id=0)).eval()
    loaded, ids = LoadedModel.of(model.to(device)), random_ids(2, 90).to(device)
    knobs = {} if eviction == "streaming" else {"interval": 8, "staged": int(bits) < 16}
    plan = plan_of(loaded, [[24, 40]], method_of(eviction)(**knobs), bits=int(bits))
    expected = loaded.model.generate(ids, past_key_values=BudgetedCache(plan), **OPTIONS)
    if compiler:
        torch._inductor.config.cpp.cxx = (compiler,)
        torch._inductor.config.force_disable_caches = True
    cache = BudgetedCache(plan)
    with compiled(loaded), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        equal = torch.equal(loaded.model.generate(ids, past_key_values=cache, **OPTIONS), expected)
    cache.check_integrity()
    said = [str(one.message) for one in caught if "uncompiled" in str(one.message)]
    graphs, breaks = counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())
    print(json.dumps({"equal": equal, "graphs": graphs, "breaks": breaks, "warnings": said}))


if __name__ == "__main__":
    main(*sys.argv[1:])
