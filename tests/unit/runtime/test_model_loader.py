"""Loading: on which device, and how checkpoints of one name differ."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from byte_model import byte_tokenizer

from baklava.errors import UserError
from baklava.runtime.model_loader import LoadedModel, load

Maker = Callable[..., LoadedModel]


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


def test_a_token_without_an_embedding_is_refused_by_name(tiny: Maker) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<extra>"])
    loaded = replace(tiny(vocab_size=257), tokenizer=tokenizer)
    ids = tokenizer("a<extra>b")["input_ids"]
    with pytest.raises(UserError, match=r"token 257 \(<extra>\) has no embedding in tiny, which has 257; leave it out"):
        loaded.as_batch(ids)
    assert loaded.as_batch(tokenizer("ab")["input_ids"]).tolist() == [[97, 98]]
