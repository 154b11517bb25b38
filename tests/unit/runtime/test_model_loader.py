"""Loading: which errors are whose, on which device, and how checkpoints of one name differ."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from baklava.errors import UserError
from baklava.runtime import model_loader
from baklava.runtime.model_loader import LoadedModel, load

Maker = Callable[..., LoadedModel]


class Loader:
    """Stands in for AutoTokenizer and AutoModelForCausalLM; raises an error."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def from_pretrained(self, *args: object, **options: object) -> object:
        raise self.error


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
    ],
    ids=["cuda", "cpu", "python"],
)
def test_too_little_memory_is_not_called_a_bad_checkpoint(
    error: Exception, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(model_loader, "AutoTokenizer", Loader(error))
    with pytest.raises(UserError, match=r"does not fit into the free memory of cpu .*smaller model"):
        load(str(tmp_path), device="cpu")


def test_a_damaged_checkpoint_is_called_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(model_loader, "AutoTokenizer", Loader(RuntimeError("size mismatch for lm_head.weight\nmore")))
    with pytest.raises(UserError, match=r"cannot load a model from directory .*\(size mismatch for lm_head.weight\)"):
        load(str(tmp_path), device="cpu")


@pytest.mark.parametrize("device", ["cuda:99", "nonsense", "mps:7"])
def test_a_device_that_is_not_there_is_refused_before_anything_is_loaded(device: str) -> None:
    with pytest.raises(UserError, match=f"device '{device}' cannot be used"):
        load("demo", device=device)


def test_a_device_and_a_device_map_exclude_each_other() -> None:
    with pytest.raises(UserError, match="leave out device 'cpu'"):
        load("demo", device="cpu", device_map_auto=True)


def test_a_user_error_is_no_value_error() -> None:
    assert not issubclass(UserError, ValueError)


@torch.inference_mode()
def test_the_digest_of_the_weights_sees_a_change_of_any_later_row(tiny: Maker) -> None:
    def digest(row: int | None = None) -> str:
        loaded = tiny(vocab_size=4096)
        if row is not None:
            loaded.model.get_input_embeddings().weight[row : row + 64] += 1.0
        return loaded.weights_digest

    assert digest() == digest()
    assert len({digest(), *(digest(row) for row in range(0, 4096, 512))}) == 9
    assert tiny(seed=1).weights_digest != tiny().weights_digest
