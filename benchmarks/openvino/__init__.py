"""OpenVINO GenAI's continuous batching as a server of the serving benchmark, in an environment of its own.

Nothing here imports baklava, which needs a newer transformers than optimum-intel allows.
"""
