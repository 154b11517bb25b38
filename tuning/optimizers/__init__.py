"""Where the next trial of a search comes from, and what stops it early."""
