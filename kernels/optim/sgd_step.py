"""sgd_step in Triton: see :mod:`burnish.kernels.common.steps`, and ``csrc/math/sgd.h`` for the same element."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import triton
import triton.language as tl
from burnish.kernels.common import step_launch
from burnish.kernels.common.steps import OWN, make_coefficients, number, step_blocks
from burnish.kernels.common.variants import Variant
from burnish.ops.sgd_step import STEP

#: those that :func:`sgd_scalars` makes
ROWS = tl.constexpr(4)


@triton.jit
def sgd_scalars(numbers_ptr, lr, step):
    first = tl.where(step == 1, 1.0, 0.0)
    return lr, number(numbers_ptr, OWN), 1.0 - number(numbers_ptr, OWN + 1), first


@triton.jit
def sgd_element(c, p, g, moments, FORMAT: tl.constexpr):
    lr, momentum, take, first = c
    if FORMAT.kinds == 0:
        return (p - g * lr,)
    else:
        buffer = tl.where(first != 0, g, moments[0] * momentum + g * take)
        if FORMAT.option:  # nesterov
            g = g + buffer * momentum
        else:
            g = buffer
        return p - g * lr, buffer


@triton.jit(do_not_specialize=["items"])
def sgd_step_fwd_kernel_scalars(
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
        sgd_scalars, ROWS, table_ptr, numbers_ptr, coefficients_ptr, items, lr_ptr, norm_ptr, scale_ptr, found_ptr,
        HAS_NORM, HAS_SCALE, HAS_FOUND, BLOCK,
    )  # fmt: skip


@triton.jit(do_not_specialize=["items", "first", "count", "seed"])
def sgd_step_fwd_kernel(
    table_ptr, coefficients_ptr, items, first, count, seed, FORMAT: tl.constexpr, BLOCKS: tl.constexpr
):
    step_blocks(sgd_element, ROWS, table_ptr, coefficients_ptr, items, first, count, seed, FORMAT, BLOCKS)


KERNELS = (sgd_step_fwd_kernel_scalars, sgd_step_fwd_kernel)


def supports(*args: Any) -> str | None:
    return step_launch.objection(STEP, args)


def sgd_step(*args: Any) -> None:
    given = STEP.given(args)
    own = (given.momentum, given.dampening)
    step_launch.launch(KERNELS, STEP, given, own, joins=given.weight_decay, option=given.nesterov)


def variants(arch: str) -> Iterator[Variant]:
    yield from step_launch.variants(KERNELS, (((True,), False), ((True,), True), ((), False)))
