"""The study "fidelity against bytes": every way to spend a budget on the same windows of unseen text."""
