"""What a request for text may say, in the vocabulary of OpenAI's API."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import Field, WithJsonSchema, field_validator, model_validator
from pydantic_core import PydanticCustomError

from serve_app.engine.sampler import Sampling
from serve_app.openai.request_base import CHAT_ONLY, COMPLETION_ONLY, NEUTRAL, Body, Ids, RequestBody, Text, whole

DEFAULT_COMPLETION_TOKENS = 16
"""Tokens of a text completion that names no maximum, as with OpenAI."""

MAX_STOP_STRING_CHARACTERS = 256
"""Most characters of a stop string; that much text can be held back while it may still become one."""

MAX_PROMPTS = 32
"""Most prompts of one text completion."""

MAX_CHOICES = 16
"""Most continuations of one prompt, `n`."""

MAX_SEQUENCES = 64
"""Most continuations of all prompts of a request together."""

MAX_COMPLETION_LOGPROBS, MAX_CHAT_LOGPROBS = 5, 20
"""Most alternatives per token, as with OpenAI; each is one more entry of every answer."""


class StreamOptions(Body):
    """What a stream carries beside the text."""

    include_usage: bool = False
    continuous_usage_stats: bool = False


class GenerationRequest(RequestBody):
    """The fields that chat and completion share. `top_k` 0 or -1 keeps all tokens; temperature 0 is greedy."""

    max_tokens: Annotated[int, Field(ge=0)] | None = None
    min_tokens: Annotated[int, Field(ge=0)] = 0
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES, strict=True)] = 1
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] = 0
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] = 1.0
    logit_bias: dict[int, Annotated[float, Field(ge=-100, le=100)]] = Field({}, max_length=1024)
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Annotated[
        tuple[Annotated[Text, Field(min_length=1, max_length=MAX_STOP_STRING_CHARACTERS)], ...],
        Field(max_length=4),
        WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}),
    ] = ()
    stop_token_ids: Annotated[frozenset[int], Field(max_length=64)] = frozenset()
    ignore_eos: bool = False
    truncate_prompt_tokens: Annotated[int, Field(ge=-1)] | None = None
    return_tokens_as_token_ids: bool = False
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    user: Text | None = None

    @property
    def requested_max_tokens(self) -> int | None:
        """Most tokens to generate; None is what is left of the context."""
        return self.max_tokens

    @field_validator("stop", mode="before")
    @classmethod
    def _one_stop_is_a_list_of_one(cls, stop: Any) -> Any:
        return (stop,) if isinstance(stop, str) else stop

    @model_validator(mode="after")
    def _options_belong_to_streams(self) -> Self:
        if not self.stream and "stream_options" in self.model_fields_set:
            raise _misplaced("stream_options", "only allowed when stream is true")
        return self

    def sampling(self, max_tokens: int) -> Sampling:
        """The sampler's view of this request, for at most `max_tokens` tokens."""
        return Sampling(
            max_tokens=max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=max(self.top_k, 0),
            min_p=self.min_p,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            repetition_penalty=self.repetition_penalty,
            logit_bias=dict(self.logit_bias),
            seed=self.seed,
            stop_ids=self.stop_token_ids,
            min_tokens=self.min_tokens,
            ignore_eos=self.ignore_eos,
        )


class CompletionRequest(GenerationRequest):
    """POST /v1/completions: prompts as text or as token ids, one or a list of them.

    With `echo` an answer begins with its prompt, and log-probabilities are told for it as well; with `max_tokens` 0
    it is all there is.
    """

    refused = NEUTRAL | COMPLETION_ONLY

    prompt: Annotated[
        tuple[str | Ids, ...],
        WithJsonSchema(
            {
                "anyOf": [
                    {"type": "string"},
                    {"type": "array", "items": {"type": "string"}},
                    {"type": "array", "items": {"type": "integer"}},
                    {"type": "array", "items": {"type": "array", "items": {"type": "integer"}}},
                ]
            }
        ),
    ]
    logprobs: Annotated[int, Field(ge=0, le=MAX_COMPLETION_LOGPROBS, strict=True)] | None = None
    echo: bool = False
    best_of: Annotated[int, Field(strict=True)] | None = None
    add_special_tokens: bool = True

    @field_validator("prompt", mode="before")
    @classmethod
    def _as_prompts(cls, prompt: Any) -> Any:
        prompts = [prompt] if isinstance(prompt, str) or _are_ids(prompt) else prompt
        if not isinstance(prompts, list) or not all(isinstance(one, str) or _are_ids(one) for one in prompts):
            raise ValueError("must be a string, token ids, or a list of either")
        if len({type(one) for one in prompts}) > 1:
            raise ValueError("must be all strings or all token ids")
        if not 1 <= len(prompts) <= MAX_PROMPTS:
            raise ValueError(f"{len(prompts)} prompts; send 1 to {MAX_PROMPTS}")
        return tuple(whole(one) if isinstance(one, str) else one for one in prompts)

    @model_validator(mode="before")
    @classmethod
    def _no_logprobs_is_none_of_them(cls, data: Any) -> Any:
        return {**data, "logprobs": None} if isinstance(data, dict) and data.get("logprobs") is False else data

    @model_validator(mode="after")
    def _is_not_too_much(self) -> Self:
        if self.best_of not in (None, self.n):
            raise _misplaced("best_of", f"{self.best_of}, but {self.n} answers; leave it out, or make it equal to n")
        if len(self.prompt) * self.n > MAX_SEQUENCES:
            raise _misplaced("n", f"{len(self.prompt)} prompts of {self.n} answers; {MAX_SEQUENCES} at most together")
        if self.max_tokens == 0 and not self.echo:
            raise _misplaced("max_tokens", "0 leaves nothing to answer without echo; ask for at least 1")
        return self

    @property
    def requested_max_tokens(self) -> int:
        """Most tokens to generate."""
        return DEFAULT_COMPLETION_TOKENS if self.max_tokens is None else self.max_tokens

    @property
    def alternatives(self) -> int | None:
        """Log-probabilities of generated tokens are asked for, each with so many alternatives; None: not at all."""
        return self.logprobs


class Message(Body):
    """One turn of a chat; its content may come as a list of text parts."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        Text,
        WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "object"}}]}),
    ] = ""

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
    """POST /v1/chat/completions. `chat_template_kwargs` are variables of the model's template."""

    refused = NEUTRAL | CHAT_ONLY

    messages: Annotated[tuple[Message, ...], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: Annotated[bool, Field(strict=True)] = False
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_CHAT_LOGPROBS, strict=True)] | None = None
    chat_template_kwargs: dict[Text, bool | int | float | Text] = Field({}, max_length=16)

    @model_validator(mode="after")
    def _alternatives_belong_to_logprobs(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise _misplaced("top_logprobs", "only allowed when logprobs is true")
        return self

    @property
    def requested_max_tokens(self) -> int | None:
        """Most tokens to generate; None is what is left of the context."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def alternatives(self) -> int | None:
        """Log-probabilities of generated tokens are asked for, each with so many alternatives; None: not at all."""
        return (self.top_logprobs or 0) if self.logprobs else None


def _misplaced(field: str, message: str) -> PydanticCustomError:
    return PydanticCustomError("misplaced", message, {"param": field})


def _are_ids(value: Any) -> bool:
    return isinstance(value, Sequence) and bool(value) and all(type(item) is int for item in value)


def _part_text(part: Any) -> str:
    if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
        raise ValueError('only parts like {"type": "text", "text": "..."} are supported')
    return part["text"]
