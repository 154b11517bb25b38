"""Inputs of a search: token windows, split by document, and the model's profile."""

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

WINDOWS_PER_SPLIT = 4
"""Windows that trials are scored on, and as many for validation: documents differ more than plans do."""


@dataclass(frozen=True)
class SearchInputs:
    """Everything that trials are made from. `corpora` maps the name of each text to its digest."""

    identity: ModelIdentity
    geometry: CacheGeometry
    splits: Splits
    profile: Profile
    corpora: dict[str, str]
    weights_digest: str
    dtype: str


def prepare_inputs(settings: SearchSettings) -> SearchInputs:
    """Load the texts and the model, cut windows, and profile the model.

    The model is freed again, since every worker loads its own copy.

    Raises:
        UserError: an unknown model or text, or texts too short for the windows.
    """
    log(f"texts: loading {', '.join(settings.texts)}")
    texts = {name: load_documents([name]) for name in settings.texts}
    log(f"model: loading {settings.model}")
    loaded = load(settings.model, dtype=settings.dtype, device_map_auto=settings.gpus_per_replica > 1)
    log(f"model: its linear layers compute in {loaded.dtype}")
    splits = make_splits(
        [document for documents in texts.values() for document in documents],
        loaded.tokenizer,
        context=settings.context,
        continuation=settings.continuation,
        seed=settings.seed,
        search=WINDOWS_PER_SPLIT,
        validation=WINDOWS_PER_SPLIT,
    )
    for window in splits.calibration + splits.search + splits.validation:
        loaded.check_tokens(window.ids)
    inputs = SearchInputs(
        identity=loaded.identity,
        geometry=loaded.geometry,
        splits=splits,
        profile=cached_profile(loaded, splits.calibration),
        corpora={name: documents_digest(documents) for name, documents in texts.items()},
        weights_digest=loaded.weights_digest,
        dtype=loaded.dtype,
    )
    del loaded
    gc.collect()
    torch.cuda.empty_cache()
    return inputs
