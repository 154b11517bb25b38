"""Time decode steps and prefills of plans, next to transformers' own cache, in one process."""
