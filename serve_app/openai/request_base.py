"""Fields of a request that are recognised and not supported: refused by name, never passed over in silence."""

import logging
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

Refused = Mapping[str, tuple[object, ...]]

NEUTRAL: dict[str, tuple[object, ...]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "structured_outputs": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_decoding_backend": (),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "reasoning_effort": (),
    "verbosity": (),
    "suffix": ("",),
    "prompt_logprobs": (),
    "prompt_embeds": (),
    "use_beam_search": (False,),
    "length_penalty": (1,),
    "early_stopping": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "include_stop_str_in_output": (False,),
    "allowed_token_ids": ([],),
    "bad_words": ([],),
    "logits_processors": ([],),
    "return_token_ids": (False,),
    "chat_template": (),
    "documents": ([],),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "priority": (0,),
    "cache_salt": (),
    "kv_transfer_params": (),
    "vllm_xargs": (),
}
"""Each field with the values that ask for nothing."""

CHAT_ONLY: dict[str, tuple[object, ...]] = {"echo": (False,), "best_of": (1,), "add_special_tokens": (False,)}
"""The same for fields that belong to text completions, when a chat has them."""

COMPLETION_ONLY: dict[str, tuple[object, ...]] = {"top_logprobs": (), "chat_template_kwargs": ({},)}
"""The same for fields that belong to chats, when a text completion has them."""

TOKENIZE_ONLY: dict[str, tuple[object, ...]] = {"chat_template_kwargs": ({},), "return_token_strs": (False,)}
"""The same for fields of chats, and of other servers, when a text or a chat is to become tokens."""

KNOWN = frozenset(NEUTRAL | CHAT_ONLY | COMPLETION_ONLY | TOKENIZE_ONLY)
"""All of their names."""


def refuse(data: object, fields: Refused) -> None:
    """Raise for the first of these fields that asks for something; null asks for nothing."""
    for name in sorted(fields.keys() & (data.keys() if isinstance(data, dict) else ())):
        value = data[name]  # type: ignore[index]  # a dict, or there would be no name
        if value is not None and not _is_among(value, fields[name]):
            raise PydanticCustomError("unsupported", "this server does not support it; leave it out", {"param": name})


def _is_among(value: object, neutral: tuple[object, ...]) -> bool:
    # 0 == False, but `logprobs: 0` asks for something that `logprobs: false` does not.
    return any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in neutral)


logger = logging.getLogger("ray.serve")

Ids = list[Annotated[int, Field(strict=True)]]


def whole(text: str) -> str:
    """The same text; raises ValueError for half of a surrogate pair, which JSON can write and nobody can encode."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("has half of a surrogate pair, which is no character; send whole ones") from None
    return text


Text = Annotated[str, AfterValidator(whole)]


class Body(BaseModel):
    """An object of a request in which null is absent and unknown fields are kept apart."""

    model_config = ConfigDict(frozen=True, extra="allow", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, data: Any) -> Any:
        return {name: value for name, value in data.items() if value is not None} if isinstance(data, dict) else data


class RequestBody(Body):
    """A whole body. What it asks for and nobody supports is refused; what nobody knows is told to the log."""

    refused: ClassVar[Refused] = NEUTRAL
    """Fields that are refused in this body, each with the values that ask for nothing."""

    model: Text | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, data: Any) -> Any:
        refuse(data, cls.refused)
        return data

    @model_validator(mode="after")
    def _warn_about_unknown(self) -> Self:
        if unknown := sorted(_extra(self) - KNOWN):
            logger.warning("ignored unknown request fields %.200r", unknown)
        return self


def _extra(body: Body) -> set[str]:
    """Names of fields that a body, or one inside it, does not have."""
    inside = {
        f"{name}.{extra}"
        for name, value in body
        for one in (value if isinstance(value, tuple) else (value,))
        if isinstance(one, Body)
        for extra in _extra(one)
    }
    return inside | set(body.model_extra or {})
