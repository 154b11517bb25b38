"""Allocation methods, one a file."""
