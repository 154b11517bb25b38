"""Load of the machine that drives a search, as MLflow's system metrics of its parent run."""

import logging

from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor


class Watch:
    """MLflow's sampling thread, which gives up for good when the server is away for a moment: `go_on` starts it again.

    It samples every ten seconds, or every `$MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL`.
    """

    def __init__(self, uri: str, run: str) -> None:
        logging.getLogger("mlflow.system_metrics").setLevel(logging.CRITICAL)  # the tracker tells of servers, once
        self.uri, self.run = uri, run
        self.monitor: SystemMetricsMonitor | None = None

    def go_on(self) -> None:
        """Sample from now on, if nothing does."""
        if self.monitor is None or not self.monitor._process or not self.monitor._process.is_alive():
            self.monitor = SystemMetricsMonitor(self.run, resume_logging=True, tracking_uri=self.uri)
            self.monitor.start()

    def stop(self) -> None:
        """Write what was sampled last; a server that is away is left alone."""
        if self.monitor is not None:
            self.monitor.finish()
