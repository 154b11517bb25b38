"""Evaluate plans from the command line: inputs, workers, a resumable folder, MLflow and the report."""
