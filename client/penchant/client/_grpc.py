"""A line to an operator's gRPC services; grpc is loaded by the first call, and its errors stop here."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from penchant.common.statuses import error_of

if TYPE_CHECKING:
    import grpc

_Answer = TypeVar("_Answer")


def channel(address: str, ca: str) -> grpc.Channel:
    """A channel over TLS; close it.

    Args:
        address: "host:port".
        ca: certificates in PEM that the server's must chain to; "" trusts the system's.
    """
    import grpc

    trusted = grpc.ssl_channel_credentials(ca.encode() or None)
    return grpc.secure_channel(address, trusted, options=[("grpc.enable_http_proxy", 0)])


def told(answer: Callable[[], _Answer]) -> _Answer:
    """What the call gives, its status as an error of ours (`statuses.py`)."""
    import grpc

    try:
        return answer()
    except grpc.RpcError as error:
        status = error.code().name if isinstance(error, grpc.Call) else "UNKNOWN"
        raise error_of(status) from None


def left_s(until: float) -> float:
    """Seconds until a time of the monotonic clock.

    Raises:
        Unreachable: it is over, so nothing is asked any more.
    """
    if (left := until - time.monotonic()) <= 0:
        raise error_of("DEADLINE_EXCEEDED")
    return left
