"""Seals a store's rows, each in its place, under one data key.

    sealed = nonce ‖ ChaCha20-Poly1305(key, nonce, padded text; associated data = seal version, table, id)

Nonces are 96 random bits: among 2³² sealed rows two share one with a probability below 2⁻³³, and a row a second fills
that in 136 years. The keys for rows, for places of names, for marks and for other files are made from the data key by
keyed BLAKE2b.

Sources: RFC 8439; RFC 7693, section 2.9.
"""

from __future__ import annotations

import hashlib
import json
import os

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from penchant.client._keys import NONCE_BYTES

_STEP = 128  # sizes of rows come in such steps, so that they tell no item


class Sealer:
    """Seals and opens rows under one data key."""

    def __init__(self, data_key: bytes) -> None:
        seal, self._marks, self._names, self._others = (
            hashlib.blake2b(use, key=data_key, digest_size=32).digest() for use in (b"seal", b"mark", b"name", b"other")
        )
        self._aead = ChaCha20Poly1305(seal)

    def seal(self, table: str, number: int, text: bytes) -> bytes:
        nonce = os.urandom(NONCE_BYTES)
        size = -(-(4 + len(text)) // _STEP) * _STEP
        padded = (len(text).to_bytes(4, "big") + text).ljust(size, b"\0")
        return nonce + self._aead.encrypt(nonce, padded, _bound(table, number))

    def open(self, table: str, number: int, sealed: object) -> bytes | None:
        """The text; None if it is not what was sealed for this place."""
        if not isinstance(sealed, bytes) or len(sealed) < NONCE_BYTES:
            return None
        try:
            padded = self._aead.decrypt(sealed[:NONCE_BYTES], sealed[NONCE_BYTES:], _bound(table, number))
        except InvalidTag:
            return None
        return padded[4 : 4 + int.from_bytes(padded[:4], "big")]

    def mark(self, number: int, nonce: bytes) -> int:
        """An event's part of the sum."""
        digest = hashlib.blake2b(number.to_bytes(8, "big", signed=True) + nonce, key=self._marks, digest_size=16)
        return int.from_bytes(digest.digest(), "big")

    def key_for(self, use: str) -> bytes:
        """32 bytes for another file of this device; they open nothing that is sealed here."""
        return hashlib.blake2b(encoded(use), key=self._others, digest_size=32).digest()

    def number(self, name: str) -> int:
        """Where a record lies: 1 to 2⁶³ − 1, which tells nothing without the key."""
        digest = hashlib.blake2b(encoded(name), key=self._names, digest_size=8).digest()
        return int.from_bytes(digest, "big") >> 1 or 1


def _bound(table: str, number: int) -> bytes:
    return b"penchant store 1 " + table.encode() + number.to_bytes(8, "big", signed=True)


def encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def packed(value: object) -> bytes:
    return encoded(json.dumps(value, separators=(",", ":"), ensure_ascii=False, allow_nan=False))
