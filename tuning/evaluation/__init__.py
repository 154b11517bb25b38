"""An evaluation as a job: what was asked, its folder, its work on one or many replicas, its record and its report."""
