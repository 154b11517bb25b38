"""Shared by all tests: checked shapes, no network, results apart from the user's, and models as fixtures."""

import gc
import os
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

gc.disable()  # until all tests are imported, which makes much and leaves nothing to collect

# Set before anything reads them, and inherited by every process that a test starts.
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "token",
    "TOKENIZERS_PARALLELISM": "false",
}
os.environ.setdefault("OMP_NUM_THREADS", "2")
# What a shell in the background or nohup ignores, tests and what they start would ignore as well.
signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, lambda *_: None)  # no process that is started inherits a handler
os.environ.pop("MLFLOW_TRACKING_URI", None)
_data = tempfile.TemporaryDirectory(prefix="baklava-data-")
os.environ["BAKLAVA_DATA"] = _data.name

from beartype import BeartypeConf, beartype
from beartype.roar import BeartypeDecorHintPep673Exception, BeartypeDecorHintPep3119Exception
from jaxtyping import install_import_hook

check = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int is a float, as it is to mypy


def checked(thing: Any) -> Any:
    """Apply beartype, except to functions that it cannot check: with `Self`, or with a Protocol for mypy only."""
    try:
        return check(thing)
    except (BeartypeDecorHintPep673Exception, BeartypeDecorHintPep3119Exception):
        return thing


install_import_hook("baklava", "conftest.checked")  # before the first import of baklava

from tuning import configure_environment

configure_environment()

import pytest
import torch
from hypothesis import Phase, settings
from transformers import LlamaConfig, LlamaForCausalLM

from baklava.runtime.model_loader import LoadedModel, load

# Explaining a failure traces every line of every example, which is 20 x slower on Python 3.11.
settings.register_profile("baklava", deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink])
settings.load_profile("baklava")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave out modules without tests of Ray where only those are selected, since to import all takes seconds."""
    if config.option.markexpr.startswith("ray and") and collection_path.name.startswith("test_"):
        return "mark.ray" not in collection_path.read_text() or None
    return None


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


def pytest_unconfigure() -> None:
    _data.cleanup()


@pytest.fixture(scope="session")
def demo() -> LoadedModel:
    """The real demo model, loaded once; tests must not change it."""
    return load("demo", dtype="float32")


@pytest.fixture(autouse=True)
def _threads(request: pytest.FixtureRequest) -> None:
    """Use one thread for tiny models, where several would mostly wait for each other."""
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]) if request.node.get_closest_marker("demo") else 1)


@pytest.fixture(scope="session")
def tiny() -> Callable[..., LoadedModel]:
    """Return a function that makes tiny random Llama models, by default of 2 KV heads with 2 query heads each."""

    def make(layers: int = 2, kv_heads: int = 2, group: int = 2, head_dim: int = 8, **fields: Any) -> LoadedModel:
        seed = fields.pop("seed", 0)
        shape = {
            "vocab_size": 64,
            "hidden_size": kv_heads * group * head_dim,
            "intermediate_size": 64,
            "num_hidden_layers": layers,
            "num_attention_heads": kv_heads * group,
            "num_key_value_heads": kv_heads,
            "head_dim": head_dim,
            "max_position_embeddings": 4096,
            "initializer_range": 0.25,  # the usual .02 gives logits so flat that a wrong cache goes unseen
            "bos_token_id": 1,
            "eos_token_id": None,
            "pad_token_id": 0,
        }
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = LlamaForCausalLM(LlamaConfig(**(shape | fields)))
        return LoadedModel.of(model.eval(), tokenizer=None, id="tiny")

    return make
