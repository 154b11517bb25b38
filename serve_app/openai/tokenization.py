"""From what a client wrote to token ids that the model can take."""

import inspect
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from pydantic import TypeAdapter, ValidationError

from baklava.errors import UserError
from baklava.runtime.model_loader import LoadedModel
from serve_app.openai.errors import ApiError, context_length_exceeded
from serve_app.openai.protocol import ChatRequest, CompletionRequest, GenerationRequest, Message

MessageDict = dict[str, str]

_OF_RENDERING = frozenset({"self", "messages", "conversations"})  # names under which a template is given the chat

# A template is code, and what it makes of messages and variables from outside can fail as code does.
_TEMPLATE_ERRORS = (TemplateError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError)


@dataclass(frozen=True)
class Prompt:
    """Token ids of a prompt, the text that an echo repeats, and the number of tokens to generate at most."""

    ids: tuple[int, ...]
    text: str
    max_tokens: int


@dataclass(frozen=True)
class Prompts:
    """Encodes requests for one model. `limit` is the most tokens of prompt and completion together."""

    tokenizer: Any
    vocab_size: int
    limit: int

    @classmethod
    def of(cls, loaded: LoadedModel) -> "Prompts":
        """The encoder that belongs to a model."""
        return cls(loaded.tokenizer, loaded.model.get_input_embeddings().num_embeddings, loaded.max_length)

    def encode(self, request: ChatRequest | CompletionRequest) -> list[Prompt]:
        """The prompts of a request; raises ApiError."""
        self.check_token_ids("stop_token_ids", request.stop_token_ids)
        self.check_token_ids("logit_bias", request.logit_bias)
        if isinstance(request, ChatRequest):
            return [self._checked(request, self.chat(request.messages, request.chat_template_kwargs), "")]
        return [self._completion(request, prompt) for prompt in request.prompt]

    def text(self, prompt: str, *, special: bool) -> list[int]:
        """Token ids of a text, with those that the tokenizer puts around it if they are wanted."""
        return self.tokenizer(prompt, add_special_tokens=special, verbose=False)["input_ids"]

    def chat(self, messages: Sequence[Message], variables: dict[str, Any]) -> list[int]:
        """Token ids of a chat up to the answer that it asks for; raises ApiError."""
        if not self.tokenizer.chat_template:
            raise ApiError("This model has no chat template; use /v1/completions.", param="messages")
        # A template is code, and it is given beside its variables; only the latter may come from outside.
        known = inspect.signature(self.tokenizer.apply_chat_template).parameters.keys() | _OF_RENDERING
        if taken := known & variables.keys():
            raise ApiError(f"`{min(taken)}` is not for requests to set; leave it out.", param="chat_template_kwargs")
        turns = [{"role": _role(message), "content": message.content} for message in messages]
        try:
            return self._render(turns, variables)
        except _TEMPLATE_ERRORS as error:
            raise ApiError(f"The model's chat template refuses these messages: {error}", param="messages") from None

    def decode(self, ids: Sequence[int]) -> str:
        """The text of tokens, special ones included; raises ApiError."""
        self.check_token_ids("tokens", ids)
        return self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def shared_chat_prefix(self, turns: Sequence[MessageDict]) -> tuple[int, ...]:
        """Token ids that every chat begins with whose first turns are these.

        Raises:
            UserError: the model's template does not take these turns, or what it makes of them depends on the rest.
        """
        try:
            chats = [self._render([*turns, {"role": "user", "content": rest}], {}) for rest in ("Why?", "23 is prime.")]
        except _TEMPLATE_ERRORS as error:
            raise UserError(f"the model's chat template refuses the declared prompt: {error}") from None
        same = next(place for place, (one, other) in enumerate(zip(*chats, strict=False)) if one != other)
        opening = tuple(chats[0][:same])
        if turns[-1]["content"].strip() not in self.tokenizer.decode(list(opening)):
            raise UserError("the model's chat template does not keep the declared prompt together; declare another")
        return opening

    def check_token_ids(self, field: str, ids: Iterable[int]) -> None:
        """Raise ApiError for a token that the model does not have."""
        outside = next((id for id in ids if not 0 <= id < self.vocab_size), None)
        if outside is not None:
            raise ApiError(f"Token id {outside} is not one of the model's, 0 to {self.vocab_size - 1}.", param=field)

    def _render(self, turns: Sequence[MessageDict], variables: dict[str, Any]) -> list[int]:
        rendered = self.tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True, **variables)
        return rendered["input_ids"]

    def _completion(self, request: CompletionRequest, prompt: str | list[int]) -> Prompt:
        if isinstance(prompt, str) and request.truncate_prompt_tokens is None:
            return self._checked(request, self.text(prompt, special=request.add_special_tokens), prompt)
        ids = self.text(prompt, special=request.add_special_tokens) if isinstance(prompt, str) else prompt
        checked = self._checked(request, ids, "")
        return replace(checked, text=self._echo(checked.ids)) if request.echo else checked

    def _echo(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _checked(self, request: GenerationRequest, ids: list[int], text: str) -> Prompt:
        ids = self._truncated(request, ids)
        if not ids:
            raise ApiError("The prompt has no tokens; give at least one.", param="prompt")
        self.check_token_ids("prompt", ids)
        return Prompt(tuple(ids), text, self._room(request, len(ids)))

    def _truncated(self, request: GenerationRequest, ids: list[int]) -> list[int]:
        keep = request.truncate_prompt_tokens
        if keep is None:
            return ids
        if keep == -1:
            keep = max(1, self.limit - (request.requested_max_tokens or 1))  # what is too much together is told as such
        return ids[max(0, len(ids) - keep) :]

    def _room(self, request: GenerationRequest, prompt: int) -> int:
        room = self.limit - prompt
        wanted = max(1, room) if request.requested_max_tokens is None else request.requested_max_tokens
        if wanted > room:
            raise context_length_exceeded(self.limit, prompt, wanted)
        if request.min_tokens > wanted:
            raise ApiError(f"min_tokens {request.min_tokens} is above the maximum of {wanted}.", param="min_tokens")
        return wanted


def _role(message: Message) -> str:
    # OpenAI renamed the system role; chat templates know the old name.
    return "system" if message.role == "developer" else message.role


_TURNS = TypeAdapter(list[dict[str, str]])


@dataclass(frozen=True)
class Declared:
    """The beginning of chats, or, without turns, the beginning of texts."""

    name: str
    messages: tuple[MessageDict, ...] = ()
    text: str = ""

    @classmethod
    def read(cls, path: Path) -> "Declared":
        """A text file is a system prompt; a .json file holds the first messages of a chat, or {"text": ...}.

        Raises:
            UserError: the file cannot be read, or holds neither.
        """
        try:
            content = path.read_text()
            if path.suffix != ".json":
                return cls(path.name, turns=({"role": "system", "content": content.strip()},))
            return cls._parsed(path.name, json.loads(content))
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read --prefix {path} ({error}); give a text or .json file") from None
        except (ValidationError, json.JSONDecodeError, KeyError, TypeError):
            remedy = 'give a list of messages with role and content, or {"text": ...}'
            raise UserError(f"--prefix {path} is no declared prompt; {remedy}") from None

    @classmethod
    def _parsed(cls, name: str, data: object) -> "Declared":
        if isinstance(data, dict):
            return cls(name, text=str(data["text"]))
        turns = tuple({"role": turn["role"], "content": turn["content"]} for turn in _TURNS.validate_python(data))
        if not turns:
            raise KeyError(name)
        return cls(name, turns=turns)

    def ids(self, prompts: Prompts) -> tuple[int, ...]:
        """The token ids that prompts begin with; raises UserError."""
        if self.messages and prompts.tokenizer.chat_template:
            ids = prompts.shared_chat_prefix(self.messages)
        else:
            ids = tuple(prompts.text(self.text or self.messages[0]["content"], special=True))
        if not 0 < len(ids) < prompts.limit:
            raise UserError(
                f"the declared prompt {self.name} has {len(ids)} tokens, but the model takes 1 to {prompts.limit - 1}; "
                "shorten it"
            )
        return ids
