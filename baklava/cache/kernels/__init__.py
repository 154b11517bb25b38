"""Compiled kernels. `fused_decode` decodes with the one for CPUs."""
