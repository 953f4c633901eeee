"""Strict settings: every key has a type, a range and a default on one line, and a key that nobody read is an error."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from calibration.errors import SettingsError
from calibration.recipe_file import open_file

REQUIRED: Any = object()
MAX_BYTES = 1024**2  # of a settings file
MAX_TEXT = 1000  # characters of one value
MERGE_TAG = "tag:yaml.org,2002:merge"  # of the key `<<`


_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = 200
_REPR.maxdict = _REPR.maxlist = 8
_REPR.maxlevel = 3


class _GivenTwice(SettingsError):
    """A key stands twice in one block."""


class _StrictLoader(yaml.SafeLoader):
    """A safe loader that refuses a key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag == MERGE_TAG:
                continue  # the safe loader refuses the one and merges the other
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise _GivenTwice(f"line {key_node.start_mark.line + 1}: {_told(key)} is given twice: keep one")
            seen.add(key)
        return super().construct_mapping(node, deep)


class Section:
    """One mapping of a settings file; remembers which keys were read.

    Every reader raises SettingsError with the key's full path when the value is missing, of another type or out of
    range. Call `finish` after the last read.
    """

    def __init__(self, values: dict[str, Any], path: str = "", folder: Path | None = None) -> None:
        self._values = values
        self._path = path
        self._folder = folder or Path()
        self._read: set[str] = set()
        self._sections: list[Section] = []

    def number(
        self, key: str, default: Any = REQUIRED, *, minimum: float | None = None, maximum: float | None = None
    ) -> float:
        """Return a float in minimum..maximum."""
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self._error(key, f"{_told(value)} found, need a number")
        if isinstance(value, float) and not math.isfinite(value):
            raise self._error(key, f"{value} found, need a finite number")
        if (minimum is not None and value < minimum) or (maximum is not None and value > maximum):
            raise self._error(key, f"{_told(value)} found, need {_span(minimum, maximum)}")
        try:
            return float(value)
        except OverflowError as error:
            raise self._error(key, f"{_told(value)} found, need a smaller number") from error

    def whole(self, key: str, default: Any = REQUIRED, *, minimum: int, maximum: int) -> int:
        """Return an int in minimum..maximum."""
        value = self.number(key, default, minimum=minimum, maximum=maximum)
        if value != int(value):
            raise self._error(key, f"{_told(value)} found, need a whole number")
        return int(value)

    def text(self, key: str, default: Any = REQUIRED) -> str:
        """Return a string that is not empty."""
        value = self._value(key, default)
        if not isinstance(value, str) or (not value and value is not default):
            raise self._error(key, f"{_told(value)} found, need text (in quotes, if it looks like a number)")
        return value

    def choice(self, key: str, options: Sequence[str], default: Any = REQUIRED) -> str:
        """Return one of options."""
        value = self.text(key, default)
        if value not in options:
            raise self._error(key, f"{_told(value)} found, need one of {', '.join(options)}")
        return value

    def flag(self, key: str, default: Any = REQUIRED) -> bool:
        """Return true or false."""
        value = self._value(key, default)
        if not isinstance(value, bool):
            raise self._error(key, f"{_told(value)} found, need true or false")
        return value

    def whole_list(self, key: str, default: Sequence[int] = ()) -> tuple[int, ...]:
        """Return a tuple of ints."""
        value = self._value(key, list(default))
        if not isinstance(value, list) or any(isinstance(item, bool) or not isinstance(item, int) for item in value):
            raise self._error(key, f"{_told(value)} found, need a list of whole numbers such as [3, 14]")
        return tuple(value)

    def text_list(self, key: str, default: Sequence[str] = ()) -> tuple[str, ...]:
        """Return a tuple of strings, none empty and none twice."""
        value = self._value(key, list(default))
        if not isinstance(value, list) or any(
            not isinstance(item, str) or not 0 < len(item) <= MAX_TEXT for item in value
        ):
            raise self._error(key, f"{_told(value)} found, need a list of words such as [mes, historian]")
        if len(set(value)) < len(value):
            raise self._error(key, f"{_told(value)} found, need each word once")
        return tuple(value)

    def path(self, key: str, default: Any = REQUIRED) -> Path | None:
        """Return a path, relative ones taken from the settings file's own folder."""
        value = self._value(key, default)
        if value is None and default is None:
            return None
        if not isinstance(value, str) or not value or "\0" in value:
            raise self._error(key, f"{_told(value)} found, need a path")
        return self._folder / value

    def required_path(self, key: str) -> Path:
        """Return a path that the file must give."""
        path = self.path(key)
        assert path is not None, "without a default, null is an error"
        return path

    def section(self, key: str) -> Section:
        """Return the mapping under key; empty where the key is absent."""
        value = self._value(key, {})
        if not isinstance(value, dict):
            raise self._error(key, f"{_told(value)} found, need a block of indented keys")
        below = Section(value, f"{self._path}{key}.", self._folder)
        self._sections.append(below)
        return below

    def has(self, key: str) -> bool:
        """Return True if the file gives this key."""
        return key in self._values

    def finish(self) -> None:
        """Raises SettingsError naming the first key, here or below, that nobody read."""
        for key in self._values:
            if key not in self._read:
                known = ", ".join(sorted(self._read))
                raise self._error(
                    key[:100] if isinstance(key, str) else _told(key), f"unknown key; known here: {known}"
                )
        for below in self._sections:
            below.finish()

    def _value(self, key: str, default: Any) -> Any:
        self._read.add(key)
        value = self._values.get(key, default)
        if value is REQUIRED:
            raise self._error(key, "missing: add it")
        if isinstance(value, str) and len(value) > MAX_TEXT:
            raise self._error(key, f"{len(value)} characters found, need at most {MAX_TEXT}")
        return value

    def _error(self, key: str, message: str) -> SettingsError:
        return SettingsError(f"{self._path}{key}: {message}")


def read_file(path: Path) -> bytes:
    """Return a settings file's bytes. Raises SettingsError if it cannot be read or is too large to be one."""
    try:
        with open_file(path) as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise SettingsError(f"{path}: {error.strerror}: give the path of a settings file") from error
    except ValueError as error:  # a zero in the path
        raise SettingsError(f"{path}: {error}: give the path of a settings file") from error
    if len(data) > MAX_BYTES:
        raise SettingsError(f"{path}: more than {MAX_BYTES} bytes found, need a settings file")
    return data


def read_settings(path: Path, data: bytes | None = None) -> Section:
    """Return the top section of a YAML file. Raises SettingsError if it cannot be read.

    data: what the file held when somebody else read it; None: read it.
    """
    data = read_file(path) if data is None else data
    try:
        values = yaml.load(data.decode("utf-8"), Loader=_StrictLoader)
    except RecursionError as error:
        raise SettingsError(f"{path}: not YAML for people: nested too deep") from error
    except (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
        # ValueError: bytes that are no text, a date that is none; the rest: PyYAML on `!!float ""`, `!!bool x` and such
        raise SettingsError(f"{path}: not YAML: {' '.join(str(error).split())[:1000]}") from error
    except _GivenTwice as error:
        raise SettingsError(f"{path}, {error}") from error
    if not isinstance(values, dict):
        raise SettingsError(f"{path}: {type(values).__name__} found, need a block of `key: value` lines")
    return Section(values, folder=path.parent)


def _told(value: Any) -> str:
    """Return the value as the file's author would know it again, cut short: aliases can make it endless."""
    try:
        return _REPR.repr(value)
    except ValueError:  # Python writes no number of more than 4300 digits
        return "a number of many digits"


def _span(minimum: float | None, maximum: float | None) -> str:
    if maximum is None:
        return f"{minimum:g} or more"
    if minimum is None:
        return f"{maximum:g} or less"
    return f"{minimum:g} to {maximum:g}"
