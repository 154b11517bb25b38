"""What a search ran on, as MLflow's dataset inputs: texts and windows by their hashes, never their content."""

import hashlib
import json
from collections.abc import Mapping, Sequence

from mlflow.entities import Dataset, DatasetInput, InputTag

from baklava.windows import Splits, Window

DIGEST_LENGTH = 32
"""Characters of a hash: MLflow takes 36."""


def inputs(corpora: Mapping[str, str], splits: Splits) -> list[DatasetInput]:
    """Every text by its digest, and the windows of every split by theirs; `corpora` maps texts to digests."""
    texts = [_input(name, digest, "text", {"text": name}, {}) for name, digest in corpora.items()]
    parts = {"calibration": splits.calibration, "search": splits.search, "validation": splits.validation}
    source = {"texts": sorted(corpora)}
    return texts + [
        _input(f"{split} windows", digest_of(windows), split, source, _profile(windows))
        for split, windows in parts.items()
    ]


def digest_of(windows: Sequence[Window]) -> str:
    """Hash of what is in windows: token ids, and where the continuation begins."""
    content = [[window.name, window.context, *window.ids] for window in windows]
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
