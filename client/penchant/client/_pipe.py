"""One message on a pipe between the app's process and its worker: a JSON head and named arrays.

    size of the head (8 bytes, big-endian) ‖ head ‖ for each array, in the head's order: size ‖ .npy

The two ends are of one installation and trust each other's sizes; neither format runs code when it is read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from penchant.common.arrays import Arrays, view_npy, write_npy


def write(pipe: IO[bytes], head: Mapping[str, Any], arrays: Arrays) -> None:
    """
    Raises:
        OSError: nobody reads any more.
    """
    text = json.dumps({**head, "arrays": list(arrays)}).encode()
    for part in (text, *(write_npy(np.asarray(values)) for values in arrays.values())):
        pipe.write(len(part).to_bytes(8, "big"))
        pipe.write(part)
    pipe.flush()


def read(pipe: IO[bytes]) -> tuple[dict[str, Any], dict[str, npt.NDArray[Any]]]:
    """Head and arrays, the latter to read only.

    Raises:
        EOFError: the other end is gone, in the middle or before.
    """
    head: dict[str, Any] = json.loads(_part(pipe))
    return head, {name: view_npy(_part(pipe)) for name in head.pop("arrays")}


def _part(pipe: IO[bytes]) -> bytes:
    size = pipe.read(8)
    part = pipe.read(int.from_bytes(size, "big")) if len(size) == 8 else b""
    if not part or len(part) != int.from_bytes(size, "big"):
        raise EOFError
    return part
