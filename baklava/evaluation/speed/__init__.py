"""Speed and peak memory of plans, next to transformers' own cache on the same machine."""
