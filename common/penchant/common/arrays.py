"""Names for the array types that cross module borders."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]
Bool = npt.NDArray[np.bool_]
AnyFloat = npt.NDArray[np.floating[Any]]

Arrays = Mapping[str, npt.NDArray[Any]]
"""A learner's state or one contribution: named arrays, names sorted wherever order matters."""


def content_digest(arrays: Arrays) -> str:
    """SHA-256 of named arrays, in hex: names, types, shapes and values, in the order of names."""
    found = hashlib.sha256()
    for name in sorted(arrays):
        values = np.asarray(arrays[name], order="C")
        found.update(f"{name}\0{values.dtype.str}\0{values.shape}\0".encode())
        found.update(values.tobytes())
    return found.hexdigest()
