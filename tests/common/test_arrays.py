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

from penchant.common.arrays import content_digest, read_npy, view_npy, write_npy
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


@given(values=NUMBERS.flatmap(lambda dtype: arrays_of.arrays(dtype, SHAPES)), fortran=st.booleans())
def test_numpy_reads_what_is_written_and_so_do_we(values: np.ndarray[Any, Any], fortran: bool) -> None:
    data = write_npy(np.asarray(values, order="F" if fortran else "C"))
    for found in (np.load(io.BytesIO(data)), read_npy(data), view_npy(data)):
        assert (found.dtype, found.shape, found.tobytes()) == (values.dtype, values.shape, values.tobytes())


def test_what_is_written_starts_where_64_divides() -> None:
    for shape in [(), (1,), (10**5,), (1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1)]:
        values = np.zeros(shape)
        assert (len(write_npy(values)) - values.nbytes) % 64 == 0


def test_a_view_shares_the_file_s_bytes_and_cannot_be_written() -> None:
    found = view_npy(WHOLE)
    assert not found.flags.writeable
    assert np.shares_memory(found, np.frombuffer(WHOLE, np.uint8))
    assert not np.shares_memory(read_npy(WHOLE), np.frombuffer(WHOLE, np.uint8))


def test_a_digest_never_changes_between_versions() -> None:
    # sha256sum of each array's name, type and shape, a NUL after each of these, and its bytes
    turned = np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3))
    digest = content_digest({"b": np.array(True), "a": turned, "c": np.zeros((0, 2))})
    assert digest == "09cf253d9bc31875509f311dfa33c66b20fcebd97803c1cce2d0775f37085a6a"


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
