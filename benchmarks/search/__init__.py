"""What a search costs beside its scoring, what it saves, and how far one head node reaches."""
