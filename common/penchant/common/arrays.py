"""Arrays that cross module borders: names for their types, their digest, and how one becomes bytes and comes back."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from penchant.common.errors import MalformedData

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]
Bool = npt.NDArray[np.bool_]
AnyFloat = npt.NDArray[np.floating[Any]]

Arrays = Mapping[str, npt.NDArray[Any]]
"""A learner's state or one contribution: named arrays, names sorted wherever order matters."""

_NPY_HEADER = re.compile(
    rb"\{'descr': '(?P<dtype>\|b1|\|[iu]1|<[iu][248]|<f[248])', 'fortran_order': (?P<fortran>True|False), "
    rb"'shape': \((?P<shape>(\d{1,18},|(\d{1,18}, ){1,30}\d{1,18})?)\), \} *\n"
)


def content_digest(arrays: Arrays) -> str:
    """SHA-256 of named arrays, in hex: names, types, shapes and values, in the order of names."""
    found = hashlib.sha256()
    for name in sorted(arrays):
        values = np.asarray(arrays[name], order="C")
        found.update(f"{name}\0{values.dtype.str}\0{values.shape}\0".encode())
        found.update(values.reshape(-1).view(np.uint8).data)
    return found.hexdigest()


def write_npy(values: npt.NDArray[Any]) -> bytes:
    """A .npy file of an array of numbers, in C's order; for a small one in a third of the time that `np.save` takes."""
    header = f"{{'descr': '{values.dtype.str}', 'fortran_order': False, 'shape': {values.shape}, }}"
    padded = header.ljust(-(-(len(header) + 11) // 64) * 64 - 11)  # so that the values start where 64 divides
    flat = np.asarray(values, order="C").reshape(-1).view(np.uint8)
    return b"".join((b"\x93NUMPY\x01\x00", (len(padded) + 1).to_bytes(2, "little"), padded.encode(), b"\n", flat.data))


def read_npy(data: bytes) -> npt.NDArray[Any]:
    """The array in a .npy file, as a copy; else as `view_npy`."""
    return view_npy(data).copy(order="K")


def view_npy(data: bytes) -> npt.NDArray[Any]:
    """The array in a .npy file of version 1.0 that holds numbers or truth values, to read only.

    Unlike `np.load` it parses no Python. CPython 3.11 counts the depth of `ast` once for all threads, so that a parse
    interrupted by another thread's raises SystemError (as in python/cpython#106905), and a round would lose a node.

    Raises:
        MalformedData: anything else, or bytes too few or too many.
    """
    start = 10 + int.from_bytes(data[8:10], "little")
    if data[:8] != b"\x93NUMPY\x01\x00" or not (header := _NPY_HEADER.fullmatch(data[10:start])):
        raise MalformedData("not a .npy file of numbers, version 1.0; write one with np.save")
    shape = tuple(int(size) for size in header["shape"].split(b",") if size.strip())
    dtype = np.dtype(header["dtype"].decode())
    sizes = math.prod(shape), math.prod(size or 1 for size in shape)  # an empty array's other sides have a limit too
    if sizes[0] * dtype.itemsize != len(data) - start or sizes[1] * dtype.itemsize > np.iinfo(np.intp).max:
        raise MalformedData("a .npy file whose shape is not that of its bytes; write it again")
    flat = np.frombuffer(data, dtype, count=sizes[0], offset=start) if sizes[0] else np.empty(0, dtype)
    return flat.reshape(shape, order="F" if header["fortran"] == b"True" else "C")
