"""The model that lm-evaluation-harness runs."""
