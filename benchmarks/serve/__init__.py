"""Serving under a plan, compared over HTTP with the full cache and with transformers' own server."""
