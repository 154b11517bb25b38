"""Prompts that are declared when a server starts, so that their tokens enter the cache once and for all."""

import json
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from baklava.errors import UserError
from serve_app.prompts import Prompts, Turn

_TURNS = TypeAdapter(list[dict[str, str]])


@dataclass(frozen=True)
class Declared:
    """The beginning of chats, or, without turns, the beginning of texts."""

    name: str
    turns: tuple[Turn, ...] = ()
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
        if self.turns and prompts.tokenizer.chat_template:
            ids = prompts.opening(self.turns)
        else:
            ids = tuple(prompts.text(self.text or self.turns[0]["content"], special=True))
        if not 0 < len(ids) < prompts.limit:
            raise UserError(
                f"the declared prompt {self.name} has {len(ids)} tokens, but the model takes 1 to {prompts.limit - 1}; "
                "shorten it"
            )
        return ids
