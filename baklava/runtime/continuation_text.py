"""The text of tokens that continue others: many tokenizers drop the space before the first word that they decode."""

from collections.abc import Sequence
from typing import Any

MAX_CONTEXT_TOKENS = 32
"""Tokens among which the context of a continuation is looked for."""


def decode_tokens(tokenizer: Any, ids: Sequence[int]) -> str:
    """Return the text of tokens, without special ones, as the start of a text."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))


def has_text(tokenizer: Any, token_id: int) -> bool:
    """Return whether a token writes anything in mid-text. Special tokens and unknown ones do not."""
    return bool(decode_tokens(tokenizer, [token_id] * 2))


def special_token_text(tokenizer: Any, token_id: int) -> str:
    """Return how a special token is written, and nothing for a token that is part of the text."""
    return "" if has_text(tokenizer, token_id) else str(tokenizer.decode([token_id], skip_special_tokens=False))


def text_context(tokenizer: Any, before: Sequence[int]) -> list[int]:
    """Return the last of these tokens, as many as a continuation needs to be decoded as mid-text.

    They begin with a whole character. There are none if the tokens have no text.
    """
    context: list[int] = []
    for token_id in reversed(before[-MAX_CONTEXT_TOKENS:]):
        if has_text(tokenizer, token_id):
            context.insert(0, token_id)
            text = decode_tokens(tokenizer, context)
            if text and not text.startswith("\ufffd"):
                break
    return context


def decode_continuation(tokenizer: Any, before: Sequence[int], ids: Sequence[int]) -> str:
    """Return the text that `ids` add to the text of the tokens before them."""
    context = text_context(tokenizer, before)
    added, _ = added_text(tokenizer, context, decode_tokens(tokenizer, [*context, *ids]))
    return added


def added_text(tokenizer: Any, before: Sequence[int], text: str) -> tuple[str, int]:
    """Return what `text` adds to that of the tokens `before`, with which it begins, and how many of them are complete.

    A character that the rest of them begins belongs to the added text.
    """
    end = len(before)
    known = decode_tokens(tokenizer, before)
    while known.endswith("\ufffd") and not text.startswith(known):
        end -= 1
        known = decode_tokens(tokenizer, before[:end])
    return text[len(known) :], end
