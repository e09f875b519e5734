"""Which gRPC status an error becomes on its way to a device, and which error it is again there.

Statuses are named, so that nobody imports grpc for this table. What is not in it means: no answer, try again later.
A status brings no words along: what a server writes is not shown to a person or written into a log of the device.
"""

from __future__ import annotations

from penchant.common.errors import (
    InvalidConfig,
    MalformedArtifact,
    NotServed,
    PenchantError,
    PrivacyRefused,
    Unreachable,
    UntrustedArtifact,
)

STATUSES: tuple[tuple[type[PenchantError], str, str], ...] = (
    (NotServed, "NOT_FOUND", "the server has no such app, channel or release; it may come later"),
    (UntrustedArtifact, "UNAUTHENTICATED", "the server does not take this token or proof; ask for a new token"),
    (MalformedArtifact, "FAILED_PRECONDITION", "the server speaks another wire version; update the app"),
    (PrivacyRefused, "PERMISSION_DENIED", "the server's plan has no room for this device"),
    (InvalidConfig, "INVALID_ARGUMENT", "the server can't read the request; update the app"),
    (Unreachable, "UNAVAILABLE", "the server did not answer in time; try again later"),
)
"""Error, status, and what a device says; the first that fits."""


def status_of(error: PenchantError) -> str:
    """
    >>> status_of(NotServed("no channel"))
    'NOT_FOUND'
    """
    return next((status for kind, status, _ in STATUSES if isinstance(error, kind)), "INTERNAL")


def error_of(status: str) -> PenchantError:
    """
    >>> error_of("DEADLINE_EXCEEDED")
    Unreachable('the server did not answer in time; try again later')
    """
    return next((kind(words) for kind, known, words in STATUSES if known == status), Unreachable(STATUSES[-1][2]))
