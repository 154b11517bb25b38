"""Log-probabilities as OpenAI's two kinds of answer write them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from serve_app.text import Word

Json = dict[str, Any]

LEAST = -9999.0
"""Stands for a log-probability of minus infinity, which JSON has no number for."""


@dataclass(frozen=True)
class Names:
    """Writes tokens as text, or, with `as_ids`, as `token_id:7`."""

    tokenizer: Any
    as_ids: bool = False

    def text(self, id: int) -> str:
        """A token by itself; half a character is U+FFFD."""
        if self.as_ids:
            return f"token_id:{id}"
        return self.tokenizer.decode([id], skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def apart(self, ids: Sequence[int]) -> dict[int, str]:
        """A name for each of these tokens and no name twice: of those that look the same, only the first has its text.

        Clients tell tokens apart by these names, and look for the likeliest one among them.
        """
        named: dict[int, str] = {}
        for id in ids:
            text = self.text(id)
            named.setdefault(id, f"token_id:{id}" if text in named.values() else text)
        return named


def of_completion(words: Sequence[Word], names: Names) -> Json:
    """Four lists, one entry per token; of a prompt's first token nothing is known."""
    named = [names.apart([*(id for id, _ in word.top), word.id]) for word in words]
    return {
        "tokens": [name[word.id] for word, name in zip(words, named, strict=True)],
        "token_logprobs": [None if word.logprob is None else _number(word.logprob) for word in words],
        "top_logprobs": [_top(word, name) for word, name in zip(words, named, strict=True)],
        "text_offset": [word.offset for word in words],
    }


def of_chat(words: Sequence[Word], names: Names) -> Json:
    """One object per token, with its UTF-8 bytes where it is whole characters."""
    return {"content": [_entry(word, names) for word in words], "refusal": None}


def _top(word: Word, named: dict[int, str]) -> dict[str, float] | None:
    if word.logprob is None:
        return None
    # The token itself is always there, so that a client can see whether it was the likeliest.
    return {named[id]: _number(logprob) for id, logprob in (*word.top, (word.id, word.logprob))}


def _entry(word: Word, names: Names) -> Json:
    top = [_named(id, logprob, names) for id, logprob in word.top]
    return {**_named(word.id, word.logprob or 0.0, names), "top_logprobs": top}


def _named(id: int, logprob: float, names: Names) -> Json:
    text = names.text(id)
    whole = None if "\ufffd" in text or names.as_ids else list(text.encode())
    return {"token": text, "logprob": _number(logprob), "bytes": whole}


def _number(logprob: float) -> float:
    return max(logprob, LEAST)
