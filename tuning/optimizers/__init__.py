"""Where the next trial of a search comes from."""
