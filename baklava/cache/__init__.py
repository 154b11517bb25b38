"""A KV cache with a budget for every (layer, KV head), as transformers uses it."""
