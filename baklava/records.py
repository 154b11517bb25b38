"""The base of every record that one stage hands to the next."""

from pydantic import BaseModel, ConfigDict


class Record(BaseModel):
    """Frozen plain data, readable from and writable to JSON; an unknown field is an error, never ignored."""

    model_config = ConfigDict(frozen=True, extra="forbid")
