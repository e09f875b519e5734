"""Columns of many values in few bytes: what a catalogue of a million items is kept in.

A million Python strings and a dictionary of them take some 200 MB and as many steps to make; here they are one run of
UTF-8 and an array of hashes, and a value becomes a Python object when it is asked for. Each column is a sequence that
equals the tuple of its values.

    find(s):  h = CRC-32(s);  p among the sorted  hash · 2³² + position  of that hash, with  strings[p] = s

The hash only says where to look: what is found was compared, so strings of one hash are as good as any. CRC-32 is the
same in every process, so that the sorted array can be kept in a file.
"""

from __future__ import annotations

import zlib
from bisect import bisect_left
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, Generic, Self, SupportsIndex, TypeVar, overload

import numpy as np
import numpy.typing as npt

UInt64 = npt.NDArray[np.uint64]
T = TypeVar("T", bound=Hashable)
_END = b"\xff"  # no UTF-8 has this byte
_BLOCK = 1 << 14  # strings that are objects at one time


class Column(Sequence[T]):
    """A sequence that nobody can change, equal to the tuple of its values."""

    @overload
    def __getitem__(self, i: SupportsIndex) -> T: ...
    @overload
    def __getitem__(self, i: slice) -> tuple[T, ...]: ...
    def __getitem__(self, i: SupportsIndex | slice) -> T | tuple[T, ...]:
        if type(i) is int and i >= 0:
            return self._at(i)
        places = range(len(self))[i]
        return self._at(places) if isinstance(places, int) else tuple(map(self._at, places))

    def _at(self, i: int) -> T:
        """The value at i ≥ 0.

        Raises:
            IndexError: there are no more than i.
        """
        raise NotImplementedError

    def __eq__(self, other: object) -> bool:
        return tuple(self) == tuple(other) if isinstance(other, tuple | Column) else NotImplemented

    def __hash__(self) -> int:
        return hash(tuple(self))

    def __repr__(self) -> str:
        return f"{type(self).__name__}.of({tuple(self)!r})"


class Strings(Column[str]):
    """
    Args:
        text: each string in UTF-8, and after each the byte 255.
        keys: of these strings, where they were kept.

    >>> words = Strings.of(("a", "", "bé"))
    >>> words[2], list(words), words == ("a", "", "bé"), words.find("bé"), words.find("b")
    ('bé', ['a', '', 'bé'], True, 2, None)
    """

    def __init__(self, text: bytes, keys: UInt64 | None = None) -> None:
        starts = np.flatnonzero(np.frombuffer(_END + text, np.uint8) == _END[0])
        self.text = text
        self._starts = starts.astype(np.min_scalar_type(len(text))).data  # gives integers sooner than an array
        if keys is not None:
            self.keys = keys

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.text,)

    @classmethod
    def of(cls, values: Iterable[str]) -> Self:
        """
        Raises:
            TypeError: not all of them are strings.
            UnicodeEncodeError: half a character, which has no UTF-8.
        """
        return values if isinstance(values, cls) else cls(_END.join((*map(str.encode, values), b"")))

    def __len__(self) -> int:
        return len(self._starts) - 1

    def _at(self, i: int) -> str:
        return self.text[self._starts[i] : self._starts[i + 1] - 1].decode()

    def __iter__(self) -> Iterator[str]:
        return map(bytes.decode, self._raw())

    def _raw(self) -> Iterator[bytes]:
        n = len(self)
        for i in range(0, n, _BLOCK):
            yield from self.text[self._starts[i] : self._starts[min(i + _BLOCK, n)] - 1].split(_END)

    @cached_property
    def keys(self) -> UInt64:
        """uint64[n], ascending: the hash of each string, then its position."""
        hashes = np.fromiter(map(_hash, self._raw()), np.uint64, len(self))
        found: UInt64 = np.sort(hashes << np.uint64(32) | np.arange(len(self), dtype=np.uint64))
        return found

    def find(self, value: str) -> int | None:
        """Position of the first string that equals this one."""
        low, keys = _hash(value.encode(errors="surrogatepass")) << 32, self.keys.data
        for at in range(bisect_left(keys, low), len(keys)):
            if (place := keys[at] - low) >> 32:  # of another hash
                break
            if self._at(place) == value:
                return place
        return None

    @property
    def are_unique(self) -> bool:
        """Whether no two are equal."""
        hashes = self.keys >> np.uint64(32)
        same = np.flatnonzero(hashes[1:] == hashes[:-1])
        alike = [self._at(int(key) & 0xFFFFFFFF) for key in self.keys[np.union1d(same, same + 1)]]
        return len(set(alike)) == len(alike)


def _hash(text: bytes) -> int:
    return zlib.crc32(text)


class Places(Mapping[str, int]):
    """Position of each of these strings, which are unique."""

    def __init__(self, strings: Strings) -> None:
        self._strings = strings

    def __getitem__(self, value: str) -> int:
        if not isinstance(value, str) or (found := self._strings.find(value)) is None:
            raise KeyError(value)
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self._strings)

    def __len__(self) -> int:
        return len(self._strings)


class Shared(Column[T], Generic[T]):
    """Few values that many items share.

    Args:
        values: each once.
        codes: positions in values, of each item's.

    >>> Shared.of(("b", "a", "b")).values, Shared.of(("b", "a", "b"))[-1]
    (('b', 'a'), 'b')
    """

    def __init__(self, values: Iterable[T], codes: npt.NDArray[Any]) -> None:
        self.values = tuple(values)
        self.codes = codes.astype(np.min_scalar_type(len(self.values)))
        self.codes.flags.writeable = False

    @classmethod
    def of(cls, values: Iterable[T]) -> Self:
        """Equal values are kept as one, the first."""
        if isinstance(values, cls):
            return values
        place: dict[T, int] = {}
        codes = np.fromiter((place.setdefault(value, len(place)) for value in values), np.int64)
        return cls(place, codes)

    def __len__(self) -> int:
        return len(self.codes)

    def _at(self, i: int) -> T:
        return self.values[int(self.codes[i])]

    def __iter__(self) -> Iterator[T]:
        return map(self.values.__getitem__, self.codes.tolist())
