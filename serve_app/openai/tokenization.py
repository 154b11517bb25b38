"""Turn the prompts and messages of requests into token ids that the model accepts."""

import inspect
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from pydantic import TypeAdapter, ValidationError

from baklava.errors import UserError
from baklava.runtime.continuation_text import decode_tokens
from baklava.runtime.model_loader import LoadedModel
from serve_app.openai.errors import ApiError, context_length_exceeded
from serve_app.openai.protocol import ChatMessage, ChatRequest, CompletionRequest, GenerationRequest

MessageDict = dict[str, str]
"""A chat message as templates read it: role and content."""

_TEMPLATE_INPUT_NAMES = frozenset({"self", "messages", "conversations"})  # names that the tokenizer itself passes

# A template is code. What it computes from outside messages and variables can fail as code does.
_TEMPLATE_ERRORS = (TemplateError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError)


@dataclass(frozen=True)
class Prompt:
    """Token ids of a prompt, the text that an echo repeats, and the maximum tokens to generate."""

    ids: tuple[int, ...]
    text: str
    max_tokens: int


@dataclass(frozen=True)
class PromptEncoder:
    """Encode requests for one model. `max_model_len` is the maximum of prompt and completion tokens together."""

    tokenizer: Any
    vocab_size: int
    max_model_len: int

    @classmethod
    def from_model(cls, loaded: LoadedModel) -> "PromptEncoder":
        """Return the encoder for a model."""
        return cls(loaded.tokenizer, loaded.model.get_input_embeddings().num_embeddings, loaded.max_length)

    def encode(self, request: ChatRequest | CompletionRequest) -> list[Prompt]:
        """Return the prompts of a request; raises ApiError."""
        self.check_token_ids("stop_token_ids", request.stop_token_ids)
        self.check_token_ids("logit_bias", request.logit_bias)
        if isinstance(request, ChatRequest):
            return [self._prompt(request, self.encode_chat(request.messages, request.chat_template_kwargs), "")]
        return [self._encode_completion(request, prompt) for prompt in request.prompt]

    def encode_text(self, prompt: str, *, add_special_tokens: bool) -> list[int]:
        """Return the token ids of a text."""
        return self.tokenizer(prompt, add_special_tokens=add_special_tokens, verbose=False)["input_ids"]

    def encode_chat(self, messages: Sequence[ChatMessage], template_kwargs: dict[str, Any]) -> list[int]:
        """Return the token ids of a chat up to the start of the next answer; raises ApiError."""
        if not self.tokenizer.chat_template:
            raise ApiError("This model has no chat template; use /v1/completions.", param="messages")
        # The tokenizer takes the template and its variables in one call. Only variables may come from a client.
        reserved = inspect.signature(self.tokenizer.apply_chat_template).parameters.keys() | _TEMPLATE_INPUT_NAMES
        if taken := reserved & template_kwargs.keys():
            raise ApiError(f"A request may not set `{min(taken)}`; leave it out.", param="chat_template_kwargs")
        # OpenAI renamed the system role. Chat templates know the old name.
        turns = [
            {"role": "system" if message.role == "developer" else message.role, "content": message.content}
            for message in messages
        ]
        try:
            return self._apply_template(turns, template_kwargs)
        except _TEMPLATE_ERRORS as error:
            raise ApiError(f"The model's chat template rejects these messages: {error}", param="messages") from None

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of tokens, including special ones; raises ApiError."""
        self.check_token_ids("tokens", ids)
        return self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def find_stop_tokens(self, stop_strings: Sequence[str]) -> frozenset[int]:
        """Return the special and added tokens that stop strings name: special ones never get into a text."""
        return frozenset(
            token_id
            for token_id, token in (self.tokenizer.added_tokens_decoder.items() if stop_strings else ())
            if token.content in stop_strings and token_id < self.vocab_size
        )

    def shared_chat_prefix(self, messages: Sequence[MessageDict]) -> tuple[int, ...]:
        """Return the token ids with which each chat begins that has these first messages.

        Raises:
            UserError: The model's template rejects these messages, or renders them depending on later ones.
        """
        try:
            first, second = (
                self._apply_template([*messages, {"role": "user", "content": text}], {})
                for text in ("Why?", "23 is prime.")
            )
        except _TEMPLATE_ERRORS as error:
            raise UserError(f"the model's chat template rejects the pinned prefix: {error}") from None
        length = next(position for position, (a, b) in enumerate(zip(first, second, strict=False)) if a != b)
        prefix = tuple(first[:length])
        if messages[-1]["content"].strip() not in self.tokenizer.decode(list(prefix)):
            raise UserError(
                "the model's chat template renders the pinned prefix depending on later messages; pin another prefix"
            )
        return prefix

    def check_token_ids(self, field: str, ids: Iterable[int]) -> None:
        """Raise ApiError if the model does not have one of these tokens."""
        outside = next((token_id for token_id in ids if not 0 <= token_id < self.vocab_size), None)
        if outside is not None:
            raise ApiError(
                f"Token id {outside} is outside the model's vocabulary, 0 to {self.vocab_size - 1}.", param=field
            )

    def _apply_template(self, turns: Sequence[MessageDict], template_kwargs: dict[str, Any]) -> list[int]:
        rendered = self.tokenizer.apply_chat_template(
            turns, add_generation_prompt=True, return_dict=True, **template_kwargs
        )
        return rendered["input_ids"]

    def _encode_completion(self, request: CompletionRequest, prompt: str | list[int]) -> Prompt:
        text = prompt if isinstance(prompt, str) else ""
        ids = (
            self.encode_text(prompt, add_special_tokens=request.add_special_tokens)
            if isinstance(prompt, str)
            else prompt
        )
        encoded = self._prompt(request, ids, text)
        if request.echo and (not text or request.truncate_prompt_tokens is not None):
            return replace(encoded, text=decode_tokens(self.tokenizer, encoded.ids))
        return encoded

    def _prompt(self, request: GenerationRequest, ids: list[int], text: str) -> Prompt:
        if (keep := request.truncate_prompt_tokens) is not None:
            if keep == -1:  # as many as fit; a request that is too long even so is rejected below
                keep = max(1, self.max_model_len - (request.requested_max_tokens or 1))
            ids = ids[max(0, len(ids) - keep) :]
        if not ids:
            raise ApiError("The prompt has no tokens; give at least one.", param="prompt")
        self.check_token_ids("prompt", ids)
        available = self.max_model_len - len(ids)
        max_tokens = max(1, available) if request.requested_max_tokens is None else request.requested_max_tokens
        if max_tokens > available:
            raise context_length_exceeded(self.max_model_len, len(ids), max_tokens)
        if request.min_tokens > max_tokens:
            message = f"min_tokens {request.min_tokens} is above the maximum of {max_tokens}."
            raise ApiError(message, param="min_tokens")
        return Prompt(tuple(ids), text, max_tokens)


_MESSAGES = TypeAdapter(list[dict[str, str]])


@dataclass(frozen=True)
class PinnedPrefix:
    """The beginning of many chats, or, without messages, of many texts."""

    name: str
    messages: tuple[MessageDict, ...] = ()
    text: str = ""

    @classmethod
    def read(cls, path: Path) -> "PinnedPrefix":
        """Read a text file with a system prompt, or a .json file with the first messages of a chat or {"text": ...}.

        Raises:
            UserError: The file cannot be read, or has another form.
        """
        try:
            content = path.read_text()
            if path.suffix != ".json":
                return cls(path.name, messages=({"role": "system", "content": content.strip()},))
            return cls._from_json(path.name, json.loads(content))
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read --pinned-prefix {path} ({error}); give a text or .json file") from None
        except (ValidationError, json.JSONDecodeError, KeyError, TypeError):
            remedy = 'give a list of messages with role and content, or {"text": ...}'
            raise UserError(f"--pinned-prefix {path} is not a prompt; {remedy}") from None

    @classmethod
    def _from_json(cls, name: str, data: object) -> "PinnedPrefix":
        if isinstance(data, dict):
            return cls(name, text=str(data["text"]))
        parsed = _MESSAGES.validate_python(data)
        messages = tuple({"role": message["role"], "content": message["content"]} for message in parsed)
        if not messages:
            raise KeyError(name)
        return cls(name, messages=messages)

    def encode(self, encoder: PromptEncoder) -> tuple[int, ...]:
        """Return the token ids with which prompts begin; raises UserError."""
        if self.messages and encoder.tokenizer.chat_template:
            ids = encoder.shared_chat_prefix(self.messages)
        else:
            ids = tuple(encoder.encode_text(self.text or self.messages[0]["content"], add_special_tokens=True))
        if not 0 < len(ids) < encoder.max_model_len:
            raise UserError(
                f"the pinned prefix {self.name} has {len(ids)} tokens, but the model takes 1 to "
                f"{encoder.max_model_len - 1}; shorten it"
            )
        return ids
