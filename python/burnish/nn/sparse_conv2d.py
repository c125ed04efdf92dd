"""SparseConv2d: nn.Conv2d that has only some blocks of its weight, trainable or int8.

The weight ``[N, C, kh, kw]`` counts as a matrix ``[N, C kh kw]``, output channels x (input channels x kernel), whose
kept blocks are stored. :mod:`burnish.nn.blocks` has the state, :mod:`burnish.nn.sparse_layer` what all sparse layers
do, :mod:`burnish.sparse_conv` how it runs. Strides, dilations, every padding mode, ``"same"`` and ``"valid"``, and both
memory formats are nn.Conv2d's; there is one group. Under autocast x and float values are cast; before int8 values x is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from burnish.configs import BlockSparse
from burnish.nn.blocks import BlockLayer
from burnish.nn.lowrank_conv2d import SHARED
from burnish.nn.sparse_layer import check_dtype, check_sizes, kept_of
from burnish.schemes import Geometry
from burnish.sparse_conv import bsr_conv2d


class SparseConv2d(BlockLayer):
    """A 2-d convolution with a block-sparse weight.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, bias, padding_mode, device, dtype: as
            nn.Conv2d's, fp32, bf16 or fp16.
        groups: 1.
        density: the share of the blocks that is kept, drawn at random.
        block: as :class:`burnish.BlockSparse` has it.
        values: ``float`` or ``int8``.

    Usually made by :meth:`from_float`, :func:`burnish.swap_` or :func:`burnish.prune.finalize_`.

    Raises:
        ValueError: an argument is out of range, or is not one that nn.Conv2d takes; more than one group.
        TypeError: the density is no number, or there are no kernels for the dtype.
    """

    in_channels: int
    out_channels: int
    kernel_size: tuple[int, int]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: str | int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        density: float,
        block: int | tuple[int, int] = 32,
        values: str = "float",
    ) -> None:
        super().__init__()
        self.dtype = check_dtype("SparseConv2d", dtype or torch.get_default_dtype())
        walk: tuple[Any, ...] = (stride, padding, dilation, groups, False, padding_mode, "meta")
        self._take_form(torch.nn.Conv2d(in_channels, out_channels, kernel_size, *walk))  # which checks its arguments
        self.config = BlockSparse(block, values=values)
        self.nnz = kept_of("SparseConv2d", density, self.grid[0] * self.grid[1])
        self._set_new(bias, device)

    @property
    def matrix(self) -> tuple[int, int]:
        return self.out_channels, self.in_channels * self.kernel_size[0] * self.kernel_size[1]

    def _take_form(self, module: torch.nn.Module) -> None:
        for name in SHARED:
            setattr(self, name, getattr(module, name))
        check_sizes("SparseConv2d", in_channels=self.in_channels, out_channels=self.out_channels)
        if module.groups != 1:
            raise ValueError(f"SparseConv2d: groups is {module.groups}, expected 1")
        self.geometry = Geometry.of(module)  # type: ignore[arg-type]

    @classmethod
    def _check_module(cls, module: torch.nn.Module, who: str) -> None:
        if not isinstance(module, torch.nn.Conv2d):
            raise TypeError(f"{who}: the module is {type(module).__name__}, expected nn.Conv2d")
        if module.groups != 1:
            raise ValueError(f"{who}: the module has {module.groups} groups, expected 1")

    def to_dense(self) -> Tensor:
        """The weight ``[N, C, kh, kw]`` with its zeros, in :attr:`dtype`, a copy: bit for bit the one that was
        compressed; of int8 values, ``values * scale``."""
        return self._dense().view(self.out_channels, self.in_channels, *self.kernel_size)

    def to_float(self) -> torch.nn.Conv2d:
        """nn.Conv2d with :meth:`to_dense` for a weight. Both hold the same bias."""
        walk: list[Any] = [getattr(self, name) for name in ("stride", "padding", "dilation", "groups")]
        walk += [False, self.padding_mode, "meta", self.dtype]
        conv = torch.nn.Conv2d(self.in_channels, self.out_channels, self.kernel_size, *walk)
        conv.weight = Parameter(self.to_dense(), requires_grad=self.values.requires_grad)
        conv.bias = self.bias
        return conv.train(self.training)

    def forward(self, input: Tensor) -> Tensor:
        if input.dim() not in (3, 4) or input.shape[-3] != self.in_channels:
            raise RuntimeError(
                f"SparseConv2d: x has shape {tuple(input.shape)}, expected [B, {self.in_channels}, H, W] or "
                f"[{self.in_channels}, H, W]"
            )
        x, values = self._cast(input)
        index = (self.crow_indices, self.col_indices, self.transposed_index)
        return bsr_conv2d(x, values, index, self.scale, self.bias, self.out_channels, self.kernel_size, self.geometry)

    def extra_repr(self) -> str:
        described = torch.nn.Conv2d.extra_repr(self)  # type: ignore[arg-type]
        return f"{described}, {self._describe()}"
