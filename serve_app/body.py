"""What the bodies of all requests have in common.

null means absent. Unknown fields are ignored with a warning in the log, since clients send many; a field that is
known, would change the answer and is not supported is refused by name.
"""

import logging
from typing import Annotated, Any, ClassVar, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from serve_app.refused import KNOWN, NEUTRAL, Refused, refuse

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
