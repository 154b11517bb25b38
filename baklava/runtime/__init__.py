"""Load a model, prefill it, decode with it, and score text under a plan."""
