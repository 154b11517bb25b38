"""The cost of a search besides its scoring, what the search saves, and how many workers one head node keeps busy."""
