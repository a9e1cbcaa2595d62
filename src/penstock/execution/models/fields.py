"""Typed access to the fields of a JSON file that came with a checkpoint. Wrong or missing: a ModelFormatError with file and field."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NoReturn

from penstock.core.errors import ModelFormatError

# A config.json is a few kilobytes; nothing legitimate comes near this.
_MAX_FILE_BYTES = 16 * 2**20


class Fields:
    """One JSON object. A field that is absent or null takes the default; without a default it is required."""

    def __init__(self, file: Path, data: dict[str, Any], prefix: str = "") -> None:
        self._file = file
        self._data = data
        self._prefix = prefix

    @classmethod
    def from_file(cls, file: Path) -> Fields:
        """Read `file`. Raises ModelFormatError when it is missing, too large, or no JSON object."""
        if not file.is_file():
            raise ModelFormatError(f"{file} does not exist; a model folder in Hugging Face format needs {file.name}.")
        if file.stat().st_size > _MAX_FILE_BYTES:
            raise ModelFormatError(f"{file} is larger than {_MAX_FILE_BYTES} bytes; this is no {file.name}.")
        try:
            data = json.loads(file.read_bytes())
        except (ValueError, RecursionError) as error:
            raise ModelFormatError(f"{file} is not valid JSON: {error}") from error
        if not isinstance(data, dict):
            raise ModelFormatError(f"{file} must hold a JSON object.")
        return cls(file, data)

    def fail(self, name: str, problem: str) -> NoReturn:
        raise ModelFormatError(f"{self._file}: {self._prefix}{name}: {problem}.")

    def present(self, name: str) -> bool:
        return self._data.get(name) is not None

    def explicit_null(self, name: str) -> bool:
        return name in self._data and self._data[name] is None

    def section(self, name: str) -> Fields:
        """The object in field `name`; empty when absent."""
        value = self._value(name, {})
        if not isinstance(value, dict):
            self.fail(name, f"must be an object, not {value!r}")
        return Fields(self._file, value, f"{self._prefix}{name}.")

    def sections(self, name: str) -> list[Fields]:
        """The objects within the object in field `name`; none when absent."""
        section = self.section(name)
        return [section.section(inner) for inner in section.names()]

    def names(self) -> tuple[str, ...]:
        """The names of all fields that are there."""
        return tuple(self._data)

    def integer(self, name: str, default: int | None = None, *, minimum: int = 1) -> int:
        value = self._value(name, default)
        if isinstance(value, bool) or not isinstance(value, int):
            self.fail(name, f"must be an integer, not {value!r}")
        # Sizes are multiplied with each other; a bound keeps the products meaningful.
        if not minimum <= value < 2**31:
            self.fail(name, f"must be between {minimum} and {2**31 - 1}, not {value}")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A finite number above 0."""
        value = self._value(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            self.fail(name, f"must be a number, not {value!r}")
        if not 0 < value < math.inf:
            self.fail(name, f"must be above 0, not {value}")
        return float(value)

    def optional_number(self, name: str) -> float | None:
        return self.number(name) if self.present(name) else None

    def boolean(self, name: str, default: bool) -> bool:
        value = self._value(name, default)
        if not isinstance(value, bool):
            self.fail(name, f"must be true or false, not {value!r}")
        return value

    def string(self, name: str, default: str | None = None) -> str:
        value = self._value(name, default)
        if not isinstance(value, str):
            self.fail(name, f"must be a string, not {value!r}")
        return value

    def strings(self, name: str) -> tuple[str, ...]:
        """A list of strings; empty when absent."""
        value = self._value(name, [])
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            self.fail(name, f"must be a list of strings, not {value!r}")
        return tuple(value)

    def string_map(self, name: str) -> dict[str, str]:
        """An object whose values are strings; it must be there."""
        value = self._value(name, None)
        if not isinstance(value, dict) or not all(isinstance(item, str) for item in value.values()):
            self.fail(name, "must be an object of strings")
        return value

    def integers(self, name: str, what: str = "a token id") -> tuple[int, ...]:
        """One number from 0 on or a list of them; empty when absent. what: such a number is, for messages."""
        value = self._value(name, [])
        items = value if isinstance(value, list) else [value]
        for item in items:
            if isinstance(item, bool) or not isinstance(item, int) or item < 0:
                self.fail(name, f"must be {what} or a list of them, not {value!r}")
        return tuple(items)

    def _value(self, name: str, default: Any) -> Any:
        value = self._data.get(name)
        if value is None:
            value = default
        if value is None:
            self.fail(name, "is missing")
        return value
