"""What a search is asked for, and what its trials are."""
