"""Measure once what the KV heads of a model need."""
