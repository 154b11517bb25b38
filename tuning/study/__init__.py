"""The settings, search space and goal of a search, and the records of its trials."""
