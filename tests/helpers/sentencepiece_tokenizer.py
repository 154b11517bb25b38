"""Tokenizers of SentencePiece's kind: words begin with `▁`, unknown characters are bytes, and the first space goes."""

from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

BOS, EOS = 1, 2
WORDS = ("▁The", "▁capital", "▁of", "▁France", "▁is", "▁Paris", "▁and", "▁Rome", ".", "▁", "is", "P", "a")


def _unigram(special: list[str], words: list[str]) -> models.Model:
    scores = {word: -1.0 - (len(word) == 1) for word in words}
    vocab = [(piece, scores.get(piece, -20.0)) for piece in [*special, *words]]
    return models.Unigram(vocab, unk_id=0, byte_fallback=True)


def _bpe(special: list[str], words: list[str]) -> models.Model:
    parts = dict.fromkeys(word[:end] for word in words for end in range(1, len(word) + 1))
    parts |= dict.fromkeys("".join(words))
    vocab = {piece: number for number, piece in enumerate(dict.fromkeys([*special, *words, *parts]))}
    merges = [(part[:-1], part[-1]) for part in parts if len(part) > 1]
    return models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)


def sentencepiece_tokenizer(kind: str = "unigram", end: str = "</s>") -> PreTrainedTokenizerFast:
    """Return a tokenizer like those of Llama 2 ("bpe") or T5 ("unigram"), with `<s>` before each text.

    `<|im_end|>` and `<|user|>` are special tokens, and `<tool>` is an added one with a text; `end` is its own end.
    """
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer = Tokenizer({"unigram": _unigram, "bpe": _bpe}[kind](special, list(WORDS)))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", add_bos_token=True
    )
    wrapped.add_special_tokens({"extra_special_tokens": ["<|im_end|>", "<|user|>"]})
    wrapped.add_tokens(["<tool>"])
    wrapped.eos_token = end
    wrapped.chat_template = "{% for m in messages %}{{ bos_token }}{{ m.content }}{% endfor %}"
    return wrapped


def pieces(tokenizer: PreTrainedTokenizerFast, *names: str) -> list[int]:
    """Return the ids of tokens by their names in the vocabulary."""
    ids = tokenizer.convert_tokens_to_ids(list(names))
    assert tokenizer.unk_token_id not in ids, names
    return ids


def byte_pieces(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """Return the tokens of the bytes of a text."""
    return pieces(tokenizer, *(f"<0x{byte:02X}>" for byte in text.encode()))
