"""Continuous batching under a plan: scheduler, sequences, memory."""
