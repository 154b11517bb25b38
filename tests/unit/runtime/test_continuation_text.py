"""Text of tokens in the middle of a text, with tokenizers that drop the first space of what they decode."""

import pytest
from byte_model import byte_tokenizer
from sentencepiece_tokenizer import byte_pieces, pieces, sentencepiece_tokenizer

from baklava.runtime.continuation_text import decode_continuation, decode_tokens

KINDS = ("unigram", "bpe")


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_space_of_a_continuation_stays(kind):
    tokenizer = sentencepiece_tokenizer(kind)
    prompt = tokenizer.encode("The capital of France is")
    answer = pieces(tokenizer, "▁Paris", "▁and", "▁Rome", ".")
    assert decode_continuation(tokenizer, prompt, answer) == " Paris and Rome."
    assert decode_tokens(tokenizer, answer) == "Paris and Rome."  # what the start of a text would be


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tail", [["</s>"], ["<|user|>", "<|im_end|>"], ["▁"], ["<0xC3>", "<0xA9>"]])
def test_special_tokens_spaces_and_bytes_at_the_end_of_a_prompt_keep_the_space(kind, tail):
    tokenizer = sentencepiece_tokenizer(kind)
    prompt = [*tokenizer.encode("The capital"), *pieces(tokenizer, *tail)]
    assert decode_continuation(tokenizer, prompt, pieces(tokenizer, "▁Paris")) == " Paris"


def test_a_text_that_only_special_tokens_precede_begins_without_the_space():
    tokenizer = sentencepiece_tokenizer()
    assert decode_continuation(tokenizer, [], pieces(tokenizer, "▁Paris")) == "Paris"
    assert decode_continuation(tokenizer, pieces(tokenizer, "<s>", "<|user|>"), pieces(tokenizer, "▁Paris")) == "Paris"


@pytest.mark.parametrize("kind", KINDS)
def test_characters_of_several_bytes_continue_each_other(kind):
    tokenizer = sentencepiece_tokenizer(kind)
    prompt = tokenizer.encode("The 😀😀")
    assert decode_continuation(tokenizer, prompt, byte_pieces(tokenizer, "€é")) == "€é"
    euro = byte_pieces(tokenizer, "€")
    assert decode_continuation(tokenizer, [*prompt, *euro[:2]], euro[2:]) == "€"


def test_a_character_that_begins_in_the_prompt_comes_whole():
    ids = list("aé€".encode())
    assert decode_continuation(byte_tokenizer(), ids[:4], ids[4:]) == "€"
    assert decode_continuation(byte_tokenizer(), list("a\ufffd".encode()), [98]) == "b"
