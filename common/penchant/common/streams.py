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

import numpy as np


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
        """64 bits, for a generator that a kernel runs for itself (`draws.py`); cheap enough for one a person."""
        return int.from_bytes(self.key(name, *numbers)[:8], "little")

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


class _OsStreams(Streams):
    def get(self, name: str, *numbers: int) -> np.random.Generator:
        return np.random.Generator(np.random.PCG64(secrets.randbits(256)))

    def key(self, name: str, *numbers: int) -> bytes:
        return secrets.token_bytes(32)

    def child(self, name: str, *numbers: int) -> Streams:
        return self
