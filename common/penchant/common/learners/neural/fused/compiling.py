"""How kernels are compiled, and under which name what was compiled is kept.

Numba counts who holds an array, atomically and at every call, for each array of a namedtuple: nine tenths of the time
to copy a person's rows. The caller holds all that a kernel reads and writes, so kernels do not count (`_nrt`). What
would allocate does not compile then; `allocating` may.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from numba import njit

from penchant.common.privacy import noise

_FAST = {"reassoc", "contract", "nsz", "arcp"}  # and NaN stays NaN
_OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": _FAST, "_nrt": False}
_SOURCES = (*sorted(Path(__file__).parent.glob("*.py")), Path(noise.__file__))  # whose tables are compiled in
_STAMP = hashlib.sha256(b"".join(source.read_bytes() for source in _SOURCES)).hexdigest()[:12]


def _compiled(function: Any, **options: Any) -> Any:
    """Numba keeps what it compiled by a function's name and its own file; the name says what else is in it."""
    function.__qualname__ += f"-{_STAMP}"
    options = {**_OPTIONS, **options}
    try:
        return njit(cache=True, **options)(function)
    except RuntimeError:  # nowhere to keep it
        return njit(**options)(function)


def jit(function: Any) -> Any:
    return _compiled(function)


def allocating(function: Any) -> Any:
    return _compiled(function, _nrt=True)


def inline(function: Any) -> Any:
    return _compiled(function, forceinline=True)
