"""lion_step in Triton: see :mod:`burnish.kernels.common.steps`, and ``csrc/math/lion.h`` for the same element."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import triton
import triton.language as tl
from burnish.kernels.common import step_launch
from burnish.kernels.common.steps import OWN, make_coefficients, number, step_blocks
from burnish.kernels.common.variants import Variant
from burnish.ops.lion_step import STEP

#: those that :func:`lion_scalars` makes
ROWS = tl.constexpr(6)


@triton.jit
def lion_scalars(numbers_ptr, lr, step):
    beta1, beta2, decay = number(numbers_ptr, OWN), number(numbers_ptr, OWN + 1), number(numbers_ptr, OWN + 2)
    kept = tl.where(decay != 0, 1.0 - lr * decay, 1.0)
    return kept, beta1, 1.0 - beta1, beta2, 1.0 - beta2, lr


@triton.jit
def lion_element(c, p, g, moments, FORMAT: tl.constexpr):
    kept, beta1, take1, beta2, take2, lr = c
    direction = moments[0] * beta1 + g * take1
    sign = tl.where(direction > 0, 1.0, tl.where(direction < 0, -1.0, 0.0))  # 0 at NaN, as torch.sign has it
    return p * kept - sign * lr, moments[0] * beta2 + g * take2


@triton.jit(do_not_specialize=["items"])
def lion_step_fwd_kernel_scalars(
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
        lion_scalars, ROWS, table_ptr, numbers_ptr, coefficients_ptr, items, lr_ptr, norm_ptr, scale_ptr, found_ptr,
        HAS_NORM, HAS_SCALE, HAS_FOUND, BLOCK,
    )  # fmt: skip


@triton.jit(do_not_specialize=["items", "first", "count", "seed"])
def lion_step_fwd_kernel(
    table_ptr, coefficients_ptr, items, first, count, seed, FORMAT: tl.constexpr, BLOCKS: tl.constexpr
):
    step_blocks(lion_element, ROWS, table_ptr, coefficients_ptr, items, first, count, seed, FORMAT, BLOCKS)


KERNELS = (lion_step_fwd_kernel_scalars, lion_step_fwd_kernel)


def supports(*args: Any) -> str | None:
    return step_launch.objection(STEP, args)


def lion_step(*args: Any) -> None:
    given = STEP.given(args)
    step_launch.launch(KERNELS, STEP, given, (given.beta1, given.beta2, given.weight_decay))


def variants(arch: str) -> Iterator[Variant]:
    yield from step_launch.variants(KERNELS, (((True,), False),))
