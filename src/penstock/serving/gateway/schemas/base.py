"""What all request bodies share: strict types, null means absent, and a clear answer for what is not implemented.

A body is checked once, here; what leaves is a typed object that nothing further checks. Rules:

- A field with the value null counts as absent.
- A field in `NEUTRAL` is not implemented. It passes when its value asks for nothing (`tools: []`), otherwise it is refused by name.
- Any other field that the model does not declare is refused by name.
- Types are strict: true is not 1, "1" is not 1, NaN and infinity are not numbers.
- The length of a list is checked before its items are.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails, PydanticCustomError

from penstock.core.errors import InvalidRequestError
from penstock.core.log import one_line

MAX_TOKEN_ID = 2**31 - 1
_MAX_NAME_SHOWN = 64

TokenId = Annotated[int, Field(ge=0, le=MAX_TOKEN_ID)]
ModelName = Annotated[str, Field(min_length=1, max_length=256)]


def _describe_null_and_neutral(schema: dict[str, Any], model: type[BaseModel]) -> None:
    """Say in the JSON schema that optional fields may be null, and which values of fields that are not implemented pass."""
    required = schema.get("required", [])
    properties: dict[str, Any] = schema.get("properties", {})
    for name, field in properties.items():
        if name not in required:
            properties[name] = {"anyOf": [field, {"type": "null"}]}
    neutral: dict[str, tuple[Any, ...]] = getattr(model, "NEUTRAL", {})
    for name, values in neutral.items():
        properties[name] = {"enum": [None, *values], "description": "Not implemented: only values without effect pass."}


class RequestModel(BaseModel):
    """Base of every object in a request body. `NEUTRAL`: name of a field that is not implemented → values that ask for nothing."""

    model_config = ConfigDict(
        strict=True, extra="forbid", allow_inf_nan=False, frozen=True, json_schema_extra=_describe_null_and_neutral
    )
    NEUTRAL: ClassVar[dict[str, tuple[Any, ...]]] = {}

    @model_validator(mode="before")
    @classmethod
    def _drop_null_and_neutral(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            raise PydanticCustomError("object_type", "must be an object")
        kept: dict[str, Any] = {}
        for name, value in data.items():
            if value is None:
                continue
            if name in cls.model_fields:
                kept[name] = value
            elif name not in cls.NEUTRAL:
                raise PydanticCustomError("unknown_parameter", "is not a known field", {"path": [name]})
            elif not _is_neutral(value, cls.NEUTRAL[name]):
                raise PydanticCustomError(
                    "unsupported_parameter", "is not implemented by this server", {"path": [name]}
                )
        return kept

    @classmethod
    def parse(cls, data: Any) -> Self:
        """The typed form of a decoded body. Raises InvalidRequestError naming the first field that is wrong."""
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise as_invalid_request(error.errors(include_url=False, include_input=False)[0]) from None


def _is_neutral(value: Any, neutral: tuple[Any, ...]) -> bool:
    return any(type(value) is type(allowed) and value == allowed for allowed in neutral)


def at_most(count: int) -> BeforeValidator:
    """Refuse a list or object with more than `count` entries before looking at one of them."""

    def check(value: Any) -> Any:
        if isinstance(value, list | dict) and len(value) > count:
            raise PydanticCustomError("too_long", f"has {len(value)} entries; at most {count} are allowed")
        return value

    return BeforeValidator(check)


def as_invalid_request(error: ErrorDetails) -> InvalidRequestError:
    """Render one finding of pydantic in OpenAI's words: the message starts with the field, `param` is its path."""
    location = list(error["loc"])
    location += error.get("ctx", {}).get("path", [])
    param = field_path(location)
    kind = error["type"]
    if kind == "missing":
        return InvalidRequestError(
            f"Missing required field: '{param}'.", param=param, code="missing_required_parameter"
        )
    if kind == "unknown_parameter":
        return InvalidRequestError(f"Unrecognized request argument supplied: {param}.", param=param, code=kind)
    if kind == "unsupported_parameter":
        return InvalidRequestError(f"'{param}' is not implemented by this server.", param=param, code=kind)
    message = error["msg"].removeprefix("Value error, ").replace("Input should", "must").rstrip(".")
    subject = f"'{param}' " if param else "The body "
    code = "invalid_type" if kind.endswith("_type") else "invalid_value"
    return InvalidRequestError(f"{subject}{one_line(message)}.", param=param or None, code=code)


def field_path(location: list[int | str]) -> str:
    """`["messages", 0, "content"]` → `messages[0].content`, bounded in length and free of control characters."""
    path = ""
    for part in location:
        path += f"[{part}]" if isinstance(part, int) else f".{one_line(part[:_MAX_NAME_SHOWN])}"
    return path.removeprefix(".")
