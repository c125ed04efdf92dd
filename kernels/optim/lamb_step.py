"""lamb_step in Triton: see :mod:`burnish.kernels.common.steps`, and ``csrc/math/lamb.h`` for the same element.

The sums of squares, where they are not given, are :mod:`burnish.kernels.optim.lamb_squares`'s, of the same table.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import triton
import triton.language as tl
from burnish.kernels.common import step_launch, target
from burnish.kernels.common.lists import INDEX
from burnish.kernels.common.steps import FIRST, OWN, begin_tensors, number, step_blocks, store_coefficients
from burnish.kernels.common.variants import Variant
from burnish.kernels.optim import lamb_squares
from burnish.kernels.optim.lamb_squares import NUMBERS, lamb_scalars, lamb_update
from burnish.kernels.optim.lamb_squares import ROWS as UPDATE_ROWS
from burnish.ops.lamb_step import STEP

#: the update's, and the step size
ROWS = tl.constexpr(UPDATE_ROWS.value + 1)


@triton.jit
def lamb_step_size(squares_ptr, index, inside, limit, lr):
    """lr times the ratio of the norms of a tensor and of its update, 1 where one of them is 0 or NaN."""
    of_p = tl.load(squares_ptr + 2 * index, mask=inside, other=0.0)
    of_u = tl.load(squares_ptr + 2 * index + 1, mask=inside, other=0.0)
    trust = tl.sqrt(of_p) / tl.sqrt(of_u)
    trust = tl.where(trust > limit, limit, trust)
    return lr * tl.where((of_p > 0) & (of_u > 0), trust, 1.0)


@triton.jit
def lamb_element(c, p, g, moments, FORMAT: tl.constexpr):
    update, first, second = lamb_update(c[:UPDATE_ROWS], p, g, moments)
    return p - update * c[UPDATE_ROWS], first, second


@triton.jit(do_not_specialize=["items"])
def lamb_step_fwd_kernel_scalars(
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
    squares_ptr,
    HAS_SQUARES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    item, inside, lr, step, common = begin_tensors(
        table_ptr, numbers_ptr, items, lr_ptr, norm_ptr, scale_ptr, found_ptr, HAS_NORM, HAS_SCALE, HAS_FOUND, True,
        BLOCK,
    )  # fmt: skip
    size = lr
    if HAS_SQUARES:
        index = tl.load(table_ptr + INDEX * items + item, mask=inside, other=0)
        size = lamb_step_size(squares_ptr, index, inside, number(numbers_ptr, OWN + NUMBERS), lr)
    own = lamb_scalars(numbers_ptr, step)
    store_coefficients(coefficients_ptr, items, item, inside, 0, common, FIRST)
    store_coefficients(coefficients_ptr, items, item, inside, FIRST, own, UPDATE_ROWS)
    store_coefficients(coefficients_ptr, items, item, inside, FIRST + UPDATE_ROWS, (size,), 1)


@triton.jit(do_not_specialize=["items", "first", "count", "seed"])
def lamb_step_fwd_kernel(
    table_ptr, coefficients_ptr, items, first, count, seed, FORMAT: tl.constexpr, BLOCKS: tl.constexpr
):
    step_blocks(lamb_element, ROWS, table_ptr, coefficients_ptr, items, first, count, seed, FORMAT, BLOCKS)


def supports(*args: Any) -> str | None:
    return step_launch.objection(STEP, args)


def lamb_step(*args: Any) -> None:
    given = STEP.given(args)
    if not given.params:
        return
    own = (*lamb_squares.own_numbers(given), 1.0 if given.trust_clip else math.inf)
    sums = given.adapt and given.squares is None
    with target.on_device(given.params[0]):
        call = step_launch.prepare(STEP, given, own, chunk=lamb_squares.CHUNK if sums else None)
        squares = lamb_squares.sum_squares(call) if sums else given.squares
        own_scalars = {"squares_ptr": squares if given.adapt else given.lr, "HAS_SQUARES": given.adapt}
        step_launch.make_scalars(lamb_step_fwd_kernel_scalars, call, **own_scalars)
        step_launch.step_elements(lamb_step_fwd_kernel, call)


def variants(arch: str) -> Iterator[Variant]:
    yield from step_launch.scalar_variants(lamb_step_fwd_kernel_scalars, "squares")
    chosen = step_launch.formats((((True, False), False),), coupled=False)
    yield from step_launch.element_variants(lamb_step_fwd_kernel, chosen, {"seed": "i64"})
