"""Signed statements: what signed them is checked before a byte of them is read.

    envelope = {payload_type, payload, signatures}       signature = Ed25519(key, PAE(payload_type, payload))
    PAE(t, p) = "DSSEv1" ␣ len(t) ␣ t ␣ len(p) ␣ p       lengths in bytes, as decimals

The payload is JSON in UTF-8 and is signed as the bytes that it is, so nobody needs to agree on one form of JSON; the
hash of those bytes names the statement, whatever its signatures. It is read strictly (`from_json`), so that two readers
can't find two meanings in it. Signatures chain twice:

    root key (offline; in the app's bundle) ──► certificate of a release key, with an expiry and a serial
                                                release key (on the server) ──► manifests, pointers, round keys

A device remembers the highest serial it has seen and refuses lower ones: a new certificate retires the key before it,
and a key once retired is never certified again.

Source: Dead Simple Signing Envelope 1.0.2, https://github.com/secure-systems-lab/dsse; RFC 8032; the roles and the
defence against rollback follow The Update Framework, https://theupdateframework.github.io/specification/latest/.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from penchant.common.errors import ExpiredArtifact, InvalidConfig, MalformedArtifact, StaleArtifact, UntrustedArtifact

SCHEMA_VERSION = 1
SKEW_MS = 300_000
"""How far a device's clock may be off: within it a statement from the future or just expired is taken."""
_MAX_BYTES = 1 << 20  # of one statement
_MAX_SIGNATURES = 8
_HEX32 = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class PublicKey:
    """An Ed25519 key that checks signatures: bytes[32]."""

    raw: bytes

    def __post_init__(self) -> None:
        if len(self.raw) != 32:
            raise InvalidConfig(f"an Ed25519 public key has 32 bytes, not {len(self.raw)}")

    @property
    def id(self) -> str:
        """SHA-256 of the key, in hex: what an envelope calls it."""
        return hashlib.sha256(self.raw).hexdigest()

    def verifies(self, signature: bytes, message: bytes) -> bool:
        try:
            Ed25519PublicKey.from_public_bytes(self.raw).verify(signature, message)
        except InvalidSignature:
            return False
        return True


class SigningKey:
    """An Ed25519 key that signs. Its bytes never enter a message or a log.

    Args:
        raw: bytes[32], the private seed of RFC 8032.
    """

    def __init__(self, raw: bytes) -> None:
        if len(raw) != 32:
            raise InvalidConfig(f"an Ed25519 private key has 32 bytes, not {len(raw)}")
        self._key = Ed25519PrivateKey.from_private_bytes(raw)

    @classmethod
    def generate(cls) -> Self:
        """A new one, from the operating system's generator."""
        return cls(Ed25519PrivateKey.generate().private_bytes_raw())

    @property
    def public(self) -> PublicKey:
        return PublicKey(self._key.public_key().public_bytes_raw())

    def private_bytes(self) -> bytes:
        """For whoever stores it, encrypted or offline."""
        return self._key.private_bytes_raw()

    def sign(self, payload_type: str, payload: bytes) -> Envelope:
        signature = self._key.sign(pae(payload_type, payload))
        return Envelope(payload_type, payload, ((self.public.id, signature),))


def pae(payload_type: str, payload: bytes) -> bytes:
    """The bytes that are signed.

    >>> pae("text", b"hello")
    b'DSSEv1 4 text 5 hello'
    """
    kind = payload_type.encode()
    return b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload)


@dataclass(frozen=True)
class Envelope:
    """A statement and who signed it; nothing is said yet of whether to believe it.

    Attributes:
        payload_type: what kind of statement the payload is.
        payload: JSON, in UTF-8.
        signatures: id of a key, and its signature of bytes[64].
    """

    payload_type: str
    payload: bytes
    signatures: tuple[tuple[str, bytes], ...]

    @property
    def sha256(self) -> str:
        """What names the statement: the hash of its payload, in hex."""
        return hashlib.sha256(self.payload).hexdigest()

    def to_record(self) -> dict[str, Any]:
        """As JSON types, with base64 for bytes."""
        return {
            "payloadType": self.payload_type,
            "payload": base64.b64encode(self.payload).decode(),
            "signatures": [{"keyid": key, "sig": base64.b64encode(sig).decode()} for key, sig in self.signatures],
        }

    def to_bytes(self) -> bytes:
        return to_json(self.to_record())

    @classmethod
    def from_record(cls, record: Any) -> Envelope:
        """
        Raises:
            MalformedArtifact: not an envelope.
        """
        try:
            signatures = tuple((text(one, "keyid"), _base64(one, "sig")) for one in record["signatures"])
            if len(signatures) > _MAX_SIGNATURES:
                raise ValueError
            return cls(text(record, "payloadType"), _base64(record, "payload"), signatures)
        except (ValueError, KeyError, TypeError, AttributeError):
            raise MalformedArtifact("not a signed statement; fetch it again") from None

    @classmethod
    def from_bytes(cls, data: bytes) -> Envelope:
        """
        Raises:
            MalformedArtifact: not an envelope, or one above 1 MiB.
        """
        if len(data) > _MAX_BYTES:
            raise MalformedArtifact(f"a signed statement of {len(data)} bytes; at most {_MAX_BYTES} are read")
        return cls.from_record(from_json(data))

    def opened(self, key: PublicKey, payload_type: str) -> dict[str, Any]:
        """The statement, once this key is known to have signed it as that kind.

        Raises:
            UntrustedArtifact: another kind, or no valid signature by this key.
            MalformedArtifact: signed, but not a JSON object.
        """
        if self.payload_type != payload_type:
            raise UntrustedArtifact(f"signed as {self.payload_type!r:.80}, where {payload_type!r} was asked for")
        message = pae(self.payload_type, self.payload)
        if not any(name == key.id and key.verifies(signature, message) for name, signature in self.signatures):
            raise UntrustedArtifact(f"no valid signature of key {key.id[:16]} on {payload_type}")
        return from_json(self.payload)


def to_json(record: Mapping[str, Any]) -> bytes:
    """JSON as penchant writes it before it signs; any JSON of the same fields would do."""
    return json.dumps(record, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def from_json(payload: bytes) -> dict[str, Any]:
    """The object that this JSON says, where every reader would find the same in it.

    Raises:
        MalformedArtifact: not UTF-8, no object, a name twice in one object, NaN, a number that float64 or (whole) 2^53
            does not hold, or half a character.
    """
    try:
        record = _STRICT.decode(payload.decode())
        if not isinstance(record, dict):
            raise ValueError
        if b"\\u" in payload:
            to_json(record)  # an escape can stand for half a character, which has no UTF-8
    except (ValueError, RecursionError):
        raise MalformedArtifact("not a JSON object as penchant reads it; it may be of a newer penchant") from None
    return record


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(record := dict(pairs)) < len(pairs):
        raise ValueError
    return record


def _whole(digits: str) -> int:
    if abs(number := int(digits)) > 1 << 53:
        raise ValueError
    return number


def _finite(digits: str) -> float:
    if not math.isfinite(number := float(digits)):
        raise ValueError
    return number


_STRICT = json.JSONDecoder(object_pairs_hook=_each_once, parse_int=_whole, parse_float=_finite, parse_constant=_finite)


def _base64(record: Mapping[str, Any], name: str) -> bytes:
    return base64.b64decode(text(record, name), validate=True)


CERTIFICATE = "application/vnd.penchant.release-key+json"


@dataclass(frozen=True, kw_only=True)
class Certificate:
    """The root key's word that a release key may sign for an app, for a time.

    Attributes:
        app_id: whose.
        public_key: the release key.
        serial: ≥ 1; higher than that of every certificate before, each of which it retires.
        not_before_ms, not_after_ms: UTC milliseconds.
    """

    app_id: str
    public_key: PublicKey
    serial: int
    not_before_ms: int
    not_after_ms: int

    def __post_init__(self) -> None:
        if not self.app_id:
            raise InvalidConfig("a certificate needs an app_id")
        if not (self.serial >= 1 and 0 <= self.not_before_ms < self.not_after_ms):
            raise InvalidConfig("a certificate needs a serial ≥ 1 and an expiry after its start")

    def signed(self, root: SigningKey) -> Envelope:
        record = {
            "schema_version": SCHEMA_VERSION,
            "app_id": self.app_id,
            "public_key": self.public_key.raw.hex(),
            "serial": self.serial,
            "not_before_ms": self.not_before_ms,
            "not_after_ms": self.not_after_ms,
        }
        return root.sign(CERTIFICATE, to_json(record))

    @classmethod
    def read(cls, envelope: Envelope, root: PublicKey) -> Certificate:
        """
        Raises:
            UntrustedArtifact: not signed by the root key.
            MalformedArtifact: signed, but not a certificate that this version can read.
        """
        record = checked(envelope.opened(root, CERTIFICATE), SCHEMA_VERSION)
        try:
            return cls(
                app_id=text(record, "app_id"),
                public_key=PublicKey(hex32(record, "public_key")),
                serial=whole(record, "serial"),
                not_before_ms=whole(record, "not_before_ms"),
                not_after_ms=whole(record, "not_after_ms"),
            )
        except InvalidConfig as error:
            raise MalformedArtifact(f"not a certificate of a release key: {error}") from None

    def check(self, app_id: str, *, now_ms: int, serial: int = 0) -> None:
        """Whether what this key signs may be believed now.

        Args:
            serial: the highest that was ever seen.

        Raises:
            UntrustedArtifact: for another app.
            StaleArtifact: retired by a certificate that was seen before.
            ExpiredArtifact: not valid yet, or no more.
        """
        if self.app_id != app_id:
            raise UntrustedArtifact("the release key is certified for another app")
        if self.serial < serial:
            raise StaleArtifact(f"release key {self.serial} was retired by {serial}")
        within("the release key", self.not_before_ms, self.not_after_ms, now_ms)


def within(what: str, not_before_ms: int, not_after_ms: int, now_ms: int) -> None:
    """
    Raises:
        ExpiredArtifact: the time is outside, by more than a clock may be off.
    """
    if now_ms < not_before_ms - SKEW_MS:
        raise ExpiredArtifact(f"{what} is not valid yet: set this device's clock, or wait")
    if now_ms > not_after_ms + SKEW_MS:
        raise ExpiredArtifact(f"{what} has expired: set this device's clock, or ask the operator for a newer one")


def checked(record: dict[str, Any], version: int) -> dict[str, Any]:
    """The record, if this version of penchant knows its schema; fields may be more than those known.

    Raises:
        MalformedArtifact: another schema version.
    """
    if type(found := record.get("schema_version")) is not int or found != version:  # True and 1.0 equal 1
        raise MalformedArtifact(f"a signed statement of another schema version than {version}; update penchant")
    return record


def text(record: Mapping[str, Any], name: str) -> str:
    if not isinstance(value := record.get(name), str):
        raise MalformedArtifact(f"a signed statement without text in {name}")
    return value


def whole(record: Mapping[str, Any], name: str) -> int:
    value = record.get(name)
    if type(value) is not int or not 0 <= value < 1 << 53:
        raise MalformedArtifact(f"a signed statement without a whole number ≥ 0 in {name}")
    return value


def hex32(record: Mapping[str, Any], name: str) -> bytes:
    """bytes[32] of 64 hex digits, as keys are written."""
    if not _HEX32.fullmatch(value := text(record, name)):
        raise MalformedArtifact(f"a signed statement without 64 hex digits in {name}")
    return bytes.fromhex(value)
