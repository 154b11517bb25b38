"""Which tokens end a text."""

from dataclasses import replace

import pytest
from sentencepiece_tokenizer import sentencepiece_tokenizer

from baklava.runtime.model_loader import LoadedModel


@pytest.mark.parametrize(
    ("model_ends", "tokenizer_end", "ends"),
    [(None, None, set()), (5, None, {5}), ([5, 7], "</s>", {2, 5, 7}), (5, "<|im_end|>", {5}), (2, "</s>", {2})],
)
def test_the_ends_are_those_of_the_model_and_of_the_tokenizer(tiny, model_ends, tokenizer_end, ends):
    """`<|im_end|>` is beyond the 64 tokens of the model."""
    tokenizer = sentencepiece_tokenizer()
    tokenizer.eos_token = tokenizer_end
    loaded = tiny()
    loaded.model.generation_config.eos_token_id = model_ends
    assert replace(loaded, tokenizer=tokenizer).eos_token_ids == ends


def test_generate_of_the_model_itself_ends_there_as_well(tiny):
    tokenizer = sentencepiece_tokenizer()
    tokenizer.eos_token = "</s>"
    model = tiny().model
    model.generation_config.eos_token_id = 5
    LoadedModel.of(model, tokenizer)
    assert model.generation_config.eos_token_id == [2, 5]
