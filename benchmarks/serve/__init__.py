"""What serving inside a plan is worth, measured over HTTP next to the full cache and to transformers' own server."""
