"""What the optimizers' steps share: one kernel makes each tensor's scalars, one steps all elements of all tensors.

The first, of a program a hundred tensors, reads the scalars that lie on the device (lr, grad_norm, grad_scale,
found_inf, steps), counts the steps, and writes the coefficients: fp32 rows of an entry a tensor, of which :data:`GO` is
0 where nothing may change. It alone touches steps, and the second kernel of the same stream follows it: nothing races.
The second takes :data:`ROWS` blocks of 256 elements a program, whole blocks of coded moments.

An optimizer brings two device functions, as compile-time constants:

    scalars(numbers_ptr, lr, step)          its own coefficients, from fp64; numbers from :data:`OWN` on are its own
    element(c, p, g, moments, FORMAT)       p and each of the moments after the step, fp32 tiles; c: its coefficients

Arithmetic is fp32, one rounding an operation, as in csrc/cpu/simd, and the scalars' fp64, rounded once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from burnish.kernels.common import lists, target
from burnish.kernels.common.lists import ADDRESSES, COUNT, INDEX, TYPES, entry, item_of, pointer
from burnish.kernels.common.moments import STATE_BLOCK, decode_moment, encode_moment
from burnish.kernels.common.rounding import ROUNDING_GROUP, join, round_random, rounding_halves, split
from burnish.kernels.common.variants import Variant

if TYPE_CHECKING:
    from burnish.step_op import StepOp

#: rows of the table
PARAM, GRAD, STEP, SCALES, MASTER, EMA, MASK, MOMENTS = (tl.constexpr(ADDRESSES.value + row) for row in range(8))
#: what the host knows, in fp64: max_grad_norm, -1 to maximize or 1, decay that joins the gradient, ema_decay
LIMIT, SIGN, DECAY, AVERAGE, OWN = (tl.constexpr(place) for place in range(5))
#: rows of the coefficients, before an optimizer's own
GO, GRADIENT, JOINS, KEPT, TAKEN, FIRST = (tl.constexpr(row) for row in range(6))

#: rows that no optimizer passes
MOST = 24
#: blocks of 256 a program, its warps, and tensors a program of the scalars: 8 elements a thread, one call of Philox
ROWS, WARPS, ITEMS = 4, 4, 128
#: a thread of the steps: 512 threads of a multiprocessor keep enough of its memory's bandwidth asked for
REGISTERS = 128

_FP32, _BF16, _FP16, _INT8 = tl.float32, tl.bfloat16, tl.float16, tl.int8
_device = attrgetter("device")


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
    zero = tl.zeros([BLOCK], tl.float32)
    counted = inside & (zero + going != 0)
    step_ptr = tl.load(table_ptr + STEP * items + item, mask=inside, other=0).to(tl.pointer_type(tl.float32))
    step = tl.load(step_ptr, mask=counted, other=0.0) + 1.0
    tl.store(step_ptr, step, mask=counted)

    average = number(numbers_ptr, AVERAGE)
    common = (going, factor, number(numbers_ptr, DECAY), average, 1.0 - average)
    own = scalars(numbers_ptr, tl.load(lr_ptr).to(tl.float64), step.to(tl.float64))
    for row in tl.static_range(FIRST):
        tl.store(coefficients_ptr + row * items + item, zero + common[row], mask=inside)
    for row in tl.static_range(OWN_ROWS):
        tl.store(coefficients_ptr + (FIRST + row) * items + item, zero + own[row], mask=inside)


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
    common = load_coefficients(coefficients_ptr + item, items, FIRST)
    own = load_coefficients(coefficients_ptr + FIRST * items + item, items, OWN_ROWS)
    where = (table_ptr, items, item)
    elements = entry(where, COUNT)
    blocks = (elements + STATE_BLOCK - 1) // STATE_BLOCK
    # where nothing may change, nothing is inside: no address is read or written
    reach, blocks = tl.where(common[GO] != 0, elements, 0), tl.where(common[GO] != 0, blocks, 0)
    if FORMAT.aligned:
        reach = tl.multiple_of(reach, 16)
    row = tile.to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
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
    stepped = element(own, p, g, moments, FORMAT)
    p = stepped[0]
    kept = inside
    if FORMAT.masked:
        kept = tl.load(pointer(where, MASK, tl.int8, FORMAT.aligned) + at, mask=inside, other=0) != 0
        p = tl.where(kept, p, 0.0)
    if FORMAT.average:
        average(p, kept, where, at, inside, common, FORMAT)
    for kind in tl.static_range(KINDS):
        store_moment(stepped[1 + kind], where, row, blocks, at, inside, seed, FORMAT, kind)
    store_parameter(p, where, row, at, inside, seed, FORMAT)


def objection(op: StepOp, args: tuple[Any, ...]) -> str | None:
    """Why the kernels cannot run these arguments of a step op, in words."""
    given = op.given(args)
    if not given.params:
        return None
    device = given.params[0].device
    for name in ("params", "steps", "scales"):
        strange = next((one for one in map(_device, getattr(given, name)) if one != device), None)
        if strange is not None:
            return f"{name} has a tensor on {strange}, expected {device}, where params[0] is"
    for name in ("lr", "grad_norm", "grad_scale", "found_inf"):
        scalar = getattr(given, name)
        if scalar is not None and scalar.device != device:
            return f"{name} is on {scalar.device}, expected {device}, where params[0] is"
    return target.objection(given.params[0])


def launch(
    kernels: tuple[Any, Any], op: StepOp, given: Any, own: tuple[float, ...], joins: float = 0.0, option: bool = False
) -> None:
    """Step everything.

    Args:
        kernels: the op's, around :func:`make_coefficients` and :func:`step_blocks`.
        given: the op's arguments by name.
        own: its own numbers.
        joins: the weight decay that joins the gradient.
        option: see :class:`Format`.
    """
    if not given.params:
        return
    scalars_kernel, step_kernel = kernels
    first, kinds = given.params[0], op.lists(given)
    table = lists.table(
        ROWS * STATE_BLOCK.value,
        (given.params, given.grads),
        (given.steps, given.scales),
        (given.masters, given.emas, given.masks, *kinds.values()),
    )
    common = (given.max_grad_norm, -1.0 if given.maximize else 1.0, joins, given.ema_decay)
    numbers = lists.numbers((*common, *own), first.device)
    coefficients = torch.empty(MOST * table.items, dtype=torch.float32, device=first.device)
    scalars = (given.grad_norm, given.grad_scale, given.found_inf)
    base = Format(
        _FP32,
        _FP32,
        TYPES[next(iter(kinds.values()))[0].dtype] if kinds else _FP32,
        tuple(kind.signed for kind in kinds),
        "" if not given.masters else "split" if given.masters[0].dtype == torch.uint8 else "fp32",
        average=bool(given.emas),
        masked=bool(given.masks),
        random=given.seed is not None,
        coupled=joins != 0,
        option=option,
    )
    with target.on_device(first):
        scalars_kernel[(triton.cdiv(table.items, ITEMS),)](
            *(table.rows, numbers, coefficients, table.items, given.lr),
            *(given.lr if one is None else one for one in scalars),
            *(one is not None for one in scalars),
            BLOCK=ITEMS,
            num_warps=WARPS,
            enable_fp_fusion=False,
        )
        for one in filter(attrgetter("blocks"), table.launches):
            step_kernel[(one.blocks,)](
                *(table.rows, coefficients, table.items, one.first, one.count, given.seed or 0),
                FORMAT=replace(base, parameter=one.types[0], gradient=one.types[1], aligned=one.aligned),
                BLOCKS=ROWS,
                num_warps=WARPS,
                enable_fp_fusion=False,
                **target.registers(REGISTERS),
            )


def variants(
    kernels: tuple[Any, Any], kinds: Iterable[tuple[tuple[bool, ...], bool]], every: bool = False
) -> Iterator[Variant]:
    """What the gates compile of an op: each set of its moments (``signed``, ``option``) in fp32, and the first in other
    formats; with ``every``, for one op, all formats and additions, which no optimizer's element has a part in."""
    pointers = {"table_ptr": "*i64", "coefficients_ptr": "*fp32", "items": "i32"}
    scalars = {"numbers_ptr": "*fp64", "lr_ptr": "*fp64", "norm_ptr": "*fp32", "scale_ptr": "*fp32"}
    scalars["found_ptr"] = "*fp32"
    for label, given in (("scaled", True), ("plain", False)):
        constants = dict.fromkeys(("HAS_NORM", "HAS_SCALE", "HAS_FOUND"), given)
        yield Variant(label, kernels[0], pointers | scalars, constants | {"BLOCK": ITEMS}, WARPS)
    types = pointers | {"first": "i32", "count": "i32", "seed": "i64"}
    plain = [Format(_FP32, _FP32, _FP32, signed, option=option) for signed, option in kinds]
    base = replace(plain[0], coupled=True)
    half = replace(base, parameter=_BF16, gradient=_BF16)
    formats = {f"fp32-{number}": one for number, one in enumerate(plain)}
    formats["bf16-random"] = replace(half, gradient=_FP32, moments=_BF16, random=True)
    formats["bf16-split-int8"] = replace(half, moments=_INT8, master="split")
    if every:
        formats["ragged"] = replace(base, aligned=False)
        formats["bf16-ragged"] = replace(half, moments=_BF16, random=True, aligned=False)
        formats["bf16-master"] = replace(half, master="fp32", average=True, masked=True)
        formats["fp16-random"] = replace(base, parameter=_FP16, gradient=_FP16, random=True)
        formats["fp16-split"] = replace(formats["fp16-random"], random=False, master="split", average=True, masked=True)
    for label, one in formats.items():
        narrow = not one.aligned and one.parameter != _FP32
        constants = {"FORMAT": one, "BLOCKS": ROWS}
        yield Variant(label, kernels[1], types, constants, WARPS, narrow=narrow, registers=REGISTERS)
