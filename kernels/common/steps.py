"""What the optimizers' steps share: one kernel makes each tensor's scalars, one steps all elements of all tensors.

The first, of a program a hundred tensors, reads the scalars that lie on the device (lr, grad_norm, grad_scale,
found_inf, steps), counts the steps, and writes the coefficients: fp32 rows of an entry a tensor, of which :data:`GO` is
0 where nothing may change. It alone touches steps, and the second kernel of the same stream follows it: nothing races.
The second takes some blocks of 256 elements a program, whole blocks of coded moments. How both are launched is in
:mod:`burnish.kernels.common.step_launch`.

An optimizer brings two device functions, as compile-time constants:

    scalars(numbers_ptr, lr, step)          its own coefficients, from fp64; numbers from :data:`OWN` on are its own
    element(c, p, g, moments, FORMAT)       p and each of the moments after the step, fp32 tiles; c: its coefficients

One whose coefficients need more than these makes the first kernel of :func:`begin_tensors` and
:func:`store_coefficients`; one that reads the elements before it steps them makes that pass of :func:`begin_item`,
:func:`load_elements` and :func:`kept_of`.

Arithmetic is fp32, one rounding an operation, as in csrc/cpu/simd, and the scalars' fp64, rounded once.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from burnish.kernels.common.lists import ADDRESSES, COUNT, INDEX, entry, item_of, pointer
from burnish.kernels.common.moments import STATE_BLOCK, decode_moment, encode_moment
from burnish.kernels.common.rounding import ROUNDING_GROUP, join, round_random, rounding_halves, split

#: rows of the table; after the moments come the starts of chunks, where there are such
PARAM, GRAD, STEP, SCALES, MASTER, EMA, MASK, MOMENTS = (tl.constexpr(ADDRESSES.value + row) for row in range(8))
#: what the host knows, in fp64: max_grad_norm, -1 to maximize or 1, decay that joins the gradient, ema_decay
LIMIT, SIGN, DECAY, AVERAGE, OWN = (tl.constexpr(place) for place in range(5))
#: rows of the coefficients, before an optimizer's own
GO, GRADIENT, JOINS, KEPT, TAKEN, FIRST = (tl.constexpr(row) for row in range(6))


@dataclass(frozen=True)
class Format:
    """What is compiled in. ``signed``: of each kind of moment, whether its codes are; ``option``: the optimizer's."""

    parameter: tl.dtype
    gradient: tl.dtype
    moments: tl.dtype
    signed: tuple[bool, ...]
    master: str = ""
    average: bool = False
    masked: bool = False
    random: bool = False
    coupled: bool = False
    option: bool = False
    aligned: bool = True

    @property
    def kinds(self) -> int:
        return len(self.signed)


@triton.jit
def power(log2_base, exponent):
    """base ** exponent in fp64, of base in [0, 1)."""
    return tl.where(exponent == 0, 1.0, tl.exp2(log2_base * exponent))


@triton.jit
def number(numbers_ptr, PLACE: tl.constexpr):
    return tl.load(numbers_ptr + PLACE)


@triton.jit
def begin_tensors(
    table_ptr,
    numbers_ptr,
    items,
    lr_ptr,
    norm_ptr,
    scale_ptr,
    found_ptr,
    HAS_NORM: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_FOUND: tl.constexpr,
    COUNTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """BLOCK tensors: which they are and which of them there are, lr and their steps in fp64, counted where COUNTS says
    so, and the coefficients that all optimizers have."""
    item = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = item < items
    factor = number(numbers_ptr, SIGN)
    going = 1.0
    if HAS_SCALE:
        factor = factor / tl.load(scale_ptr).to(tl.float64)
    if HAS_FOUND:
        going = tl.where(tl.load(found_ptr) == 0, 1.0, 0.0)
    if HAS_NORM:
        norm = tl.load(norm_ptr).to(tl.float64)
        limit = number(numbers_ptr, LIMIT)
        clip = limit / (norm + tl.full([], 1e-6, tl.float64))
        factor = tl.where(limit > 0, factor * tl.where(clip > 1, 1.0, clip), factor)
        if HAS_FOUND:
            going = tl.where(tl.abs(norm) < float("inf"), going, 0.0)
    counted = inside & (tl.zeros([BLOCK], tl.float32) + going != 0)
    step_ptr = tl.load(table_ptr + STEP * items + item, mask=inside, other=0).to(tl.pointer_type(tl.float32))
    step = tl.load(step_ptr, mask=counted, other=0.0) + 1.0
    if COUNTS:
        tl.store(step_ptr, step, mask=counted)
    average = number(numbers_ptr, AVERAGE)
    common = (going, factor, number(numbers_ptr, DECAY), average, 1.0 - average)
    return item, inside, tl.load(lr_ptr).to(tl.float64), step.to(tl.float64), common


@triton.jit
def store_coefficients(coefficients_ptr, items, item, inside, first: tl.constexpr, values, ROWS: tl.constexpr):
    """Round each of the values, scalars or one a tensor, into the rows from ``first`` on."""
    zero = tl.zeros(item.shape, tl.float32)
    for row in tl.static_range(ROWS):
        tl.store(coefficients_ptr + (first + row) * items + item, zero + values[row], mask=inside)


@triton.jit
def make_coefficients(
    scalars: tl.constexpr,
    OWN_ROWS: tl.constexpr,
    table_ptr,
    numbers_ptr,
    coefficients_ptr,  # [FIRST + OWN_ROWS, items]
    items,
    lr_ptr,
    norm_ptr,
    scale_ptr,
    found_ptr,
    HAS_NORM: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_FOUND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Count the steps of BLOCK tensors and write their coefficients."""
    item, inside, lr, step, common = begin_tensors(
        table_ptr, numbers_ptr, items, lr_ptr, norm_ptr, scale_ptr, found_ptr, HAS_NORM, HAS_SCALE, HAS_FOUND, True,
        BLOCK,
    )  # fmt: skip
    store_coefficients(coefficients_ptr, items, item, inside, 0, common, FIRST)
    own = scalars(numbers_ptr, lr, step)
    store_coefficients(coefficients_ptr, items, item, inside, FIRST, own, OWN_ROWS)


@triton.jit
def load_moment(where, row, blocks, at, inside, FORMAT: tl.constexpr, KIND: tl.constexpr):
    moment_ptr = pointer(where, MOMENTS + KIND, FORMAT.moments, FORMAT.aligned)
    stored = tl.load(moment_ptr + at, mask=inside, other=0)
    if FORMAT.moments.is_int8():
        scale_ptr = pointer(where, SCALES, tl.float32, False)
        scale = tl.load(scale_ptr + KIND * blocks + row, mask=row < blocks, other=0.0)
        return decode_moment(stored, scale, FORMAT.signed[KIND])
    else:
        return stored.to(tl.float32)


@triton.jit
def store_moment(moment, where, row, blocks, at, inside, seed, FORMAT: tl.constexpr, KIND: tl.constexpr):
    moment_ptr = pointer(where, MOMENTS + KIND, FORMAT.moments, FORMAT.aligned)
    if FORMAT.moments.is_int8():
        code, scale = encode_moment(moment, inside, FORMAT.signed[KIND])
        scale_ptr = pointer(where, SCALES, tl.float32, False)
        tl.store(scale_ptr + KIND * blocks + row, scale, mask=row < blocks)
        tl.store(moment_ptr + at, code, mask=inside)
    else:
        store_rounded(moment, moment_ptr, where, row, at, inside, seed, FORMAT.random, 2 + KIND, FORMAT.moments)


@triton.jit
def store_rounded(
    value, to_ptr, where, row, at, inside, seed, RANDOM: tl.constexpr, STREAM: tl.constexpr, TYPE: tl.constexpr
):
    """Rounded to nearest even, or at random by the bits of a stream."""
    if RANDOM and not TYPE.is_fp32():
        GROUPS: tl.constexpr = STATE_BLOCK // ROUNDING_GROUP
        group = row[:, None] * GROUPS + tl.arange(0, GROUPS)[None, :]
        random = rounding_halves(seed, entry(where, INDEX), STREAM, group)
        tl.store(to_ptr + at, round_random(value, random, TYPE), mask=inside)
    else:
        tl.store(to_ptr + at, value.to(TYPE), mask=inside)


@triton.jit
def load_parameter(where, at, inside, FORMAT: tl.constexpr):
    """The fp32 values of the parameter, or of its master."""
    MASTERS: tl.constexpr = FORMAT.master
    parameter_ptr = pointer(where, PARAM, FORMAT.parameter, FORMAT.aligned)
    if MASTERS == "fp32":
        return tl.load(pointer(where, MASTER, tl.float32, FORMAT.aligned) + at, mask=inside, other=0.0)
    elif MASTERS == "split":
        low = tl.load(pointer(where, MASTER, tl.int8, FORMAT.aligned) + at, mask=inside, other=0)
        return join(tl.load(parameter_ptr + at, mask=inside, other=0.0), low)
    else:
        return tl.load(parameter_ptr + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def store_parameter(value, where, row, at, inside, seed, FORMAT: tl.constexpr):
    MASTERS: tl.constexpr = FORMAT.master
    parameter_ptr = pointer(where, PARAM, FORMAT.parameter, FORMAT.aligned)
    if MASTERS == "fp32":
        tl.store(pointer(where, MASTER, tl.float32, FORMAT.aligned) + at, value, mask=inside)
        tl.store(parameter_ptr + at, value.to(FORMAT.parameter), mask=inside)
    elif MASTERS == "split":
        high, low = split(value, FORMAT.parameter)
        tl.store(parameter_ptr + at, high, mask=inside)
        tl.store(pointer(where, MASTER, tl.int8, FORMAT.aligned) + at, low, mask=inside)
    else:
        store_rounded(value, parameter_ptr, where, row, at, inside, seed, FORMAT.random, 1, FORMAT.parameter)


@triton.jit
def average(value, kept, where, at, inside, common, FORMAT: tl.constexpr):
    """Move the moving average on; ``kept`` is the mask, not read unless there is one."""
    average_ptr = pointer(where, EMA, tl.float32, FORMAT.aligned)
    moved = tl.load(average_ptr + at, mask=inside, other=0.0) * common[KEPT] + value * common[TAKEN]
    if FORMAT.masked:
        moved = tl.where(kept, moved, 0.0)
    tl.store(average_ptr + at, moved, mask=inside)


@triton.jit
def load_coefficients(coefficients_ptr, items, ROWS: tl.constexpr):
    """A tensor's, of as many rows."""
    loaded = ()
    for row in tl.static_range(ROWS):
        loaded += (tl.load(coefficients_ptr + row * items),)
    return loaded


@triton.jit
def begin_item(OWN_ROWS: tl.constexpr, table_ptr, coefficients_ptr, items, item, FORMAT: tl.constexpr):
    """Where an item's addresses are, its coefficients, and how many elements and blocks it has: none where nothing may
    change, so that no address is read or written."""
    common = load_coefficients(coefficients_ptr + item, items, FIRST)
    own = load_coefficients(coefficients_ptr + FIRST * items + item, items, OWN_ROWS)
    where = (table_ptr, items, item)
    reach = tl.where(common[GO] != 0, entry(where, COUNT), 0)
    blocks = (reach + STATE_BLOCK - 1) // STATE_BLOCK
    if FORMAT.aligned:
        reach = tl.multiple_of(reach, 16)
    return where, common, own, reach, blocks


@triton.jit
def load_elements(where, row, blocks, reach, common, FORMAT: tl.constexpr):
    """Of the blocks ``row``: the places of their elements and which are inside, and p, g and the moments."""
    at = row[:, None] * STATE_BLOCK + tl.arange(0, STATE_BLOCK)[None, :]
    inside = at < reach
    p = load_parameter(where, at, inside, FORMAT)
    gradient_ptr = pointer(where, GRAD, FORMAT.gradient, FORMAT.aligned)
    g = tl.load(gradient_ptr + at, mask=inside, other=0.0).to(tl.float32) * common[GRADIENT]
    if FORMAT.coupled:
        g = g + p * common[JOINS]
    moments = ()
    KINDS: tl.constexpr = FORMAT.kinds
    for kind in tl.static_range(KINDS):
        moments += (load_moment(where, row, blocks, at, inside, FORMAT, kind),)
    return at, inside, p, g, moments


@triton.jit
def kept_of(where, at, inside, FORMAT: tl.constexpr):
    """Which of the elements inside the mask keeps."""
    if FORMAT.masked:
        return tl.load(pointer(where, MASK, tl.int8, FORMAT.aligned) + at, mask=inside, other=0) != 0
    else:
        return inside


@triton.jit
def step_blocks(
    element: tl.constexpr,
    OWN_ROWS: tl.constexpr,
    table_ptr,
    coefficients_ptr,  # [FIRST + OWN_ROWS, items]
    items,
    first,
    count,
    seed,
    FORMAT: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Step the elements of BLOCKS blocks of one of the items [first, first + count)."""
    item, tile = item_of(table_ptr, first, count, tl.program_id(0))
    where, common, own, reach, blocks = begin_item(OWN_ROWS, table_ptr, coefficients_ptr, items, item, FORMAT)
    row = tile.to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    at, inside, p, g, moments = load_elements(where, row, blocks, reach, common, FORMAT)
    stepped = element(own, p, g, moments, FORMAT)
    p = stepped[0]
    kept = kept_of(where, at, inside, FORMAT)
    if FORMAT.masked:
        p = tl.where(kept, p, 0.0)
    if FORMAT.average:
        average(p, kept, where, at, inside, common, FORMAT)
    KINDS: tl.constexpr = FORMAT.kinds
    for kind in tl.static_range(KINDS):
        store_moment(stepped[1 + kind], where, row, blocks, at, inside, seed, FORMAT, kind)
    store_parameter(p, where, row, at, inside, seed, FORMAT)
