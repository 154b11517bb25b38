"""Requests in the vocabulary of OpenAI's API: their fields, limits, and what is rejected because it is unsupported."""

import logging
from collections.abc import Mapping, Sequence, Set
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, WithJsonSchema, field_validator, model_validator
from pydantic_core import PydanticCustomError

from serve_app.engine.sampling_params import SamplingParams

logger = logging.getLogger("ray.serve")

DEFAULT_COMPLETION_TOKENS = 16
"""Maximum tokens of a completion that names no maximum, as with OpenAI."""

MAX_STOP_STRINGS = 64
"""Maximum strings in `stop`. OpenAI takes 4, but tasks of lm-evaluation-harness have more."""

MAX_STOP_STRING_CHARACTERS = 1024
"""Text of up to this length is buffered while it can still become a stop string."""

MAX_STOP_CHARACTERS = 4096
"""Maximum characters of all strings in `stop` together: each token is compared with all of them."""

MAX_CACHE_SALT_CHARACTERS = 1024
"""Maximum characters of `cache_salt`, which keeps the caches of a client's prompts apart from those of others."""

MAX_SEQUENCES = 128
"""Maximum choices of all prompts of a request together, and so of its prompts and of `n`, as with OpenAI."""

MAX_LOGPROBS = 20
"""Maximum alternatives per token, as with OpenAI's chats."""

FieldTable = Mapping[str, tuple[object, ...]]
"""Names of unsupported fields. Each has the values that are accepted because they change nothing."""

UNSUPPORTED_FIELDS: FieldTable = {
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
    "kv_transfer_params": (),
    "vllm_xargs": (),
}
"""Known fields of OpenAI and vLLM that no request supports."""

UNSUPPORTED_IN_CHATS: FieldTable = {"echo": (False,), "best_of": (1,), "add_special_tokens": (False,)}
UNSUPPORTED_IN_COMPLETIONS: FieldTable = {"top_logprobs": (0,), "chat_template_kwargs": ({},)}
UNSUPPORTED_IN_TOKENIZE: FieldTable = {"chat_template_kwargs": ({},), "return_token_strs": (False,)}

UNSUPPORTED_IN_MESSAGES: FieldTable = {"tool_calls": ([],), "function_call": ({},), "audio": ({},), "refusal": ("",)}
"""What an assistant's message of another server may have besides its text."""

NEUTRAL_FIELDS = frozenset(
    {
        "metadata",
        "parallel_tool_calls",
        "prompt_cache_key",
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
        "store",
        "user",
        "messages.annotations",
    }
)
"""Fields that cannot change an answer of this server. Any value is accepted."""

_KNOWN_FIELDS = NEUTRAL_FIELDS.union(
    UNSUPPORTED_FIELDS, UNSUPPORTED_IN_CHATS, UNSUPPORTED_IN_COMPLETIONS, UNSUPPORTED_IN_TOKENIZE
).union(f"messages.{name}" for name in UNSUPPORTED_IN_MESSAGES)


def find_unsupported(data: object, fields: FieldTable) -> str | None:
    """Return the first of these fields whose value would change something. Null changes nothing."""
    for name in sorted(fields.keys() & (data.keys() if isinstance(data, dict) else ())):
        value = data[name]  # type: ignore[index]  # a dict, or there would be no name
        # 0 == False, but `logprobs: 0` requests something that `logprobs: false` does not.
        neutral = any(value == other and isinstance(value, bool) == isinstance(other, bool) for other in fields[name])
        if value is not None and not neutral:
            return name
    return None


def reject_unsupported(data: object, fields: FieldTable) -> None:
    """Raise an error for the first of these fields whose value would change something."""
    if name := find_unsupported(data, fields):
        raise PydanticCustomError("unsupported", "this server does not support it; leave it out", {"param": name})


def check_unicode(text: str) -> str:
    """Return the text unchanged.

    Raises:
        ValueError: It contains an unpaired surrogate, which JSON can write but UTF-8 cannot encode.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("contains half of a surrogate pair, which is not a character; send both halves") from None
    return text


Text = Annotated[str, AfterValidator(check_unicode)]
TokenIds = list[Annotated[int, Field(strict=True)]]


class RequestModel(BaseModel):
    """An object of a request body. Null means absent, and unknown fields go to `model_extra`."""

    model_config = ConfigDict(frozen=True, extra="allow", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, data: Any) -> Any:
        return {name: value for name, value in data.items() if value is not None} if isinstance(data, dict) else data


class RequestBody(RequestModel):
    """A complete body. Unsupported fields that would change the answer are rejected, unknown ones are logged."""

    unsupported: ClassVar[FieldTable] = UNSUPPORTED_FIELDS

    model: Text | None = None

    @model_validator(mode="before")
    @classmethod
    def _reject_unsupported(cls, data: Any) -> Any:
        reject_unsupported(data, cls.unsupported)
        return data

    @model_validator(mode="after")
    def _warn_about_unknown(self) -> Self:
        if unknown := sorted(_unknown_fields(self) - _KNOWN_FIELDS):
            logger.warning("ignored unknown request fields %.200r", unknown)
        return self


def _unknown_fields(body: RequestModel) -> set[str]:
    nested = {
        f"{name}.{unknown}"
        for name, value in body
        for item in (value if isinstance(value, tuple) else (value,))
        if isinstance(item, RequestModel)
        for unknown in _unknown_fields(item)
    }
    return nested | set(body.model_extra or {})


class StreamOptions(RequestModel):
    """What a stream carries in addition to the text. An answer at once always has its usage."""

    include_usage: bool = False
    continuous_usage_stats: bool = False


class GenerationRequest(RequestBody):
    """Fields of both completions and chats. `top_k` 0 or -1 keeps all tokens, and temperature 0 is greedy."""

    max_tokens: Annotated[int, Field(ge=0)] | None = None
    min_tokens: Annotated[int, Field(ge=0)] = 0
    n: Annotated[int, Field(ge=1, le=MAX_SEQUENCES, strict=True)] = 1
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
        Field(max_length=MAX_STOP_STRINGS),
        WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}),
    ] = ()
    stop_token_ids: Annotated[frozenset[int], Field(max_length=64)] = frozenset()
    ignore_eos: bool = False
    truncate_prompt_tokens: Annotated[int, Field(ge=-1)] | None = None
    return_tokens_as_token_ids: bool = False
    cache_salt: Annotated[Text, Field(min_length=1, max_length=MAX_CACHE_SALT_CHARACTERS)] | None = None
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()

    @property
    def requested_max_tokens(self) -> int | None:
        """Maximum tokens to generate. None means up to the end of the context."""
        return self.max_tokens

    @field_validator("stop", mode="before")
    @classmethod
    def _list_stop_strings(cls, stop: Any) -> Any:
        """Make a single string a list, and leave out empty ones, which end nothing, and repeated ones."""
        stops = [stop] if isinstance(stop, str) else stop
        if not isinstance(stops, list):
            return stops
        others = [item for item in stops if not isinstance(item, str)]  # refused below
        return [*dict.fromkeys(item for item in stops if isinstance(item, str) and item), *others]

    @field_validator("stop")
    @classmethod
    def _limit_stop_characters(cls, stop: tuple[str, ...]) -> tuple[str, ...]:
        if (characters := sum(map(len, stop))) > MAX_STOP_CHARACTERS:
            raise ValueError(
                f"the strings in stop have {characters} characters together, and at most {MAX_STOP_CHARACTERS} are "
                "supported; give fewer or shorter ones"
            )
        return stop

    def to_sampling_params(self, max_tokens: int, stop_token_ids: Set[int] = frozenset()) -> SamplingParams:
        """Return the sampler's parameters of this request, for at most `max_tokens` tokens.

        `stop_token_ids` end an answer in addition to the request's own.
        """
        return SamplingParams(
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
            stop_token_ids=self.stop_token_ids | stop_token_ids,
            min_tokens=self.min_tokens,
            ignore_eos=self.ignore_eos,
        )


class CompletionRequest(GenerationRequest):
    """POST /v1/completions: one prompt or a list of them, as text or as token ids.

    With `echo` an answer begins with its prompt, and log-probabilities cover the prompt as well. With `max_tokens` 0
    the answer is the prompt alone.
    """

    unsupported = {**UNSUPPORTED_FIELDS, **UNSUPPORTED_IN_COMPLETIONS}

    prompt: Annotated[
        tuple[str | TokenIds, ...],
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
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS, strict=True)] | None = None
    echo: bool = False
    best_of: Annotated[int, Field(strict=True)] | None = None
    add_special_tokens: bool = True

    @field_validator("prompt", mode="before")
    @classmethod
    def _wrap_single_prompt(cls, prompt: Any) -> Any:
        prompts = [prompt] if isinstance(prompt, str) or _are_token_ids(prompt) else prompt
        if not isinstance(prompts, list) or not all(isinstance(item, str) or _are_token_ids(item) for item in prompts):
            raise ValueError("must be a string, token ids, or a list of either")
        if len({type(item) for item in prompts}) > 1:
            raise ValueError("must be all strings or all token ids")
        if not 1 <= len(prompts) <= MAX_SEQUENCES:
            raise ValueError(f"{len(prompts)} prompts; send 1 to {MAX_SEQUENCES}")
        return tuple(check_unicode(item) if isinstance(item, str) else item for item in prompts)

    @model_validator(mode="before")
    @classmethod
    def _logprobs_false_is_none(cls, data: Any) -> Any:
        return {**data, "logprobs": None} if isinstance(data, dict) and data.get("logprobs") is False else data

    @model_validator(mode="after")
    def _check_combinations(self) -> Self:
        if self.best_of not in (None, self.n):
            raise _field_error("best_of", f"{self.best_of}, but n is {self.n}; leave it out, or make it equal to n")
        if len(self.prompt) * self.n > MAX_SEQUENCES:
            raise _field_error(
                "n", f"{len(self.prompt)} prompts with {self.n} choices each; {MAX_SEQUENCES} at most together"
            )
        if self.max_tokens == 0 and not self.echo:
            raise _field_error("max_tokens", "0 generates nothing; give at least 1, or set echo")
        return self

    @property
    def requested_max_tokens(self) -> int:
        """Maximum tokens to generate."""
        return DEFAULT_COMPLETION_TOKENS if self.max_tokens is None else self.max_tokens

    @property
    def num_logprobs(self) -> int | None:
        """Alternatives per generated token. None means no log-probabilities."""
        return self.logprobs


class ChatMessage(RequestModel):
    """One message of a chat. Its content may be a list of text parts."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        Text,
        WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "object"}}]}),
    ] = ""

    @field_validator("role", mode="before")
    @classmethod
    def _reject_results_of_tools(cls, role: Any) -> Any:
        if role in ("tool", "function"):
            raise ValueError(
                f"{role!r} answers a call of a tool, and this server supports no tools; send the result as a user's "
                "message"
            )
        return role

    @field_validator("content", mode="before")
    @classmethod
    def _join_text_parts(cls, content: Any) -> Any:
        if not isinstance(content, list):
            return content
        for part in content:
            if not (isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)):
                raise ValueError('only parts like {"type": "text", "text": "..."} are supported')
        return "".join(part["text"] for part in content)

    @model_validator(mode="before")
    @classmethod
    def _reject_unsupported(cls, data: Any) -> Any:
        if name := find_unsupported(data, UNSUPPORTED_IN_MESSAGES):
            raise ValueError(f"{name} is not supported by this server; leave it out")
        return data


class ChatRequest(GenerationRequest):
    """POST /v1/chat/completions. `chat_template_kwargs` are variables of the model's template."""

    unsupported = {**UNSUPPORTED_FIELDS, **UNSUPPORTED_IN_CHATS}

    messages: Annotated[tuple[ChatMessage, ...], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: Annotated[bool, Field(strict=True)] = False
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS, strict=True)] | None = None
    chat_template_kwargs: dict[Text, bool | int | float | Text] = Field({}, max_length=16)

    @model_validator(mode="after")
    def _top_logprobs_need_logprobs(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise _field_error("top_logprobs", "only allowed when logprobs is true")
        return self

    @property
    def requested_max_tokens(self) -> int | None:
        """Maximum tokens to generate. None means up to the end of the context."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def num_logprobs(self) -> int | None:
        """Alternatives per generated token. None means no log-probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None


class TokenizeRequest(RequestBody):
    """POST /tokenize: a text, or the messages of a chat."""

    unsupported = {**UNSUPPORTED_FIELDS, **UNSUPPORTED_IN_TOKENIZE}

    prompt: Text | None = None
    messages: Annotated[tuple[ChatMessage, ...], Field(min_length=1)] | None = None
    add_special_tokens: bool = True

    @model_validator(mode="before")
    @classmethod
    def _reject_unsupported_in_chats(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("messages") is not None:
            reject_unsupported(data, UNSUPPORTED_IN_CHATS)
        return data

    @model_validator(mode="after")
    def _either_prompt_or_messages(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages")
        return self


class DetokenizeRequest(RequestBody):
    """POST /detokenize: token ids."""

    tokens: TokenIds


def _field_error(field: str, message: str) -> PydanticCustomError:
    return PydanticCustomError("misplaced", message, {"param": field})


def _are_token_ids(value: Any) -> bool:
    return isinstance(value, Sequence) and bool(value) and all(type(item) is int for item in value)
