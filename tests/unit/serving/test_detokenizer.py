import pytest
from byte_model import END, byte_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from sentencepiece_tokenizer import WORDS, byte_pieces, pieces, sentencepiece_tokenizer

from baklava.runtime.continuation_text import decode_continuation, decode_tokens
from serve_app.openai.detokenizer import DecodeStream, StopStringFilter

TOKENIZER = byte_tokenizer()


@given(st.text(max_size=30))
def test_no_character_is_sent_before_its_last_byte(text):
    detokenizer = DecodeStream(TOKENIZER)
    sent = ""
    for byte in text.encode():
        sent += detokenizer.push(byte)
        assert text.startswith(sent)
    assert sent == text or text.endswith("\ufffd")
    assert sent + detokenizer.flush() == text


@given(st.binary(max_size=24))
def test_bytes_that_are_no_text_come_out_as_replacement_characters_in_the_end(data):
    detokenizer = DecodeStream(TOKENIZER)
    sent = "".join(map(detokenizer.push, data)) + detokenizer.flush()
    assert sent.replace("\ufffd", "") == data.decode(errors="replace").replace("\ufffd", "")


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
@pytest.mark.parametrize("before", range(1, 9))
def test_a_prompt_that_ends_inside_a_character_spoils_none_of_the_next(kind, before):
    tokenizer = sentencepiece_tokenizer(kind)
    ids = byte_pieces(tokenizer, "日本語")
    stream = DecodeStream(tokenizer, ids[:before])
    text = "".join(map(stream.push, ids[before:])) + stream.flush()
    assert text == "日本語"[before // 3 :]


def test_the_end_token_has_no_text():
    detokenizer = DecodeStream(TOKENIZER)
    assert detokenizer.push(END) + detokenizer.push(65) == "A"


@pytest.mark.parametrize("tokenizer", [sentencepiece_tokenizer("unigram"), sentencepiece_tokenizer("bpe")])
@given(st.text("é😀 aP.", max_size=6), st.lists(st.sampled_from([*WORDS, "é", "😀", "</s>", "<tool>"]), max_size=9))
def test_a_text_continues_its_prompt_whatever_the_tokens(tokenizer, before, names):
    def tokens(name):
        return byte_pieces(tokenizer, name) if name in "é😀" else pieces(tokenizer, name)

    prompt = tokenizer.encode(before)
    ids = [token for name in names for token in tokens(name)]
    stream = DecodeStream(tokenizer, prompt)
    sent = "".join(map(stream.push, ids))
    assert stream.flush() == ""
    assert decode_tokens(tokenizer, prompt) + sent == decode_tokens(tokenizer, [*prompt, *ids])
    assert sent == decode_continuation(tokenizer, prompt, ids)


@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=5), max_size=4), st.data())
def test_text_before_the_first_stop_string_is_sent_and_never_part_of_one(text, stops, data):
    found = [place for stop in stops if (place := text.find(stop)) >= 0]
    finder, sent, rest = StopStringFilter(stops), "", text
    while rest and not finder.matched:
        size = data.draw(st.integers(1, 3))
        sent += finder.push(rest[:size])
        rest = rest[size:]
    if not finder.matched:
        sent += finder.flush()
    assert finder.matched == bool(found)
    # Of two stop strings the one that is complete first wins, and it may begin later.
    assert text.startswith(sent)
    assert not any(stop in sent for stop in stops)
    assert found or sent == text
