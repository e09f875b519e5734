"""Frozen settings to and from plain JSON/TOML types, strictly: an unknown key is refused with the nearest known one."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from penchant.common.errors import InvalidConfig

T = TypeVar("T")


def encode(config: Any) -> dict[str, Any]:
    """A settings dataclass as nested dicts, with None left out (TOML has none)."""
    fields = ((f.name, getattr(config, f.name)) for f in dataclasses.fields(config))
    return {name: _plain(value) for name, value in fields if value is not None}


def decode(kind: type[T], record: Mapping[str, Any], where: str = "") -> T:
    """The settings of such dicts; a missing key takes its default.

    Raises:
        InvalidConfig: an unknown or missing key, or a value that the settings refuse.
    """
    hints = typing.get_type_hints(kind)
    known = {f.name for f in dataclasses.fields(kind)}  # type: ignore[arg-type]  # T is a dataclass
    fields: dict[str, Any] = {}
    for key, value in record.items():
        if key not in known:
            raise InvalidConfig(f"unknown key {where + key!r}{did_you_mean(key, known)}")
        inner = _dataclass_in(hints[key])
        if inner is not None and (value is not None or hints[key] is inner):
            if not isinstance(value, Mapping):
                raise InvalidConfig(f"{where + key!r} must be a table of settings")
            value = decode(inner, value, f"{where}{key}.")
        elif isinstance(value, list):
            value = tuple(value)
        fields[key] = value
    try:
        return kind(**fields)
    except TypeError as error:
        raise InvalidConfig(f"{where or kind.__name__}: {error}") from None


def did_you_mean(word: str, known: typing.Iterable[str]) -> str:
    """The end of an error message: "; did you mean 'x'?" or what there is to choose from.

    >>> did_you_mean("popularty", ["popularity", "ease"])
    "; did you mean 'popularity'?"
    """
    names = sorted(known)
    if close := difflib.get_close_matches(word, names, n=1):
        return f"; did you mean {close[0]!r}?"
    return f"; choose from {', '.join(names[:30])}{', …' if len(names) > 30 else ''}"


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return encode(value)
    return [_plain(v) for v in value] if isinstance(value, tuple) else value


def _dataclass_in(hint: Any) -> Any:
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return next((o for o in options if dataclasses.is_dataclass(o)), None)
