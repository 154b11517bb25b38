"""Choose the winner of a search and say what it is worth."""
