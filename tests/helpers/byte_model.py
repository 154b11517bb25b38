"""A tiny random model whose tokens are bytes, so that characters can span tokens in tests of text."""

import dataclasses
from collections.abc import Callable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from baklava.runtime.model_loader import LoadedModel

END = 256
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'assistant' and loop.first %}{{ raise_exception('begin with a user') }}"
    "{% endif %}{{ m.role[0] }}:{{ m.content }};{% endfor %}"
)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer whose token n is byte n; END ends a text."""
    letters = bytes_to_unicode()
    tokenizer = Tokenizer(models.BPE(vocab={letters[byte]: byte for byte in range(256)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")
    wrapped.chat_template = TEMPLATE
    return wrapped


def byte_model(tiny: Callable[..., LoadedModel], **fields: object) -> LoadedModel:
    """Return a tiny model of the ASCII bytes, so that all it generates is text, with 256 positions."""
    loaded = tiny(**({"vocab_size": 128, "max_position_embeddings": 256} | fields))
    return dataclasses.replace(loaded, tokenizer=byte_tokenizer())
