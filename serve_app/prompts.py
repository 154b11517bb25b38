"""From what a client wrote to token ids that the model can take."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

from baklava.model import LoadedModel
from serve_app.errors import ApiError, context_length_exceeded
from serve_app.schema import ChatRequest, CompletionRequest, GenerationRequest, Message


@dataclass(frozen=True)
class Prompts:
    """Encodes requests for one model. `limit` is the most tokens of prompt and completion together."""

    tokenizer: Any
    vocabulary: int
    limit: int

    @classmethod
    def of(cls, loaded: LoadedModel) -> "Prompts":
        """The encoder that belongs to a model."""
        return cls(loaded.tokenizer, loaded.model.get_input_embeddings().num_embeddings, loaded.max_length)

    def encode(self, request: ChatRequest | CompletionRequest) -> tuple[list[int], int]:
        """Token ids of the prompt and the number of tokens to generate at most; raises ApiError."""
        ids = self._chat(request.messages) if isinstance(request, ChatRequest) else self._text(request.prompt)
        self._check_ids("prompt", ids)
        self._check_ids("stop_token_ids", request.stop_token_ids)
        if not ids:
            raise ApiError("The prompt has no tokens; give at least one.", param="prompt")
        return ids, self._room(request, len(ids))

    def _text(self, prompt: str | list[int]) -> list[int]:
        return self.tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else prompt

    def _chat(self, messages: Sequence[Message]) -> list[int]:
        if not self.tokenizer.chat_template:
            raise ApiError("This model has no chat template; use /v1/completions.", param="messages")
        turns = [{"role": _role(message), "content": message.content} for message in messages]
        try:
            return self.tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)["input_ids"]
        except TemplateError as error:
            raise ApiError(f"The model's chat template refuses these messages: {error}", param="messages") from None

    def _check_ids(self, field: str, ids: Iterable[int]) -> None:
        outside = next((id for id in ids if not 0 <= id < self.vocabulary), None)
        if outside is not None:
            raise ApiError(f"Token id {outside} is not one of the model's, 0 to {self.vocabulary - 1}.", param=field)

    def _room(self, request: GenerationRequest, prompt: int) -> int:
        room = self.limit - prompt
        wanted = max(1, room) if request.wanted_tokens is None else request.wanted_tokens
        if wanted > room:
            raise context_length_exceeded(self.limit, prompt, wanted)
        if request.min_tokens > wanted:
            raise ApiError(f"min_tokens {request.min_tokens} is above the maximum of {wanted}.", param="min_tokens")
        return wanted


def _role(message: Message) -> str:
    # OpenAI renamed the system role; chat templates know the old name.
    return "system" if message.role == "developer" else message.role
