"""Random streams derived from one root by name and number, so that no draw depends on the order of work.

`Streams(7).get("negatives", 3, 41)` is the same stream whatever was drawn before it, in whichever process, and
independent of every other name: what makes a run repeat for any number of threads, nodes or engines.
A root is a research switch. `Streams.from_os()` has none: the operating system is asked each time, and nothing repeats.

Source: NumPy, "Parallel random number generation", SeedSequence with spawn keys.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from penchant.common import draws
from penchant.common.arrays import Int64
from penchant.common.draws import Words


class Streams:
    """Derives independent generators from one root.

    Args:
        root: any integer ≥ 0. The same root, name and numbers give the same stream on every machine.
    """

    def __init__(self, root: int) -> None:
        if root < 0:
            raise ValueError(f"root must be ≥ 0, not {root}")
        self._root = root
        self._key = root.to_bytes(max(32, (root.bit_length() + 7) // 8), "little")

    @staticmethod
    def from_os() -> Streams:
        """Streams that ask the operating system at every call, whatever the name: what production uses."""
        return _OsStreams(0)

    def get(self, name: str, *numbers: int) -> np.random.Generator:
        """The stream of this name and these numbers (round, user, attempt, …), each in [0, 2³²).

        >>> Streams(1).get("a", 2).random() == Streams(1).get("a", 2).random()
        True
        """
        if any(not 0 <= number < 2**32 for number in numbers):  # a longer one would be read as two
            raise ValueError("the numbers of a stream must be in [0, 2**32)")
        word = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
        key = np.random.SeedSequence(self._root, spawn_key=(word, *numbers))
        return np.random.Generator(np.random.PCG64(key))

    def word(self, name: str, *numbers: int) -> int:
        """64 bits, for a generator that a kernel runs for itself (`draws.py`)."""
        return int(self.words(name, *numbers)[0])

    def words(self, name: str, *numbers: int | Int64) -> Words:
        """uint64[n], `word` for each row of numbers, which are whole ≥ 0 or int64[n] of such.

        One hash for the name, and from there on one word of `draws.py` under the word before for each number: the word
        of another name, row or count of numbers is as far from it as those of two seeds.
        """
        found = np.frombuffer(self.key(f"words/{name}", len(numbers)), "<u8", count=1).astype(np.uint64)
        for number in numbers:
            found = draws.words(found, np.atleast_1d(number))
        return found

    def seed(self, name: str, *numbers: int) -> int:
        """A 63-bit seed for generators that are not NumPy's, such as torch's."""
        return int(self.get(name, *numbers).integers(0, 2**63 - 1))

    def key(self, name: str, *numbers: int) -> bytes:
        """32 bytes for a stream cipher (`privacy/noise.py`): HMAC-SHA256 of name and numbers under the root."""
        return hmac.digest(self._key, "\0".join((name, *map(str, numbers))).encode(), "sha256")

    def child(self, name: str, *numbers: int) -> Streams:
        """Streams under a root of their own, for a part that should not know its siblings' names."""
        return Streams(int.from_bytes(self.get(name, *numbers).bytes(32), "little"))

    def scope(self, name: str, *numbers: int) -> Streams:
        """These streams under a longer name and with these numbers first. Nothing is derived before it is asked for.

        >>> Streams(1).scope("a", 2).get("b", 3).random() == Streams(1).get("a/b", 2, 3).random()
        True
        """
        return _Scope(self, name, numbers)


class _Scope(Streams):
    def __init__(self, whole: Streams, prefix: str, first: tuple[int, ...]) -> None:
        self._whole, self._prefix, self._first = whole, prefix, first

    def get(self, name: str, *numbers: int) -> np.random.Generator:
        return self._whole.get(f"{self._prefix}/{name}", *self._first, *numbers)

    def key(self, name: str, *numbers: int) -> bytes:
        return self._whole.key(f"{self._prefix}/{name}", *self._first, *numbers)

    def words(self, name: str, *numbers: int | Int64) -> Words:
        return self._whole.words(f"{self._prefix}/{name}", *self._first, *numbers)


class _OsStreams(Streams):
    def get(self, name: str, *numbers: int) -> np.random.Generator:
        return np.random.Generator(np.random.PCG64(secrets.randbits(256)))

    def key(self, name: str, *numbers: int) -> bytes:
        return secrets.token_bytes(32)

    def words(self, name: str, *numbers: int | Int64) -> Words:
        n = np.broadcast(np.zeros(1), *numbers).size
        return np.frombuffer(secrets.token_bytes(8 * n), np.uint64)

    def child(self, name: str, *numbers: int) -> Streams:
        return self


@dataclass(frozen=True)
class People:
    """The streams of several people: `people(row)` are one person's own, `scope` of the name and their numbers.

    Attributes:
        numbers: one for all, or int64[n] with each person's.
    """

    streams: Streams
    name: str
    numbers: tuple[int | Int64, ...]

    def __call__(self, row: int) -> Streams:
        own = (int(n if isinstance(n, int) else n[row]) for n in self.numbers)
        return self.streams.scope(self.name, *own)

    def words(self, name: str) -> Words:
        """uint64[n], `people(row).word(name)` for each row."""
        return self.streams.words(f"{self.name}/{name}", *self.numbers)


def words(people: Callable[[int], Streams], name: str, n: int) -> Words:
    """uint64[n], `people(row).word(name)` for each row below n."""
    if isinstance(people, People):
        return people.words(name)
    return np.array([people(row).word(name) for row in range(n)], np.uint64)
