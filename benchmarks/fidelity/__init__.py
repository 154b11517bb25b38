"""Fidelity at each budget: the loss of every method on the same windows of unseen text."""
