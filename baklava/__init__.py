"""Budgeted KV caches for Hugging Face models: every (layer, KV head) gets its own byte budget."""

__version__ = "0.1.0"
