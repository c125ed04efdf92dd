"""adagrad_step in Triton: see :mod:`burnish.kernels.common.steps`, and ``csrc/math/adagrad.h`` for the same element."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import triton
import triton.language as tl
from burnish.kernels.common import step_launch
from burnish.kernels.common.steps import OWN, make_coefficients, number, step_blocks
from burnish.kernels.common.variants import Variant
from burnish.ops.adagrad_step import STEP

#: those that :func:`adagrad_scalars` makes
ROWS = tl.constexpr(2)


@triton.jit
def adagrad_scalars(numbers_ptr, lr, step):
    return number(numbers_ptr, OWN), lr / (1.0 + (step - 1.0) * number(numbers_ptr, OWN + 1))


@triton.jit
def adagrad_element(c, p, g, moments, FORMAT: tl.constexpr):
    eps, step_size = c
    total = moments[0] + g * g
    update = tl.div_rn(g, tl.sqrt_rn(total) + eps)
    return p - update * step_size, total


@triton.jit(do_not_specialize=["items"])
def adagrad_step_fwd_kernel_scalars(
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
        adagrad_scalars, ROWS, table_ptr, numbers_ptr, coefficients_ptr, items, lr_ptr, norm_ptr, scale_ptr, found_ptr,
        HAS_NORM, HAS_SCALE, HAS_FOUND, BLOCK,
    )  # fmt: skip


@triton.jit(do_not_specialize=["items", "first", "count", "seed"])
def adagrad_step_fwd_kernel(
    table_ptr, coefficients_ptr, items, first, count, seed, FORMAT: tl.constexpr, BLOCKS: tl.constexpr
):
    step_blocks(adagrad_element, ROWS, table_ptr, coefficients_ptr, items, first, count, seed, FORMAT, BLOCKS)


KERNELS = (adagrad_step_fwd_kernel_scalars, adagrad_step_fwd_kernel)


def supports(*args: Any) -> str | None:
    return step_launch.objection(STEP, args)


def adagrad_step(*args: Any) -> None:
    given = STEP.given(args)
    step_launch.launch(KERNELS, STEP, given, (given.eps, given.lr_decay), joins=given.weight_decay)


def variants(arch: str) -> Iterator[Variant]:
    yield from step_launch.variants(KERNELS, (((False,), False),))
