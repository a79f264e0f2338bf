"""Eight float32 numbers in one register, for kernels that Numba compiles.

Numba compiles loops over scalars; what they become is the optimiser's mood. A product at the machine's speed needs to
say which numbers stay in registers. So this module gives Numba one more type, `f32x8`, and the few operations on it
that the kernels use. Each becomes one or two instructions (AVX2; two registers of four on NEON). Pointers are
addresses: plain int64, in bytes.

A *tile* is a tuple of 2n vectors: n rows of 16 columns. Which n is part of its type, so one kernel text serves all n.
"""

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba
from llvmlite import ir
from numba import extending, types
from numba.core import cgutils
from numba.extending import models, register_model

LANES = 8

Function = TypeVar("Function", bound=Callable[..., Any])

_FLOAT, _HALF, _BYTE = ir.FloatType(), ir.HalfType(), ir.IntType(8)
_INT16, _INT32, _INT64 = ir.IntType(16), ir.IntType(32), ir.IntType(64)
_VECTOR = ir.VectorType(_FLOAT, LANES)
_INTS = ir.VectorType(_INT32, LANES)


def compiled(function: Function) -> Function:
    """Compile on first use, or take it from the cache directory; runs without the GIL, never checks bounds."""
    return cast("Function", numba.njit(nogil=True, cache=True, error_model="numpy", boundscheck=False)(function))


def intrinsic(function: Callable[..., Any]) -> Any:
    """What Numba makes of it: callable inside compiled functions only, with whatever types it accepts."""
    return extending.intrinsic(function)


class F32x8(types.Type):  # type: ignore[misc]  # numba has no type information
    def __init__(self) -> None:
        super().__init__("f32x8")


f32x8 = F32x8()


@register_model(F32x8)
class _F32x8Model(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, _VECTOR)


def _operation(result: Any, arguments: tuple[Any, ...], build: Callable[..., Any]) -> Any:
    """(signature, code generator) of an intrinsic whose code is `build(builder, *values)`."""

    def generate(context: Any, builder: Any, _signature: Any, values: Any) -> Any:
        made = build(builder, *values)
        return context.get_dummy_value() if result is types.void else made

    return result(*arguments), generate


def _at(builder: Any, address: Any, kind: Any) -> Any:
    return builder.inttoptr(address, kind.as_pointer())


def _splat(builder: Any, scalar: Any, lanes: int = LANES) -> Any:
    kind = ir.VectorType(scalar.type, lanes)
    first = builder.insert_element(ir.Constant(kind, ir.Undefined), scalar, _INT32(0))
    return builder.shuffle_vector(first, first, ir.Constant(ir.VectorType(_INT32, lanes), [0] * lanes))


def _call(builder: Any, name: str, result: Any, *values: Any) -> Any:
    kind = ir.FunctionType(result, [value.type for value in values])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), values)


def _fma(builder: Any, a: Any, b: Any, c: Any) -> Any:
    return _call(builder, "llvm.fma.v8f32", _VECTOR, a, b, c)


@intrinsic
def splat(_: Any, x: Any) -> Any:
    return _operation(f32x8, (types.float32,), _splat)


@intrinsic
def load(_: Any, address: Any) -> Any:
    return _operation(f32x8, (types.int64,), lambda b, a: b.load(_at(b, a, _VECTOR), align=4))


@intrinsic
def store(_: Any, address: Any, x: Any) -> Any:
    return _operation(types.void, (types.int64, f32x8), lambda b, a, v: b.store(v, _at(b, a, _VECTOR), align=4))


@intrinsic
def fetch(_: Any, address: Any) -> Any:
    """Ask for the cache line there; nothing happens if there is none."""

    def build(b: Any, a: Any) -> Any:
        place = b.inttoptr(a, _BYTE.as_pointer())
        kind = ir.FunctionType(ir.VoidType(), [place.type, _INT32, _INT32, _INT32])
        name = "llvm.prefetch.p0"
        return b.call(cgutils.get_or_insert_function(b.module, kind, name), [place, _INT32(0), _INT32(3), _INT32(1)])

    return _operation(types.void, (types.int64,), build)


@intrinsic
def get(_: Any, address: Any) -> Any:
    """One float32."""
    return _operation(types.float32, (types.int64,), lambda b, a: b.load(_at(b, a, _FLOAT)))


@intrinsic
def put(_: Any, address: Any, x: Any) -> Any:
    """One float32."""
    return _operation(types.void, (types.int64, types.float32), lambda b, a, v: b.store(v, _at(b, a, _FLOAT)))


@intrinsic
def get_int(_: Any, address: Any) -> Any:
    """One int32, as int64."""
    return _operation(types.int64, (types.int64,), lambda b, a: b.sext(b.load(_at(b, a, _INT32)), _INT64))


@intrinsic
def load_half(_: Any, address: Any) -> Any:
    """Eight float16 as float32: exact."""

    def build(b: Any, a: Any) -> Any:
        return b.fpext(b.load(_at(b, a, ir.VectorType(_HALF, LANES)), align=2), _VECTOR)

    return _operation(f32x8, (types.int64,), build)


@intrinsic
def load_bfloat(_: Any, address: Any) -> Any:
    """Eight bfloat16 as float32: their bits are float32's upper half."""

    def build(b: Any, a: Any) -> Any:
        raw = b.zext(b.load(_at(b, a, ir.VectorType(_INT16, LANES)), align=2), _INTS)
        return b.bitcast(b.shl(raw, ir.Constant(_INTS, [16] * LANES)), _VECTOR)

    return _operation(f32x8, (types.int64,), build)


@intrinsic
def load_bytes(_: Any, address: Any) -> Any:
    """Eight int8 as float32."""

    def build(b: Any, a: Any) -> Any:
        return b.sitofp(b.sext(b.load(_at(b, a, ir.VectorType(_BYTE, LANES)), align=1), _INTS), _VECTOR)

    return _operation(f32x8, (types.int64,), build)


@intrinsic
def load_nibbles(_: Any, address: Any) -> Any:
    """16 bytes -> four vectors: the low nibbles of bytes 0-7 and 8-15, then the high ones."""
    raw_kind = ir.VectorType(_BYTE, 16)

    def half(b: Any, raw: Any, place: int) -> Any:
        lanes = ir.Constant(ir.VectorType(_INT32, LANES), list(range(place, place + LANES)))
        return b.sitofp(b.zext(b.shuffle_vector(raw, raw, lanes), _INTS), _VECTOR)

    def generate(context: Any, b: Any, signature: Any, values: Any) -> Any:
        raw = b.load(_at(b, values[0], raw_kind), align=1)
        low = b.and_(raw, ir.Constant(raw_kind, [15] * 16))
        high = b.lshr(raw, ir.Constant(raw_kind, [4] * 16))
        parts = [half(b, low, 0), half(b, low, 8), half(b, high, 0), half(b, high, 8)]
        return context.make_tuple(b, signature.return_type, parts)

    return types.UniTuple(f32x8, 4)(types.int64), generate


@intrinsic
def fma(_: Any, a: Any, b: Any, c: Any) -> Any:
    """a * b + c, rounded once."""
    return _operation(f32x8, (f32x8, f32x8, f32x8), _fma)


@intrinsic
def add(_: Any, a: Any, b: Any) -> Any:
    return _operation(f32x8, (f32x8, f32x8), lambda builder, x, y: builder.fadd(x, y))


@intrinsic
def sub(_: Any, a: Any, b: Any) -> Any:
    return _operation(f32x8, (f32x8, f32x8), lambda builder, x, y: builder.fsub(x, y))


@intrinsic
def mul(_: Any, a: Any, b: Any) -> Any:
    return _operation(f32x8, (f32x8, f32x8), lambda builder, x, y: builder.fmul(x, y))


@intrinsic
def div(_: Any, a: Any, b: Any) -> Any:
    return _operation(f32x8, (f32x8, f32x8), lambda builder, x, y: builder.fdiv(x, y))


@intrinsic
def largest(_: Any, a: Any, b: Any) -> Any:
    """Lane by lane. A NaN in `a` gives b."""
    return _operation(
        f32x8, (f32x8, f32x8), lambda builder, x, y: builder.select(builder.fcmp_ordered(">", x, y), x, y)
    )


@intrinsic
def where_above(_: Any, a: Any, limit: Any, x: Any) -> Any:
    """x in the lanes where a > limit, else 0."""

    def build(b: Any, a: Any, limit: Any, x: Any) -> Any:
        return b.select(b.fcmp_ordered(">", a, limit), x, ir.Constant(_VECTOR, [0.0] * LANES))

    return _operation(f32x8, (f32x8, f32x8, f32x8), build)


@intrinsic
def nearest(_: Any, x: Any) -> Any:
    """Rounded to whole numbers, halves to even."""
    return _operation(f32x8, (f32x8,), lambda b, v: _call(b, "llvm.rint.v8f32", _VECTOR, v))


@intrinsic
def power_of_two(_: Any, x: Any) -> Any:
    """2^x of whole numbers from -126 to 127: the number is its own exponent field."""

    def build(b: Any, x: Any) -> Any:
        field = b.add(b.fptosi(x, _INTS), ir.Constant(_INTS, [127] * LANES))
        return b.bitcast(b.shl(field, ir.Constant(_INTS, [23] * LANES)), _VECTOR)

    return _operation(f32x8, (f32x8,), build)


@intrinsic
def lane(_: Any, x: Any, index: Any) -> Any:
    return _operation(types.float32, (f32x8, types.int64), lambda b, v, i: b.extract_element(v, b.trunc(i, _INT32)))


@intrinsic
def outer(_: Any, tile: Any, x: Any, stride: Any, first: Any, second: Any) -> Any:
    """tile[row] += x[row] * (first, second): one step of a product, for n rows of 16 columns.

    x: address of the first row's number; stride: bytes to the next row's.
    """
    rows = len(tile) // 2

    def generate(context: Any, b: Any, signature: Any, values: Any) -> Any:
        tile_value, address, step, left, right = values
        sums = []
        for row in range(rows):
            number = _splat(b, b.load(_at(b, address, _FLOAT)))
            sums.append(_fma(b, number, left, b.extract_value(tile_value, 2 * row)))
            sums.append(_fma(b, number, right, b.extract_value(tile_value, 2 * row + 1)))
            address = b.add(address, step)
        return context.make_tuple(b, signature.return_type, sums)

    return tile(tile, types.int64, types.int64, f32x8, f32x8), generate


@intrinsic
def cleared(_: Any, tile: Any) -> Any:
    """Zeros, as many as `tile` has numbers."""

    def generate(context: Any, b: Any, signature: Any, _values: Any) -> Any:
        return context.make_tuple(b, signature.return_type, [ir.Constant(_VECTOR, [0.0] * LANES)] * len(tile))

    return tile(tile), generate


@intrinsic
def add_scaled(_: Any, tile: Any, part: Any, left: Any, right: Any) -> Any:
    """tile + part * (left, right), for each row."""

    def generate(context: Any, b: Any, signature: Any, values: Any) -> Any:
        sums, parts, *columns = values
        made = [
            _fma(b, b.extract_value(parts, index), columns[index % 2], b.extract_value(sums, index))
            for index in range(len(tile))
        ]
        return context.make_tuple(b, signature.return_type, made)

    return tile(tile, tile, f32x8, f32x8), generate


def _each_vector(tile: Any, build: Callable[[Any, Any, Any], Any]) -> Callable[..., Any]:
    """A code generator that visits the vectors of a tile with their addresses; keeps what `build` gives back."""

    def generate(context: Any, b: Any, signature: Any, values: Any) -> Any:
        value, address, stride = values
        parts = []
        for row in range(len(tile) // 2):
            for column in range(2):
                place = _at(b, b.add(address, _INT64(4 * LANES * column)), _VECTOR)
                parts.append(build(b, b.extract_value(value, 2 * row + column), place))
            address = b.add(address, stride)
        if signature.return_type is types.void:
            return context.get_dummy_value()
        return context.make_tuple(b, signature.return_type, parts)

    return generate


@intrinsic
def load_tile(_: Any, tile: Any, address: Any, stride: Any) -> Any:
    """A tile of as many rows, which lie `stride` bytes apart. A stride of 0 gives each row the same numbers."""
    build = _each_vector(tile, lambda b, _, place: b.load(place, align=4))
    return tile(tile, types.int64, types.int64), build


@intrinsic
def store_tile(_: Any, tile: Any, address: Any, stride: Any) -> Any:
    build = _each_vector(tile, lambda b, x, place: b.store(x, place, align=4))
    return types.void(tile, types.int64, types.int64), build


@intrinsic
def add_tile(_: Any, tile: Any, address: Any, stride: Any) -> Any:
    """What is there, plus the tile."""
    build = _each_vector(tile, lambda b, x, place: b.store(b.fadd(b.load(place, align=4), x), place, align=4))
    return types.void(tile, types.int64, types.int64), build


@intrinsic
def multiply_tile(_: Any, tile: Any, address: Any, stride: Any) -> Any:
    """What is there, times the tile."""
    build = _each_vector(tile, lambda b, x, place: b.store(b.fmul(b.load(place, align=4), x), place, align=4))
    return types.void(tile, types.int64, types.int64), build


def _zeros(rows: int) -> Any:
    kind = types.UniTuple(f32x8, 2 * rows)

    def typed(_: Any) -> Any:
        def generate(context: Any, b: Any, signature: Any, _values: Any) -> Any:
            return context.make_tuple(b, signature.return_type, [ir.Constant(_VECTOR, [0.0] * LANES)] * (2 * rows))

        return kind(), generate

    return intrinsic(typed)


tile1, tile2, tile3, tile4, tile5, tile6 = (_zeros(rows) for rows in (1, 2, 3, 4, 5, 6))  # empty tiles of n rows


@intrinsic
def claim(_: Any, address: Any, count: Any) -> Any:
    """Add `count` to the int64 there and return what it was, in one step for all threads."""
    return _operation(
        types.int64, (types.int64, types.int64), lambda b, a, n: b.atomic_rmw("add", _at(b, a, _INT64), n, "seq_cst")
    )


@intrinsic
def watch(_: Any, address: Any) -> Any:
    """The int64 there, as other threads wrote it, and with it all that they wrote before."""
    return _operation(types.int64, (types.int64,), lambda b, a: b.load_atomic(_at(b, a, _INT64), "acquire", 8))


step_aside = types.ExternalFunction("sched_yield", types.int32())  # to whoever else wants this core
