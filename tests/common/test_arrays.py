"""Arrays as bytes: what NumPy writes is read as NumPy reads it, anything else is refused, and no Python is parsed."""

from __future__ import annotations

import ast
import io
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays_of

from penchant.common.arrays import read_npy
from penchant.common.errors import MalformedData

NUMBERS = (
    arrays_of.boolean_dtypes()
    | arrays_of.integer_dtypes(endianness="<")
    | arrays_of.unsigned_integer_dtypes(endianness="<")
    | arrays_of.floating_dtypes(endianness="<", sizes=(16, 32, 64))
)
SHAPES = arrays_of.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5)


def npy(values: Any, *, version: tuple[int, int] | None = None) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, np.asanyarray(values), version=version)
    return file.getvalue()


@given(values=NUMBERS.flatmap(lambda dtype: arrays_of.arrays(dtype, SHAPES)), fortran=st.booleans())
def test_what_numpy_writes_is_read_as_numpy_reads_it(values: np.ndarray[Any, Any], fortran: bool) -> None:
    data = npy(np.asarray(values, order="F" if fortran else "C"))
    found, expected = read_npy(data), np.load(io.BytesIO(data))
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    assert found.flags.f_contiguous == expected.flags.f_contiguous
    assert found.tobytes() == expected.tobytes()
    assert found.flags.writeable


WHOLE = npy(np.arange(6, dtype=np.float32).reshape(2, 3))


def header(text: bytes, body: bytes = b"") -> bytes:
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + body


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(WHOLE[:9], id="half a prefix"),
        pytest.param(WHOLE[:40], id="half a header"),
        pytest.param(WHOLE[:-1], id="a byte short"),
        pytest.param(WHOLE + b"\0", id="a byte more"),
        pytest.param(npy(np.arange(3.0), version=(2, 0)), id="version 2"),
        pytest.param(npy(np.array(["a"])), id="text"),
        pytest.param(npy(np.zeros(2, "M8[s]")), id="dates"),
        pytest.param(npy(np.zeros(2, [("a", "<f4")])), id="records"),
        pytest.param(npy(np.zeros(2, ">f4")), id="the other byte order"),
        pytest.param(header(b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }\n", b"\x80\x04N."), id="pickle"),
        pytest.param(header(b"__import__('os')\n"), id="an expression"),
        pytest.param(header(b"(" * 60000 + b"\n"), id="deep"),
        pytest.param(header(b"{'descr': '<f4', 'fortran_order': False, 'shape': (-1,), }\n", b"\0" * 4), id="negative"),
        pytest.param(
            header(b"{'descr': '<f4', 'fortran_order': False, 'shape': (0, 999999999999999999, 99), }\n"), id="huge"
        ),
    ],
)
def test_anything_else_is_refused(data: bytes) -> None:
    with pytest.raises(MalformedData, match=r"\.npy"):
        read_npy(data)


@given(data=st.binary(max_size=200) | st.binary(max_size=60).map(lambda tail: WHOLE[:70] + tail))
def test_bytes_from_anywhere_are_an_array_or_refused(data: bytes) -> None:
    try:
        found = read_npy(data)
    except MalformedData:
        return
    assert found.nbytes <= len(data)


def test_no_python_is_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any) -> None:
        raise SystemError("AST constructor recursion depth mismatch")

    monkeypatch.setattr(ast, "literal_eval", never)
    with pytest.raises(SystemError):
        np.load(io.BytesIO(WHOLE))  # so it would be noticed
    assert read_npy(WHOLE).tolist() == [[0, 1, 2], [3, 4, 5]]
