"""Keep the replicas of a server on one plan."""
