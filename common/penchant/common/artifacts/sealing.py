"""A contribution that only the process which sums it can open.

The process makes a key pair for each round, keeps the private half in memory and drops it after the sum. The public
half goes to devices as a statement signed by the release key, so that nobody in between can put a key of their own in
its place. What a device sends is

    HPKE base mode, DHKEM(X25519, HKDF-SHA256), HKDF-SHA256, ChaCha20-Poly1305
    info = PAE("penchant/contribution", payload of the round key),   plaintext = arrays, as safetensors

so a contribution sealed for one round, try, plan or population opens in no other, and each opens once: whoever passes
it on can't send it a second time as somebody else's, which would count that person twice. Queues, proxies, databases
and backups hold bytes that nobody can read once the round is over; the server, which is trusted, still sees each one.

Source: RFC 9180.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, Suite
from safetensors import SafetensorError
from safetensors.numpy import load, save

from penchant.common.arrays import Arrays
from penchant.common.artifacts.signing import (
    SCHEMA_VERSION,
    Envelope,
    PublicKey,
    SigningKey,
    checked,
    hex32,
    pae,
    text,
    to_json,
    whole,
)
from penchant.common.errors import MalformedArtifact, MalformedContribution, UntrustedArtifact

ROUND_KEY = "application/vnd.penchant.round-key+json"
_ENC = 32  # bytes of the sender's own key, new for each contribution, with which it begins
_SUITE = Suite(KEM.X25519, KDF.HKDF_SHA256, AEAD.CHACHA20_POLY1305)


@dataclass(frozen=True, kw_only=True)
class RoundKey:
    """The public half, and what it is for.

    Attributes:
        app_id, population: whose contributions.
        plan: digest of the plan.
        round, attempt: that it serves.
        public_key: X25519, bytes[32].
    """

    app_id: str
    population: str
    plan: str
    round: int
    attempt: int
    public_key: bytes

    def signed(self, key: SigningKey) -> Envelope:
        record = {"schema_version": SCHEMA_VERSION, **self.__dict__, "public_key": self.public_key.hex()}
        return key.sign(ROUND_KEY, to_json(record))

    @classmethod
    def read(cls, envelope: Envelope, key: PublicKey) -> RoundKey:
        """
        Raises:
            UntrustedArtifact: not signed by this release key.
            MalformedArtifact: signed, but not a round's key that this version can read.
        """
        record = checked(envelope.opened(key, ROUND_KEY), SCHEMA_VERSION)
        return cls(
            app_id=text(record, "app_id"),
            population=text(record, "population"),
            plan=hex32(record, "plan").hex(),
            round=whole(record, "round"),
            attempt=whole(record, "attempt"),
            public_key=hex32(record, "public_key"),
        )


def seal(arrays: Arrays, statement: Envelope, to: RoundKey) -> bytes:
    """The sealed bytes: 48 more than the arrays' own.

    Args:
        statement: the signed envelope of the round key, which the device has checked.
        to: what it says, as `RoundKey.read` found it.

    Raises:
        MalformedArtifact: its key is one of the few that hide nothing (RFC 7748, section 6.1).
    """
    plain = save({name: np.array(values, order="C") for name, values in arrays.items()})
    public = X25519PublicKey.from_public_bytes(to.public_key)
    try:
        return _SUITE.encrypt(plain, public, info=pae("penchant/contribution", statement.payload))
    except ValueError:
        raise MalformedArtifact("a round's key that is no X25519 key; ask the operator") from None


class RoundOpener:
    """The private half, in memory only.

    Args:
        key: the release key, which signs the public half.
    """

    def __init__(self, key: SigningKey, *, app_id: str, population: str, plan: str, round: int, attempt: int) -> None:
        self._private = X25519PrivateKey.generate()
        public = self._private.public_key().public_bytes_raw()
        self.key = RoundKey(
            app_id=app_id, population=population, plan=plan, round=round, attempt=attempt, public_key=public
        )
        self.statement = self.key.signed(key)
        self._opened: set[bytes] = set()

    def open(self, sealed: bytes) -> Arrays:
        """
        Raises:
            MalformedContribution: sealed for another round, changed on its way, opened before, or not arrays.
        """
        try:
            plain = _SUITE.decrypt(sealed, self._private, info=pae("penchant/contribution", self.statement.payload))
            if sealed[:_ENC] in self._opened:
                raise MalformedContribution("a sealed contribution that came a second time")
            self._opened.add(sealed[:_ENC])
            return load(plain)
        except (InvalidTag, ValueError, KeyError, SafetensorError):  # KeyError: a dtype that NumPy does not know
            raise MalformedContribution("a sealed contribution that this round's key does not open") from None


def check_round_key(key: RoundKey, *, app_id: str, population: str, plan: str, round: int, attempt: int) -> None:
    """
    Raises:
        UntrustedArtifact: it is for another app, population, plan, round or try than the order says.
    """
    if (key.app_id, key.population, key.plan, key.round, key.attempt) != (app_id, population, plan, round, attempt):
        raise UntrustedArtifact("the round's key is for another round, plan or population than the order")
