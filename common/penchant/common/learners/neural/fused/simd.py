"""Vectors of 16 numbers for Numba kernels: float32, and float64 for what is summed over people.

LLVM vectorises plain loops, but keeps no tile of a product in registers. With a vector as a value of its own it does:
one 512-bit register where the processor has them, two or four smaller ones where not, and no compiler to install.
Loads and stores take a flat float32 array and a position, and check nothing.

Source: Numba, "Low-level extension API", https://numba.readthedocs.io/en/stable/extending/low-level.html; LLVM language
reference, vector type.
"""

# mypy: allow-untyped-decorators, allow-subclassing-any, allow-untyped-calls

from __future__ import annotations

from typing import Any

import numba
from llvmlite import ir
from numba import extending
from numba.core import cgutils

WIDTH = 16
intrinsic: Any = extending.intrinsic  # numba ships no types
_FLOAT, _INDEX = ir.FloatType(), ir.IntType(32)
_VECTOR, _WIDE = ir.VectorType(_FLOAT, WIDTH), ir.VectorType(ir.DoubleType(), WIDTH)


class _Vector(numba.types.Type):
    def __init__(self, name: str, code: Any) -> None:
        super().__init__(name=f"{name}x{WIDTH}")
        self.code = code


vector, wide = _Vector("float32", _VECTOR), _Vector("float64", _WIDE)


@extending.register_model(_Vector)
class _Model(extending.models.PrimitiveModel):
    def __init__(self, manager: Any, fe_type: Any) -> None:
        super().__init__(manager, fe_type, fe_type.code)


def _at(context: Any, build: Any, kind: Any, array: Any, place: Any) -> Any:
    return build.gep(context.make_array(kind)(context, build, array).data, [place])


def _kind(array: Any) -> _Vector:
    return wide if array.dtype == numba.types.float64 else vector


def _everywhere(build: Any, scalar: Any) -> Any:
    nothing = ir.Constant(ir.VectorType(scalar.type, WIDTH), ir.Undefined)
    one = build.insert_element(nothing, scalar, _INDEX(0))
    return build.shuffle_vector(one, nothing, ir.Constant(ir.VectorType(_INDEX, WIDTH), [0] * WIDTH))


@intrinsic
def load(typing: Any, array: Any, place: Any) -> Any:
    """array[place : place + 16]."""
    kind = _kind(array)

    def code(context: Any, build: Any, signature: Any, args: Any) -> Any:
        pointer = _at(context, build, signature.args[0], *args)
        found = build.load(build.bitcast(pointer, kind.code.as_pointer()))
        found.align = 4
        return found

    return kind(array, numba.types.intp), code


@intrinsic
def store(typing: Any, array: Any, place: Any, values: Any) -> Any:
    """array[place : place + 16] = values."""

    kind = _kind(array)

    def code(context: Any, build: Any, signature: Any, args: Any) -> Any:
        pointer = _at(context, build, signature.args[0], *args[:2])
        build.store(args[2], build.bitcast(pointer, kind.code.as_pointer())).align = 4
        return context.get_dummy_value()

    return numba.types.void(array, numba.types.intp, kind), code


@intrinsic
def spread(typing: Any, array: Any, place: Any) -> Any:
    """array[place] in every lane."""

    def code(context: Any, build: Any, signature: Any, args: Any) -> Any:
        return _everywhere(build, build.load(_at(context, build, signature.args[0], *args)))

    return vector(array, numba.types.intp), code


@intrinsic
def splat(typing: Any, scalar: Any) -> Any:
    """A number in every lane."""
    return (wide if scalar == numba.types.float64 else vector)(
        scalar
    ), lambda context, build, signature, args: _everywhere(build, args[0])


def _call(name: str, *first: Any, result: Any, flags: tuple[str, ...] = ()) -> Any:
    def code(context: Any, build: Any, signature: Any, args: Any) -> Any:
        given = [*first, *args]
        function = cgutils.get_or_insert_function(
            build.module, ir.FunctionType(result, [a.type for a in given]), f"llvm.{name}"
        )
        return build.call(function, given, fastmath=flags)

    return code


@intrinsic
def fma(typing: Any, a: Any, b: Any, c: Any) -> Any:
    """a · b + c, rounded once."""
    return a(a, a, a), _call("fma.v16f64" if a is wide else "fma.v16f32", result=a.code)


@intrinsic
def total(typing: Any, a: Any) -> Any:
    """The sum of the lanes, in any order."""
    name, number = ("f64", numba.types.float64) if a is wide else ("f32", numba.types.float32)
    result = a.code.element
    start = ir.Constant(result, -0.0)
    return number(a), _call(f"vector.reduce.fadd.v16{name}", start, result=result, flags=("reassoc",))


@intrinsic
def truncate(typing: Any, a: Any) -> Any:
    """Towards zero, to whole numbers."""
    return vector(vector), _call("trunc.v16f32", result=_VECTOR)


@intrinsic
def widen(typing: Any, a: Any) -> Any:
    """float32 as float64."""
    return wide(vector), lambda context, build, signature, args: build.fpext(args[0], _WIDE)


@intrinsic
def narrow(typing: Any, a: Any) -> Any:
    """float64 rounded to float32."""
    return vector(wide), lambda context, build, signature, args: build.fptrunc(args[0], _VECTOR)


@intrinsic
def add(typing: Any, a: Any, b: Any) -> Any:
    """a + b."""
    return a(a, a), lambda context, build, signature, args: build.fadd(*args)


@intrinsic
def minus(typing: Any, a: Any, b: Any) -> Any:
    """a − b."""
    return a(a, a), lambda context, build, signature, args: build.fsub(*args)


@intrinsic
def times(typing: Any, a: Any, b: Any) -> Any:
    """a · b."""
    return a(a, a), lambda context, build, signature, args: build.fmul(*args)


@intrinsic
def where_positive(typing: Any, test: Any, values: Any) -> Any:
    """values where test > 0, else 0; a NaN in test counts as not positive."""

    def code(context: Any, build: Any, signature: Any, args: Any) -> Any:
        zero = ir.Constant(_VECTOR, [0.0] * WIDTH)
        return build.select(build.fcmp_ordered(">", args[0], zero), args[1], zero)

    return vector(vector, vector), code
