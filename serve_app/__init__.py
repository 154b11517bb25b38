"""A budget plan behind an OpenAI-compatible HTTP endpoint, on Ray Serve."""
