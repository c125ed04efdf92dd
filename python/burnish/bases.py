"""What a LoRA adapter can sit on: the formats of a frozen base weight.

A format says how to check the base's tensors, what product they stand for and what the product's gradient is, in plain
torch; the backends find its kernels by the code. A base is always ``(weight, weight_scale)``:

======  =====  =======================================================================  ============
name    code   weight                                                                   weight_scale
======  =====  =======================================================================  ============
float   0      [N, K] in x's dtype                                                      None
int8    1      :func:`burnish.ops.int8_linear_pack`'s result, x quantised row by row    fp32 [N]
======  =====  =======================================================================  ============

To add one: an entry in :data:`BASES`, its product in the kernels of ``lora_linear`` that are to run it, and the layer
that holds it in :mod:`burnish.nn.base_layer`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from burnish.checks import check_devices
from burnish.ops.int8_linear import backward_reference as int8_pull
from burnish.ops.int8_linear import check_operands as check_int8
from burnish.ops.int8_linear import reference as int8_product
from burnish.ops.int8_linear import surrogate as int8_smooth
from burnish.ops.int8_linear_pack import unpack_reference
from burnish.registry import dtype_name

OptTensor = Tensor | None


@dataclass(frozen=True)
class Base:
    """One format. ``code`` is what the op's schema calls it.

    ``check(op, x, K, weight, scale)`` raises for tensors that do not fit and returns N; ``product(x, weight, scale,
    bias)`` is x W^T + bias; ``smooth`` is the same with the gradient that the op promises; ``pull(dy, weight, scale,
    K)`` is dy W; ``dense(weight, scale, x)`` is W itself, in x's dtype.
    """

    name: str
    code: int
    check: Callable[[str, Tensor, int, Tensor, OptTensor], int]
    product: Callable[[Tensor, Tensor, OptTensor, OptTensor], Tensor]
    smooth: Callable[[Tensor, Tensor, OptTensor, OptTensor], Tensor]
    pull: Callable[[Tensor, Tensor, OptTensor, int], Tensor]
    dense: Callable[[Tensor, OptTensor, Tensor], Tensor]


def _check_float(op: str, x: Tensor, K: int, weight: Tensor, scale: OptTensor) -> int:
    check_devices(op, x, weight=weight)
    torch._check(scale is None, lambda: f"{op}: weight_scale is given, expected None for a float weight")
    torch._check(
        weight.dtype == x.dtype,
        lambda: f"{op}: weight is {dtype_name(weight.dtype)}, expected {dtype_name(x.dtype)} as x is",
    )
    torch._check(
        weight.dim() == 2 and weight.shape[0] >= 1 and weight.shape[1] == K,
        lambda: f"{op}: weight has shape {tuple(weight.shape)}, expected [N, {K}] with N >= 1",
    )
    return weight.shape[0]


def _float_product(x: Tensor, weight: Tensor, scale: OptTensor, bias: OptTensor) -> Tensor:
    return F.linear(x, weight.detach(), None if bias is None else bias.to(x.dtype))


def _float_pull(dy: Tensor, weight: Tensor, scale: OptTensor, K: int) -> Tensor:
    return dy @ weight


def _float_dense(weight: Tensor, scale: OptTensor, x: Tensor) -> Tensor:
    return weight


def _check_int8(op: str, x: Tensor, K: int, weight: Tensor, scale: OptTensor) -> int:
    torch._check(scale is not None, lambda: f"{op}: weight_scale is None, expected fp32 [N] for an int8 weight")
    assert scale is not None
    check_int8(op, "x", x, K, weight=weight, scale=scale, bias=None)
    return scale.shape[0]


def _int8_product(x: Tensor, weight: Tensor, scale: OptTensor, bias: OptTensor) -> Tensor:
    assert scale is not None
    return int8_product(x, weight, scale, bias, 0, None)


def _int8_smooth(x: Tensor, weight: Tensor, scale: OptTensor, bias: OptTensor) -> Tensor:
    assert scale is not None
    return int8_smooth(x, weight, scale, bias, 0, None)


def _int8_pull(dy: Tensor, weight: Tensor, scale: OptTensor, K: int) -> Tensor:
    assert scale is not None
    return int8_pull(dy, None, weight, scale, None, K, 0, False)[0]


def _int8_dense(weight: Tensor, scale: OptTensor, x: Tensor) -> Tensor:
    assert scale is not None
    return (unpack_reference(weight, scale.shape[0], x.shape[-1]) * scale.unsqueeze(1)).to(x.dtype)


#: the formats, by code
BASES: tuple[Base, ...] = (
    Base("float", 0, _check_float, _float_product, _float_product, _float_pull, _float_dense),
    Base("int8", 1, _check_int8, _int8_product, _int8_smooth, _int8_pull, _int8_dense),
)


def format_of(weight: Tensor) -> Base:
    """The format that a base weight of this dtype has."""
    return BASES[0 if weight.is_floating_point() else 1]
