"""Generate text with a cache of a quarter of the bytes: python examples/generate.py --model demo."""

import argparse

import baklava
from baklava.allocation.plan_spec import resolve_plan

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="demo", help="demo, a folder, or the id of a hub model")
parser.add_argument("--prompt", default="The rivers of Europe, from north to south, and where they rise. " * 60)
parser.add_argument("--tokens", type=int, default=32, help="tokens to generate (default: 32)")
arguments = parser.parse_args()

loaded = baklava.load(arguments.model)
inputs = loaded.tokenizer(arguments.prompt, return_tensors="pt").to(loaded.device)
length = inputs["input_ids"].shape[1] + arguments.tokens

# Heavy hitters stay, in 16 bits, the same number for each head. A searched plan would be BudgetPlan.read("plan.json").
plan = resolve_plan("uniform+heavy_hitter:0.25", loaded, length).plan

cache = baklava.BudgetedCache(plan, max_tokens=length)
output = loaded.model.generate(**inputs, past_key_values=cache, max_new_tokens=arguments.tokens, do_sample=False)
cache.check_integrity(output.shape[1] - 1)

print(loaded.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :]))
print(f"{cache.nbytes:,} bytes; the full cache has {plan.full_bytes_per_sequence:,}")
