"""rmsprop_step in Triton: see :mod:`burnish.kernels.common.steps`, and ``csrc/math/rmsprop.h`` for the same element."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import triton
import triton.language as tl
from burnish.kernels.common import step_launch
from burnish.kernels.common.steps import OWN, make_coefficients, number, step_blocks
from burnish.kernels.common.variants import Variant
from burnish.ops.rmsprop_step import STEP

#: those that :func:`rmsprop_scalars` makes
ROWS = tl.constexpr(5)


@triton.jit
def rmsprop_scalars(numbers_ptr, lr, step):
    alpha = number(numbers_ptr, OWN)
    return alpha, 1.0 - alpha, number(numbers_ptr, OWN + 1), number(numbers_ptr, OWN + 2), lr


@triton.jit
def rmsprop_element(c, p, g, moments, FORMAT: tl.constexpr):
    alpha, take, eps, momentum, lr = c
    CENTERED: tl.constexpr = FORMAT.option
    BUFFER: tl.constexpr = FORMAT.kinds - CENTERED == 2
    square = moments[0] * alpha + g * g * take
    spread = square
    if CENTERED:
        mean = moments[1] + (g - moments[1]) * take
        spread = square - mean * mean
        spread = tl.where(spread < 0, 0.0, spread)
    update = tl.div_rn(g, tl.sqrt_rn(spread) + eps)
    if BUFFER:
        update = moments[1 + CENTERED] * momentum + update
    p = p - update * lr
    if CENTERED and BUFFER:
        return p, square, mean, update
    elif CENTERED:
        return p, square, mean
    elif BUFFER:
        return p, square, update
    else:
        return p, square


@triton.jit(do_not_specialize=["items"])
def rmsprop_step_fwd_kernel_scalars(
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
    make_coefficients(
        rmsprop_scalars, ROWS, table_ptr, numbers_ptr, coefficients_ptr, items, lr_ptr, norm_ptr, scale_ptr, found_ptr,
        HAS_NORM, HAS_SCALE, HAS_FOUND, BLOCK,
    )  # fmt: skip


@triton.jit(do_not_specialize=["items", "first", "count", "seed"])
def rmsprop_step_fwd_kernel(
    table_ptr, coefficients_ptr, items, first, count, seed, FORMAT: tl.constexpr, BLOCKS: tl.constexpr
):
    step_blocks(rmsprop_element, ROWS, table_ptr, coefficients_ptr, items, first, count, seed, FORMAT, BLOCKS)


KERNELS = (rmsprop_step_fwd_kernel_scalars, rmsprop_step_fwd_kernel)


def supports(*args: Any) -> str | None:
    return step_launch.objection(STEP, args)


def rmsprop_step(*args: Any) -> None:
    given = STEP.given(args)
    own = (given.alpha, given.eps, given.momentum)
    step_launch.launch(KERNELS, STEP, given, own, joins=given.weight_decay, option=bool(given.grad_avgs))


def variants(arch: str) -> Iterator[Variant]:
    plain, centered, momentum = ((False,), False), ((False, True), True), ((False, True), False)
    yield from step_launch.variants(KERNELS, (plain, centered, momentum, ((False, True, True), True)))
