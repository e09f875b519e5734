"""What a device needs of a server to take part in rounds, as plain data, so that what carries it can be replaced.

    join ──► pull ──► task ──► fetch ──► order and state ──► reply ──► leave

Flower's Fleet API is one such transport (`_flower.py`). None of them holds a policy, decides anything or tries again:
each call does one thing, in bounded time, or raises. A transport belongs to one thread; only `heartbeat` may be called
from another.

The device proves who it is with an ECDSA key on P-384, made on the device; whoever embeds the SDK stores its bytes
encrypted, and enrols the public half.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_ssh_private_key,
)

from penchant.common.arrays import Arrays
from penchant.common.errors import InvalidConfig


@dataclass(frozen=True, kw_only=True)
class Task:
    """That a server asks for something; what it asks is fetched only once the task is one that may be served.

    Attributes:
        app: "publisher/name" of the app whose run it is of.
        kind: "enrol" asks for this device's place in the roster, "train" for its part of a round; others are unknown.
        handle: the transport's own.
    """

    app: str
    kind: Literal["enrol", "train", "unknown"]
    handle: Any = field(repr=False)


@dataclass(frozen=True, kw_only=True)
class Content:
    """What came with a task: an order as a flat map (`wire.py`), and the released state."""

    order: Mapping[str, Any]
    state: Arrays


@dataclass(frozen=True)
class Place:
    """Answers "enrol": this device's place in the roster, from 0."""

    number: int


@dataclass(frozen=True, kw_only=True)
class Sum:
    """Answers "train": what leaves, either as arrays or sealed to the round's key (`sealing.py`)."""

    round: int
    attempt: int
    content: Arrays | bytes = field(repr=False)

    @property
    def size_bytes(self) -> int:
        if isinstance(self.content, bytes):
            return len(self.content)
        return sum(values.nbytes for values in self.content.values())


@dataclass(frozen=True)
class Refused:
    """Answers anything. It gives no reason, as that may depend on what the person did."""


Answer = Place | Sum | Refused


class Transport(Protocol):
    """One device's line to a server, which knows the device by its key.

    Every call may raise:
        Unreachable: no answer in time, or one that says "later"; the same call may be made again.
        NotEnrolled: the server does not take this device's key.
        RoundClosed: the task's run is over.
    """

    def join(self) -> int:
        """Makes this device one that the server may ask, also again after it was away; its number there."""
        ...

    def pull(self) -> Task | None:
        """The next task, if there is one."""
        ...

    def fetch(self, task: Task) -> Content:
        """All that came with a task. The server drops it then: a task is fetched once."""
        ...

    def reply(self, task: Task, answer: Answer) -> None:
        """Sends the answer, all of it, before it returns; the same object again where it is sent again."""
        ...

    def heartbeat(self) -> None:
        """Says that the device is still there; a server that hears nothing for a minute counts it as gone."""
        ...

    def leave(self) -> None:
        """Says that the device is gone, or leaves it to its silence where an answer would be lost. It never raises."""
        ...

    def close(self) -> None:
        """Ends the connection. A heartbeat that waits for an answer fails."""
        ...


def new_node_key() -> bytes:
    """A new private key in PEM (PKCS #8), not encrypted: store it encrypted."""
    key = ec.generate_private_key(ec.SECP384R1())
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def read_node_key(key: bytes) -> ec.EllipticCurvePrivateKey:
    """
    Args:
        key: PEM or OpenSSH, not encrypted.

    Raises:
        InvalidConfig: no such key, or one on another curve than P-384.
    """
    try:
        load = load_ssh_private_key if b"OPENSSH PRIVATE KEY" in key else load_pem_private_key
        found = load(key, None)
    except (ValueError, TypeError):
        found = None
    if not isinstance(found, ec.EllipticCurvePrivateKey) or not isinstance(found.curve, ec.SECP384R1):
        raise InvalidConfig("a node key is an ECDSA key on P-384 in PEM or OpenSSH form: make one with new_node_key()")
    return found


def public_node_key(key: bytes) -> str:
    """The public half as a line in OpenSSH's form: what a device enrols with.

    >>> public_node_key(new_node_key())[:19]
    'ecdsa-sha2-nistp384'
    """
    return read_node_key(key).public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()
