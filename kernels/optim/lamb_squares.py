"""lamb_squares in Triton: see :mod:`burnish.kernels.common.steps`, and ``csrc/math/lamb.h`` for the same element.

After the scalars, which count no step here, a program sums the squares of a chunk of 16384 elements in fp64, and then
a program a tensor those of its chunks. Both sums are taken in a fixed order, which is not the CPU's: the same bits on
every launch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from burnish.kernels.common import step_launch, target
from burnish.kernels.common.lists import COUNT, INDEX, entry, item_of
from burnish.kernels.common.moments import STATE_BLOCK
from burnish.kernels.common.step_launch import REGISTERS, WARPS, Call
from burnish.kernels.common.step_launch import ROWS as BLOCKS
from burnish.kernels.common.steps import (
    FIRST,
    MOMENTS,
    OWN,
    begin_item,
    begin_tensors,
    kept_of,
    load_elements,
    number,
    power,
    store_coefficients,
)
from burnish.kernels.common.variants import Variant
from burnish.ops.lamb_squares import STEP

#: elements of a chunk; chunks that are added at a time, and the warps that do
CHUNK = 16384
SUM_BLOCK, SUM_WARPS = 512, 4
#: coefficients that :func:`lamb_scalars` makes, and numbers that it takes
ROWS, NUMBERS = tl.constexpr(7), tl.constexpr(7)
#: the table's row of where a tensor's chunks start
CHUNKS = tl.constexpr(MOMENTS.value + len(STEP.moments))


@triton.jit
def lamb_scalars(numbers_ptr, step):
    beta1, beta2, corrects = number(numbers_ptr, OWN), number(numbers_ptr, OWN + 1), number(numbers_ptr, OWN + 6)
    correction1 = tl.where(corrects != 0, 1.0 - power(number(numbers_ptr, OWN + 2), step), 1.0)
    correction2 = tl.where(corrects != 0, 1.0 - power(number(numbers_ptr, OWN + 3), step), 1.0)
    eps, decay = number(numbers_ptr, OWN + 4), number(numbers_ptr, OWN + 5)
    return decay, 1.0 - beta1, beta2, 1.0 - beta2, 1.0 / correction1, 1.0 / tl.sqrt(correction2), eps


@triton.jit
def lamb_update(c, p, g, moments):
    """What the parameter moves along, and the new moments."""
    decay, take1, beta2, take2, correct, inverse, eps = c
    first = moments[0] + (g - moments[0]) * take1
    second = moments[1] * beta2 + g * g * take2
    update = tl.div_rn(first * correct, tl.sqrt_rn(second) * inverse + eps)
    return tl.where(decay != 0, update + p * decay, update), first, second


@triton.jit(do_not_specialize=["items"])
def lamb_squares_fwd_kernel_scalars(
    table_ptr,
    numbers_ptr,
    coefficients_ptr,
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
    item, inside, _, step, common = begin_tensors(
        table_ptr, numbers_ptr, items, lr_ptr, norm_ptr, scale_ptr, found_ptr, HAS_NORM, HAS_SCALE, HAS_FOUND, False,
        BLOCK,
    )  # fmt: skip
    store_coefficients(coefficients_ptr, items, item, inside, 0, common, FIRST)
    store_coefficients(coefficients_ptr, items, item, inside, FIRST, lamb_scalars(numbers_ptr, step), ROWS)


@triton.jit(do_not_specialize=["items", "first", "count", "chunks_before"])
def lamb_squares_fwd_kernel(
    table_ptr,
    coefficients_ptr,
    parts_ptr,  # fp64 [chunks, 2]
    items,
    first,
    count,
    chunks_before,
    FORMAT: tl.constexpr,
    BLOCKS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    part = chunks_before + tl.program_id(0)
    item, chunk = item_of(table_ptr + CHUNKS * items, first, count, part)
    where, common, own, reach, blocks = begin_item(ROWS, table_ptr, coefficients_ptr, items, item, FORMAT)
    begin = chunk.to(tl.int64) * (CHUNK // STATE_BLOCK)
    end = tl.minimum(blocks - begin, CHUNK // STATE_BLOCK).to(tl.int32)
    of_p = tl.zeros([BLOCKS, STATE_BLOCK], tl.float64)
    of_u = tl.zeros([BLOCKS, STATE_BLOCK], tl.float64)
    for start in range(0, end, BLOCKS):
        row = begin + start + tl.arange(0, BLOCKS)
        at, inside, p, g, moments = load_elements(where, row, blocks, reach, common, FORMAT)
        kept = kept_of(where, at, inside, FORMAT)
        u, _, _ = lamb_update(own, p, g, moments)
        p, u = tl.where(kept, p, 0.0).to(tl.float64), tl.where(kept, u, 0.0).to(tl.float64)
        of_p = tl.fma(p, p, of_p)
        of_u = tl.fma(u, u, of_u)
    tl.store(parts_ptr + 2 * part, tl.sum(tl.sum(of_p, axis=1), axis=0))
    tl.store(parts_ptr + 2 * part + 1, tl.sum(tl.sum(of_u, axis=1), axis=0))


@triton.jit(do_not_specialize=["items"])
def lamb_squares_fwd_kernel_sum(table_ptr, parts_ptr, squares_ptr, items, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    item = tl.program_id(0)
    where = (table_ptr, items, item)
    chunks = ((entry(where, COUNT) + CHUNK - 1) // CHUNK).to(tl.int32)
    parts_ptr += 2 * entry(where, CHUNKS)
    at, of = tl.arange(0, BLOCK)[:, None], tl.arange(0, 2)[None, :]
    sums = tl.zeros([BLOCK, 2], tl.float64)
    for start in range(0, chunks, BLOCK):
        sums += tl.load(parts_ptr + 2 * (start + at) + of, mask=at < chunks - start, other=0.0)
    tl.store(squares_ptr + 2 * entry(where, INDEX) + tl.arange(0, 2), tl.sum(sums, axis=0))


def supports(*args: Any) -> str | None:
    return step_launch.objection(STEP, args)


def own_numbers(given: Any) -> tuple[float, ...]:
    """As :func:`lamb_scalars` has them."""
    betas = (given.beta1, given.beta2)
    return (*betas, *map(step_launch.log2, betas), given.eps, given.weight_decay, float(given.bias_correction))


def lamb_squares(*args: Any) -> torch.Tensor:
    given = STEP.given(args)
    if not given.params:
        return given.lr.new_empty((0, 2), dtype=torch.float64)
    with target.on_device(given.params[0]):
        return sum_squares(step_launch.prepare(STEP, given, own_numbers(given), chunk=CHUNK))


def sum_squares(call: Call) -> torch.Tensor:
    """The op's result, on the current device; ``call`` is of LAMB, with chunks."""
    table, device = call.table, call.numbers.device
    parts = torch.empty((table.chunks, 2), dtype=torch.float64, device=device)
    squares = torch.empty((table.items, 2), dtype=torch.float64, device=device)
    step_launch.make_scalars(lamb_squares_fwd_kernel_scalars, call)
    before = 0
    for one in table.launches:
        if one.chunks:
            lamb_squares_fwd_kernel[(one.chunks,)](
                *(table.rows, call.coefficients, parts, table.items, one.first, one.count, before),
                FORMAT=replace(call.format(one), average=False, random=False),
                BLOCKS=BLOCKS,
                CHUNK=CHUNK,
                num_warps=WARPS,
                enable_fp_fusion=False,
                **target.registers(REGISTERS),
            )
        before += one.chunks
    lamb_squares_fwd_kernel_sum[(table.items,)](
        *(table.rows, parts, squares, table.items),
        CHUNK=CHUNK,
        BLOCK=SUM_BLOCK,
        num_warps=SUM_WARPS,
        enable_fp_fusion=False,
    )
    return squares


def variants(arch: str) -> Iterator[Variant]:
    yield from step_launch.scalar_variants(lamb_squares_fwd_kernel_scalars)
    chosen = step_launch.formats((((True, False), False),), every=True, coupled=False)
    chosen = {label: replace(one, average=False, random=False) for label, one in chosen.items()}
    types = {"parts_ptr": "*fp64", "chunks_before": "i32"}
    yield from step_launch.element_variants(lamb_squares_fwd_kernel, chosen, types, CHUNK=CHUNK)
    types = {"table_ptr": "*i64", "parts_ptr": "*fp64", "squares_ptr": "*fp64", "items": "i32"}
    yield Variant("", lamb_squares_fwd_kernel_sum, types, {"CHUNK": CHUNK, "BLOCK": SUM_BLOCK}, SUM_WARPS)
