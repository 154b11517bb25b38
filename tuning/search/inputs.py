"""What a search needs before its first trial: windows of text, split by document, and the profile of the model."""

import gc
from dataclasses import dataclass

import torch

from baklava.console import log
from baklava.data.documents import documents_digest, load_documents
from baklava.data.windows import Splits, make_splits
from baklava.plan.geometry import CacheGeometry, ModelIdentity
from baklava.profiling.profile import Profile
from baklava.profiling.profiler import cached_profile
from baklava.runtime.model_loader import load
from tuning.study.settings import SearchSettings

WINDOWS = 4
"""Windows that trials are scored on, and as many for validation: documents differ more than plans do."""


@dataclass(frozen=True)
class Material:
    """All that trials are made from. `corpora` maps the name of each text to its digest."""

    identity: ModelIdentity
    geometry: CacheGeometry
    splits: Splits
    profile: Profile
    corpora: dict[str, str]


def prepare(settings: SearchSettings) -> Material:
    """Load the texts and the model, split, and profile; the model is freed again, since replicas have their own.

    Raises:
        UserError: an unknown model or text, or texts too short for the windows.
    """
    log(f"texts: loading {', '.join(settings.texts)}")
    texts = {name: load_documents([name]) for name in settings.texts}
    log(f"model: loading {settings.model}")
    loaded = load(settings.model, device_map_auto=settings.gpus_per_replica > 1)
    splits = make_splits(
        [document for each in texts.values() for document in each],
        loaded.tokenizer,
        context=settings.context,
        continuation=settings.continuation,
        seed=settings.seed,
        search=WINDOWS,
        validation=WINDOWS,
    )
    material = Material(
        identity=loaded.identity,
        geometry=loaded.geometry,
        splits=splits,
        profile=cached_profile(loaded, splits.calibration),
        corpora={name: documents_digest(each) for name, each in texts.items()},
    )
    del loaded
    gc.collect()
    torch.cuda.empty_cache()
    return material
