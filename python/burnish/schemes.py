"""Convolutions whose weight is a product: three schemes, what their factors are and how they run.

==========  =================================================================  =====================================
scheme      stages, R channels between them, per group                         rank up to
==========  =================================================================  =====================================
channel     kh x kw to R (A), then 1 x 1 to N (B)                              min(N / G, kh kw C / G)
spatial     kh x 1 to R (A), then 1 x kw to N (B)                              min(kw N / G, kh C / G)
tucker2     1 x 1 to R (A), kh x kw from R to R (core), then 1 x 1 to N (B)    max(N / G, C / G), each side no wider
                                                                               than it has channels
==========  =================================================================  =====================================

Factors are convolution weights, the groups one after the other: ``A [G R, C / G, ...]``, ``core [G R, R, kh, kw]``,
``B [N, R, ...]``. Stride, dilation and padding belong to the stage that has the kernel's extent in that direction. At
the largest rank every scheme is the dense convolution.

Sources: channel, Zhang et al. 2015 (arXiv 1505.06798); spatial, Jaderberg et al. 2014 (arXiv 1405.3866); tucker2, Kim
et al. 2015 (arXiv 1511.06530).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from burnish import autocast, factorize
from burnish.ops.lowrank_linear import lowrank_linear

SCHEMES = ("channel", "spatial", "tucker2")
Pair = tuple[int, int]
OptTensor = Tensor | None


@dataclass(frozen=True)
class Geometry:
    """How a convolution walks; ``padding`` is left, right, top, bottom, as F.pad has it, and ``mode`` too."""

    stride: Pair
    padding: tuple[int, int, int, int]
    dilation: Pair
    groups: int
    mode: str

    @classmethod
    def of(cls, module: torch.nn.Conv2d) -> Geometry:
        """That of a layer with nn.Conv2d's attributes."""
        stride, dilation = _pair(module.stride), _pair(module.dilation)
        if module.padding == "same":
            total = [step * (size - 1) for step, size in zip(dilation, module.kernel_size, strict=True)]
            top, left = (each // 2 for each in total)
            padding = (left, total[1] - left, top, total[0] - top)
        else:
            high, wide = (0, 0) if module.padding == "valid" else _pair(module.padding)  # type: ignore[arg-type]
            padding = (wide, wide, high, high)
        mode = {"zeros": "constant"}.get(module.padding_mode, module.padding_mode)
        return cls(stride, padding, dilation, module.groups, mode)


def _pair(value: Sequence[int]) -> Pair:
    high, wide = value
    return high, wide


def limit(scheme: str, weight: Sequence[int], groups: int) -> int:
    """The largest rank for a weight of this shape."""
    return max(_sides(scheme, weight, groups, weight[0] * weight[1] * weight[2] * weight[3]))


def shapes(scheme: str, weight: Sequence[int], groups: int, rank: int) -> tuple[tuple[int, ...], ...]:
    """The shapes of the factors: of A and B, or A, core and B."""
    outputs, inputs, high, wide = weight
    first, last = _sides(scheme, weight, groups, rank)
    if scheme == "channel":
        return (groups * first, inputs, high, wide), (outputs, last, 1, 1)
    if scheme == "spatial":
        return (groups * first, inputs, high, 1), (outputs, last, 1, wide)
    return (groups * first, inputs, 1, 1), (groups * last, first, high, wide), (outputs, last, 1, 1)


def _sides(scheme: str, weight: Sequence[int], groups: int, rank: int) -> Pair:
    """The channels after the first stage and before the last one, in each group, at this rank."""
    outputs, inputs, high, wide = weight[0] // groups, *weight[1:]
    if scheme == "tucker2":
        return min(rank, inputs, outputs * high * wide), min(rank, outputs, inputs * high * wide)
    width = min(outputs, inputs * high * wide) if scheme == "channel" else min(outputs * wide, inputs * high)
    return min(rank, width), min(rank, width)


def decompose(
    scheme: str, weight: Tensor, groups: int, moment: OptTensor = None, *, who: str
) -> factorize.Factorization:
    """The factors of a weight ``[N, C / G, kh, kw]`` at every rank, as the scheme's stages have them.

    A ``moment`` is that of the unfolded patches, ``[G, C / G kh kw, C / G kh kw]``, which the channel scheme alone can
    use: its first stage sees a patch as a vector.

    Raises:
        ValueError: as :func:`burnish.factorize.matrix`.
    """
    grouped = weight.unflatten(0, (groups, -1))  # [G, n, c, kh, kw]
    n, c, high, wide = grouped.shape[1:]
    if scheme == "tucker2":
        terms = factorize.tucker2(grouped, who=who)
    elif scheme == "channel":
        terms = factorize.matrix(grouped.flatten(2), moment, who=who)
    else:
        terms = factorize.matrix(grouped.permute(0, 1, 4, 2, 3).reshape(groups, n * wide, c * high), who=who)

    def factors(rank: int) -> tuple[Tensor, ...]:
        made = terms.factors(rank)
        if scheme == "spatial":
            A, B = made
            made = A, B.unflatten(1, (n, wide)).transpose(2, 3).reshape(groups, n, -1, 1, wide)
        wanted = shapes(scheme, weight.shape, groups, rank)
        return tuple(factor.reshape(shape) for factor, shape in zip(made, wanted, strict=True))

    return factorize.Factorization(factors, terms.lost)


def compose(scheme: str, groups: int, A: Tensor, core: OptTensor, B: Tensor) -> Tensor:
    """The dense weight ``[N, C / G, kh, kw]`` that the factors stand for, in their dtype."""
    first, last = A.unflatten(0, (groups, -1)), B.unflatten(0, (groups, -1))
    if scheme == "tucker2":
        assert core is not None
        dense = torch.einsum("gno,goixy,gic->gncxy", last[..., 0, 0], core.unflatten(0, (groups, -1)), first[..., 0, 0])
    elif scheme == "channel":
        dense = torch.einsum("gnr,grcxy->gncxy", last[..., 0, 0], first)
    else:
        dense = torch.einsum("gnry,grcx->gncxy", last[..., 0, :], first[..., 0])
    return dense.flatten(0, 1)


def lowrank_conv2d(
    x: Tensor, A: Tensor, core: OptTensor, B: Tensor, bias: OptTensor, scheme: str, geometry: Geometry
) -> Tensor:
    """The convolution of ``x [.., C, H, W]`` with the weight that the factors stand for; the result has x's memory
    format, as nn.Conv2d's has.

    A pointwise convolution (1 x 1, one group, channel or spatial scheme) of a channels_last ``x`` is one call of
    :func:`burnish.ops.lowrank_linear`: its pixels are rows, and what is between the stages stays on the chip. All else
    runs torch's convolutions, one a stage.
    """
    left, right, top, bottom = geometry.padding
    if geometry.mode != "constant" or (left, top) != (right, bottom):
        x = F.pad(x, geometry.padding, geometry.mode)
        left = top = 0
    stride, dilation, groups = geometry.stride, geometry.dilation, geometry.groups
    if core is not None:
        x = F.conv2d(x, A, groups=groups)
        x = F.conv2d(x, core, None, stride, (top, left), dilation, groups)
        return F.conv2d(x, B, bias, groups=groups)
    if not (top or left) and _pointwise(x, A, B, groups):
        pixels = x[:, :, :: stride[0], :: stride[1]].permute(0, 2, 3, 1)
        rows, down, up = autocast.operands(pixels, A.flatten(1), B.flatten(1))
        return lowrank_linear(rows, down, up, bias).permute(0, 3, 1, 2)
    if scheme == "channel":
        x = F.conv2d(x, A, None, stride, (top, left), dilation, groups)
        return F.conv2d(x, B, bias, groups=groups)
    x = F.conv2d(x, A, None, (stride[0], 1), (top, 0), (dilation[0], 1), groups)
    return F.conv2d(x, B, bias, (1, stride[1]), (0, left), (1, dilation[1]), groups)


def _pointwise(x: Tensor, A: Tensor, B: Tensor, groups: int) -> bool:
    """Whether x's pixels are rows of memory and the factors matrices over them."""
    if groups != 1 or x.dim() != 4 or A.shape[2] * B.shape[3] * A.shape[3] != 1:
        return False
    return x.is_contiguous(memory_format=torch.channels_last) and (
        not x.is_contiguous() or x.shape[2] * x.shape[3] == 1
    )
