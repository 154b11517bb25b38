"""Decode and prefill against transformers, in one process."""
