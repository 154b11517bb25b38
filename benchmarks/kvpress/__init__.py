"""kvpress's presses on the same model and windows as baklava's plans, in an environment of their own.

Nothing here imports baklava, which needs a newer transformers than kvpress allows.
"""
