"""Run a search from its inputs to its report."""
