"""Serve a model under a budget plan with an OpenAI-compatible HTTP API, on Ray Serve."""
