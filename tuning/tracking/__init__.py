"""Record a search in MLflow."""
