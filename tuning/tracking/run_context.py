"""The context of a run: installed packages, the machine and its load, and the data."""

import hashlib
import json
import logging
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import distributions

import torch
from mlflow.entities import Dataset, DatasetInput, InputTag
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

from baklava.data.windows import Splits, Window

MAX_DIGEST_CHARACTERS = 32
"""Of a data set's hash: MLflow accepts 36."""

MAX_DATASET_NAME_CHARACTERS = 500


def installed_packages() -> str:
    """Return every installed package with its version in the format of `pip freeze`, without the checkout itself."""
    versions = {dist.name: dist.version for dist in distributions() if dist.name not in (None, "baklava")}
    return "".join(f"{name}=={versions[name]}\n" for name in sorted(versions, key=str.lower))


def machine_tags() -> dict[str, str]:
    """Return Python, system and GPUs of the machine that drives the search, as tags."""
    gpus = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    return {
        "baklava.python": platform.python_version(),
        "baklava.system": platform.platform(),
        "baklava.host": platform.node(),
        "baklava.gpus": ", ".join(gpus) or "none",
    }


class SystemMetrics:
    """MLflow's thread that samples the machine's load; it dies if the server is away once, and `restart` revives it.

    It samples every ten seconds, or every `$MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL`.
    """

    def __init__(self, uri: str, run: str) -> None:
        logging.getLogger("mlflow.system_metrics").setLevel(logging.CRITICAL)  # the tracker warns once
        self.uri, self.run = uri, run
        self.monitor: SystemMetricsMonitor | None = None

    def restart(self) -> None:
        """Start sampling, unless the thread runs."""
        if self.monitor is None or not self.monitor._process or not self.monitor._process.is_alive():
            self.monitor = SystemMetricsMonitor(self.run, resume_logging=True, tracking_uri=self.uri)
            self.monitor.start()

    def stop(self) -> None:
        """Stop sampling, and write the last samples."""
        if self.monitor is not None:
            self.monitor.finish()


def dataset_inputs(corpora: Mapping[str, str], splits: Splits) -> list[DatasetInput]:
    """Return MLflow's inputs of a search: every text, and the windows of every split, each with its digest.

    Args:
        corpora: The digest of each text by its name.
        splits: The windows.
    """
    texts = [_dataset_input(name, digest, "text", {"text": name}, {}) for name, digest in corpora.items()]
    windows_of = {"calibration": splits.calibration, "search": splits.search, "validation": splits.validation}
    source = {"texts": sorted(corpora)}
    return texts + [
        _dataset_input(f"{split} windows", windows_digest(windows), split, source, _windows_profile(windows))
        for split, windows in windows_of.items()
    ]


def windows_digest(windows: Sequence[Window]) -> str:
    """Return a hash of the windows' token ids and of where their continuations begin."""
    content = [[window.name, window.context_length, *window.ids] for window in windows]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _windows_profile(windows: Sequence[Window]) -> dict[str, object]:
    return {
        "windows": len(windows),
        "tokens": sum(len(window.ids) for window in windows),
        "documents": sorted({window.document for window in windows}),
    }


def _dataset_input(
    name: str, digest: str, context: str, source: Mapping[str, object], profile: Mapping[str, object]
) -> DatasetInput:
    dataset = Dataset(
        name=name[-MAX_DATASET_NAME_CHARACTERS:],
        digest=digest[:MAX_DIGEST_CHARACTERS],
        source_type="texts",
        source=json.dumps(source),
        profile=json.dumps(profile),
    )
    return DatasetInput(dataset, [InputTag("mlflow.data.context", context)])
