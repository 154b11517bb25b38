"""What a search ran in: the packages of this Python, and the machine."""

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


def packages() -> str:
    """Every installed package with its version, as `pip freeze` writes them, but for the checkout itself."""
    found = {dist.name: dist.version for dist in distributions() if dist.name not in (None, "baklava")}
    return "".join(f"{name}=={found[name]}\n" for name in sorted(found, key=str.lower))


def machine() -> dict[str, str]:
    """Python, system and accelerators of the machine that drives the search, as tags."""
    gpus = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    named = {"python": platform.python_version(), "system": platform.platform(), "host": platform.node()}
    return {**named, "gpus": ", ".join(gpus) or "none"}


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


DIGEST_LENGTH = 32
"""Characters of a hash: MLflow takes 36."""


def inputs(corpora: Mapping[str, str], splits: Splits) -> list[DatasetInput]:
    """Every text by its digest, and the windows of every split by theirs; `corpora` maps texts to digests."""
    texts = [_input(name, digest, "text", {"text": name}, {}) for name, digest in corpora.items()]
    parts = {"calibration": splits.calibration, "search": splits.search, "validation": splits.validation}
    source = {"texts": sorted(corpora)}
    return texts + [
        _input(f"{split} windows", windows_digest(windows), split, source, _profile(windows))
        for split, windows in parts.items()
    ]


def windows_digest(windows: Sequence[Window]) -> str:
    """Hash of what is in windows: token ids, and where the continuation begins."""
    content = [[window.name, window.context_length, *window.ids] for window in windows]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _profile(windows: Sequence[Window]) -> dict[str, object]:
    documents = sorted({window.document for window in windows})
    return {"windows": len(windows), "tokens": sum(len(window.ids) for window in windows), "documents": documents}


def _input(
    name: str, digest: str, context: str, source: Mapping[str, object], profile: Mapping[str, object]
) -> DatasetInput:
    dataset = Dataset(
        name=name[-500:],
        digest=digest[:DIGEST_LENGTH],
        source_type="texts",
        source=json.dumps(source),
        profile=json.dumps(profile),
    )
    return DatasetInput(dataset, [InputTag("mlflow.data.context", context)])
