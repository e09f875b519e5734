"""A population in a folder: each column a file that is read page by page, so that it may be larger than memory.

    columns.json                                     what the folder holds; written last, so half a population is none
    offsets.npy  items.npy  times.npy  strengths.npy  and events.npy where there are several, as `Interactions` has them
    context-0.npy, …                                 int32[n], positions in the words of a column of context

Every file is plain NPY or JSON: opening one runs no code. Processes that open one folder share its pages.

Source: NumPy, "A simple file format for NumPy arrays" (NEP 1), version 1.0.
"""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from penchant.common.errors import InvalidConfig, MalformedData
from penchant.common.interactions import Interactions

FORMAT = "penchant-columns/1"
_ABOUT = "columns.json"
_TYPES: dict[str, type[np.generic]] = {
    "offsets": np.int64,
    "items": np.int32,
    "times": np.int64,
    "strengths": np.float32,
    "events": np.uint8,
}
_HEADER_BYTES = 128


class ColumnWriter:
    """Writes a population block by block, in the memory of a block and 8 bytes a person.

    Leave it as a context manager: what was written is a population from then on, and nothing where the block failed.

    Args:
        folder: made if need be. What it held before stays readable until the end.
        n_items: size of the catalogue.

    Raises:
        InvalidConfig: a block with other columns than the first.
    """

    def __init__(self, folder: Path, *, n_items: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._n_items = folder, n_items
        self._files: dict[str, IO[bytes]] = {}
        self._lengths: list[npt.NDArray[np.int64]] = []
        self._users: list[str] = []
        self._events: tuple[str, ...] = ("view",)
        self._words: dict[str, dict[str, int]] = {}
        self._n = 0

    def add(self, people: Interactions) -> None:
        """These people follow those that were added before."""
        columns: dict[str, npt.NDArray[Any]] = {name: getattr(people, name) for name in ("items", "times", "strengths")}
        if people.events is not None:
            columns["events"] = people.events
        if not self._lengths:
            self._events, self._words = people.event_names, {name: {} for name in sorted(people.context)}
        named = bool(people.users) == bool(self._users) or not self._lengths
        if people.event_names != self._events or people.context.keys() != self._words.keys() or not named:
            raise InvalidConfig("people of one population have the same columns and event names: make them alike first")
        for at, (name, words) in enumerate(self._words.items()):
            found, inverse = np.unique(people.context[name].astype(str), return_inverse=True)
            codes = np.array([words.setdefault(str(word), len(words)) for word in found], np.int32)
            columns[f"context-{at}"] = codes[inverse]
        if self._files and self._files.keys() != columns.keys():
            raise InvalidConfig("people of one population have the same columns and event names: make them alike first")
        for name, values in columns.items():
            if name not in self._files:
                self._files[name] = _part(self._folder, name).open("wb")
                self._files[name].write(bytes(_HEADER_BYTES))
            np.ascontiguousarray(values, _TYPES.get(name, np.int32)).tofile(self._files[name])
        self._lengths.append(people.lengths)
        self._users.extend(people.users)
        self._n += len(people)

    def __enter__(self) -> ColumnWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is None and not self._lengths:
            self.add(Interactions.of([], self._n_items))
        for name, file in self._files.items():
            file.seek(0)
            file.write(_header(np.dtype(_TYPES.get(name, np.int32)), self._n))
            file.close()
        if kind is not None:
            for name in self._files:
                _part(self._folder, name).unlink()
            return
        offsets = np.concatenate([[0], np.cumsum(np.concatenate(self._lengths))]).astype(np.int64)
        with _part(self._folder, "offsets").open("wb") as file:
            file.write(_header(offsets.dtype, len(offsets)))
            offsets.tofile(file)
        about: dict[str, Any] = {
            "format": FORMAT,
            "n_items": self._n_items,
            "columns": sorted({"offsets", *self._files}),
            "event_names": self._events,
            "context": [[name, list(words)] for name, words in self._words.items()],
            "users": self._users,
        }
        (self._folder / _ABOUT).unlink(missing_ok=True)  # a reader meets the old population, none, or the new one
        for name in about["columns"]:
            os.replace(_part(self._folder, name), self._folder / f"{name}.npy")
        text = self._folder / f"{_ABOUT}.part"
        text.write_text(json.dumps(about, ensure_ascii=False), encoding="utf-8")
        os.replace(text, self._folder / _ABOUT)


def save(people: Interactions, folder: Path) -> None:
    """Writes a population that is in memory."""
    with ColumnWriter(folder, n_items=people.n_items) as writer:
        writer.add(people)


def load(folder: Path) -> Interactions:
    """The population of a folder, its columns mapped from the files: what nobody reads takes no memory.

    Names of people and columns of context are read into memory.

    Raises:
        MalformedData: no population, half of one, or files that do not belong together.
    """
    about = _about(folder)
    found = {name: _mapped(folder, name) for name in about["columns"]}
    offsets, n = found["offsets"], len(found["items"])
    if not len(offsets) or offsets[0] != 0 or offsets[-1] != n or (np.diff(offsets) < 0).any():
        raise MalformedData(f"{folder / 'offsets.npy'}: does not fit the other columns; write the folder again")
    for name, values in found.items():
        if name != "offsets" and len(values) != n:
            raise MalformedData(f"{folder / name}.npy: is not as long as items.npy; write the folder again")
    words = [np.array(words, object) for _, words in about["context"]]
    try:
        context = {name: words[at][found[f"context-{at}"]] for at, (name, _) in enumerate(about["context"])}
        if not isinstance(about["n_items"], int) or len(about["users"]) not in (0, len(offsets) - 1):
            raise TypeError
        return Interactions(
            offsets=offsets,
            items=found["items"],
            times=found["times"],
            strengths=found["strengths"],
            n_items=about["n_items"],
            users=tuple(about["users"]),
            events=found.get("events"),
            event_names=tuple(about["event_names"]),
            context=context,
        )
    except (IndexError, TypeError):
        raise MalformedData(f"{folder / _ABOUT}: does not fit the columns; write the folder again") from None


def _about(folder: Path) -> dict[str, Any]:
    path = folder / _ABOUT
    try:
        about: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        named = {*about["columns"]} - {f"context-{at}" for at, (_, _) in enumerate(about["context"])}
    except FileNotFoundError:
        raise MalformedData(f"{folder}: holds no population, or one that was not finished; write it again") from None
    except (OSError, ValueError, KeyError, TypeError):
        raise MalformedData(f"{path}: cannot be read; write the folder again") from None
    if about.get("format") != FORMAT:
        raise MalformedData(f"{path}: is not {FORMAT}; write the folder with this version")
    if named - {"events"} != {"offsets", "items", "times", "strengths"}:
        raise MalformedData(f"{path}: names other columns than a population has; write the folder again")
    return about


def _mapped(folder: Path, name: str) -> npt.NDArray[Any]:
    path = folder / f"{name}.npy"
    try:
        values = np.asarray(np.lib.format.open_memmap(path, mode="r"))
    except FileNotFoundError:
        raise MalformedData(f"{path}: is missing; write the folder again") from None
    except (OSError, ValueError):
        raise MalformedData(f"{path}: is cut short or no column of numbers; write the folder again") from None
    if values.ndim != 1 or values.dtype != _TYPES.get(name, np.int32):
        raise MalformedData(f"{path}: is of another type than the column has; write the folder again")
    return values


def _part(folder: Path, name: str) -> Path:
    return folder / f"{name}.npy.part"


def _header(dtype: np.dtype[Any], n: int) -> bytes:
    """Of an NPY file with n numbers, always 128 bytes long: written first with nothing, and at the end with n."""
    text = f"{{'descr': {dtype.str!r}, 'fortran_order': False, 'shape': ({n},), }}"
    length = _HEADER_BYTES - 10
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", length) + text.ljust(length - 1).encode() + b"\n"
