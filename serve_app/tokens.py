"""/tokenize, /detokenize and /tokenizer_info: what clients ask that count or score tokens themselves."""

from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from serve_app.body import Ids, RequestBody, Text
from serve_app.prompts import Prompts
from serve_app.refused import CHAT_ONLY, NEUTRAL, TOKENIZE_ONLY, refuse
from serve_app.schema import Message


class TokenizeRequest(RequestBody):
    """A text, or the messages of a chat, up to the answer that they ask for."""

    refused = NEUTRAL | TOKENIZE_ONLY

    prompt: Text | None = None
    messages: Annotated[tuple[Message, ...], Field(min_length=1)] | None = None
    add_special_tokens: bool = True

    @model_validator(mode="before")
    @classmethod
    def _refuse_what_no_chat_has(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("messages") is not None:
            refuse(data, CHAT_ONLY)
        return data

    @model_validator(mode="after")
    def _is_one_of_both(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages")
        return self


class DetokenizeRequest(RequestBody):
    """Token ids."""

    tokens: Ids


def tokenized(prompts: Prompts, request: TokenizeRequest) -> dict[str, Any]:
    """The tokens and their number, beside the most that the model takes; raises ApiError."""
    if request.messages is not None:
        ids = prompts.chat(request.messages, {})
    else:
        ids = prompts.text(request.prompt or "", special=request.add_special_tokens)
    return {"tokens": ids, "count": len(ids), "max_model_len": prompts.limit}


def information(tokenizer: Any) -> dict[str, Any]:
    """Special tokens and the chat template."""
    special = {name: getattr(tokenizer, name, None) for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
    return {**special, "chat_template": tokenizer.chat_template, "tokenizer_class": type(tokenizer).__name__}
