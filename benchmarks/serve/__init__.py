"""Serving under a plan, compared over HTTP with the full cache, transformers' own server and OpenVINO GenAI."""
