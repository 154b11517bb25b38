"""Allocation methods, one per file."""
