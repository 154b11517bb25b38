"""What a request may say, in the vocabulary of OpenAI's API.

null means absent. Unknown fields are ignored with a warning in the log, since clients send many; a field that is
known, would change the answer and is not supported is refused by name.
"""

import logging
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from serve_app.sampling import Sampling

logger = logging.getLogger("ray.serve")

COMPLETION_TOKENS = 16
"""Tokens of a text completion that names no maximum, as with OpenAI."""

STOP_LENGTH = 256
"""Most characters of a stop string; that much text can be held back while it may still become one."""

_NEUTRAL: dict[str, tuple[object, ...]] = {
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
    "modalities": (["text"],),
    "audio": (),
    "n": (1,),
    "best_of": (1,),
    "logprobs": (False,),
    "top_logprobs": (),
    "prompt_logprobs": (),
    "echo": (False,),
    "suffix": ("",),
    "logit_bias": ({},),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "use_beam_search": (False,),
    "truncate_prompt_tokens": (),
    "add_special_tokens": (True,),
}
"""Fields that are recognised and not supported, each with the values that ask for nothing."""


class Body(BaseModel):
    """An object of a request in which null is absent and unknown fields are kept apart."""

    model_config = ConfigDict(frozen=True, extra="allow", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, data: Any) -> Any:
        return {name: value for name, value in data.items() if value is not None} if isinstance(data, dict) else data


class StreamOptions(Body):
    """What a stream carries beside the text."""

    include_usage: bool = False
    continuous_usage_stats: bool = False


class GenerationRequest(Body):
    """The fields that chat and completion share. `top_k` 0 or -1 keeps all tokens; temperature 0 is greedy."""

    model: str | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    min_tokens: Annotated[int, Field(ge=0)] = 0
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=-1)] = 0
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: tuple[Annotated[str, Field(min_length=1, max_length=STOP_LENGTH)], ...] = Field((), max_length=4)
    stop_token_ids: Annotated[frozenset[int], Field(max_length=64)] = frozenset()
    ignore_eos: bool = False
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    user: str | None = None

    @property
    def wanted_tokens(self) -> int | None:
        """Most tokens to generate; None is what is left of the context."""
        return self.max_tokens

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, data: Any) -> Any:
        for name in _NEUTRAL.keys() & (data.keys() if isinstance(data, dict) else ()):
            if data[name] is not None and not _is_neutral(name, data[name]):
                raise PydanticCustomError(
                    "unsupported", "this server does not support it; leave it out", {"param": name}
                )
        return data

    @field_validator("stop", mode="before")
    @classmethod
    def _one_stop_is_a_list_of_one(cls, stop: Any) -> Any:
        return (stop,) if isinstance(stop, str) else stop

    @model_validator(mode="after")
    def _options_belong_to_streams(self) -> Self:
        if not self.stream and "stream_options" in self.model_fields_set:
            raise PydanticCustomError("misplaced", "only allowed when stream is true", {"param": "stream_options"})
        return self

    @model_validator(mode="after")
    def _warn_about_unknown(self) -> Self:
        if unknown := sorted((self.model_extra or {}).keys() - _NEUTRAL.keys()):
            logger.warning("ignored unknown request fields %.200r", unknown)
        return self

    def sampling(self, max_tokens: int) -> Sampling:
        """The sampler's view of this request, for at most `max_tokens` tokens."""
        return Sampling(
            max_tokens=max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=max(self.top_k, 0),
            min_p=self.min_p,
            seed=self.seed,
            stop_ids=self.stop_token_ids,
            min_tokens=self.min_tokens,
            ignore_eos=self.ignore_eos,
        )


class CompletionRequest(GenerationRequest):
    """POST /v1/completions: one prompt, as text or as token ids; a list may hold it."""

    prompt: str | list[int]

    @field_validator("prompt", mode="before")
    @classmethod
    def _one_prompt(cls, prompt: Any) -> Any:
        if isinstance(prompt, list) and any(isinstance(item, str | list) for item in prompt):
            if len(prompt) > 1:
                raise ValueError(f"{len(prompt)} prompts, but a request takes one; send one request each")
            prompt = prompt[0]
        if not isinstance(prompt, str) and not _are_ids(prompt):
            raise ValueError("must be a string, token ids, or a list that holds one of these")
        return prompt

    @property
    def wanted_tokens(self) -> int:
        """Most tokens to generate."""
        return self.max_tokens or COMPLETION_TOKENS


class Message(Body):
    """One turn of a chat; its content may come as a list of text parts."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str = ""

    @field_validator("content", mode="before")
    @classmethod
    def _join_parts(cls, content: Any) -> Any:
        return "".join(map(_part_text, content)) if isinstance(content, list) else content

    @model_validator(mode="after")
    def _refuse_tool_calls(self) -> Self:
        if called := (self.model_extra or {}).keys() & {"tool_calls", "function_call"}:
            raise ValueError(f"{min(called)} is not supported by this server; leave it out")
        return self


class ChatRequest(GenerationRequest):
    """POST /v1/chat/completions."""

    messages: Annotated[tuple[Message, ...], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None

    @property
    def wanted_tokens(self) -> int | None:
        """Most tokens to generate; None is what is left of the context."""
        return self.max_completion_tokens or self.max_tokens


def _is_neutral(name: str, value: object) -> bool:
    # 0 == False, but `logprobs: 0` asks for something that `logprobs: false` does not.
    return any(value == neutral and isinstance(value, bool) == isinstance(neutral, bool) for neutral in _NEUTRAL[name])


def _are_ids(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int for item in value)


def _part_text(part: Any) -> str:
    if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
        raise ValueError('only parts like {"type": "text", "text": "..."} are supported')
    return part["text"]
