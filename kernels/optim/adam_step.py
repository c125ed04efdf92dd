"""adam_step in Triton: see :mod:`burnish.kernels.common.steps`, and ``csrc/math/adam.h`` for the same element."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import triton
import triton.language as tl
from burnish.kernels.common import step_launch
from burnish.kernels.common.numerics import maximum
from burnish.kernels.common.steps import OWN, make_coefficients, number, power, step_blocks
from burnish.kernels.common.variants import Variant
from burnish.ops.adam_step import STEP

#: those that :func:`adam_scalars` makes
ROWS = tl.constexpr(7)


@triton.jit
def adam_scalars(numbers_ptr, lr, step):
    beta1, beta2 = number(numbers_ptr, OWN), number(numbers_ptr, OWN + 1)
    correction1 = 1.0 - power(number(numbers_ptr, OWN + 2), step)
    correction2 = 1.0 - power(number(numbers_ptr, OWN + 3), step)
    eps, decay = number(numbers_ptr, OWN + 4), number(numbers_ptr, OWN + 5)
    kept = tl.where(decay != 0, 1.0 - lr * decay, 1.0)
    return kept, 1.0 - beta1, beta2, 1.0 - beta2, 1.0 / tl.sqrt(correction2), eps, lr / correction1


@triton.jit
def adam_element(c, p, g, moments, FORMAT: tl.constexpr):
    kept, take1, beta2, take2, inverse, eps, step_size = c
    first = moments[0] + (g - moments[0]) * take1
    second = moments[1] * beta2 + g * g * take2
    spread = second
    if FORMAT.kinds == 3:
        spread = maximum(moments[2], second)
    update = tl.div_rn(first, tl.sqrt_rn(spread) * inverse + eps)
    p = p * kept - update * step_size
    if FORMAT.kinds == 3:
        return p, first, second, spread
    else:
        return p, first, second


@triton.jit(do_not_specialize=["items"])
def adam_step_fwd_kernel_scalars(
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
        adam_scalars, ROWS, table_ptr, numbers_ptr, coefficients_ptr, items, lr_ptr, norm_ptr, scale_ptr, found_ptr,
        HAS_NORM, HAS_SCALE, HAS_FOUND, BLOCK,
    )  # fmt: skip


@triton.jit(do_not_specialize=["items", "first", "count", "seed"])
def adam_step_fwd_kernel(
    table_ptr, coefficients_ptr, items, first, count, seed, FORMAT: tl.constexpr, BLOCKS: tl.constexpr
):
    step_blocks(adam_element, ROWS, table_ptr, coefficients_ptr, items, first, count, seed, FORMAT, BLOCKS)


KERNELS = (adam_step_fwd_kernel_scalars, adam_step_fwd_kernel)


def supports(*args: Any) -> str | None:
    return step_launch.objection(STEP, args)


def adam_step(*args: Any) -> None:
    given = STEP.given(args)
    decay = given.weight_decay
    betas = (given.beta1, given.beta2)
    own = (*betas, *map(step_launch.log2, betas), given.eps, decay if given.decoupled else 0.0)
    step_launch.launch(KERNELS, STEP, given, own, joins=0.0 if given.decoupled else decay)


def variants(arch: str) -> Iterator[Variant]:
    yield from step_launch.variants(KERNELS, (((True, False), False), ((True, False, False), False)), every=True)
