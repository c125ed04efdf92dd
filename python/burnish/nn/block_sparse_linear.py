"""BlockSparseLinear: nn.Linear that has only some blocks of its weight, trainable or int8.

    y = x W^T + bias               W [N, K]: zero but for the kept blocks

:mod:`burnish.nn.blocks` has the state, :mod:`burnish.nn.sparse_layer` what all sparse layers do. Under autocast x and
float values are cast; before int8 values x is. The op is :func:`burnish.ops.bsr_linear`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from burnish.configs import BlockSparse
from burnish.nn.blocks import BlockLayer
from burnish.nn.linear_form import LinearForm
from burnish.nn.sparse_layer import check_dtype, kept_of
from burnish.ops.bsr_linear import bsr_linear


class BlockSparseLinear(LinearForm, BlockLayer):
    """A linear layer with a block-sparse weight.

    Args:
        in_features: K, at least 1.
        out_features: N, at least 1.
        bias: whether there is one.
        device: where the tensors live; ``meta`` allocates nothing.
        dtype: fp32, bf16 or fp16.
        density: the share of the blocks that is kept, drawn at random.
        block: as :class:`burnish.BlockSparse` has it.
        values: ``float`` or ``int8``.

    Usually made by :meth:`from_float`, :func:`burnish.swap_` or :func:`burnish.prune.finalize_`.

    Raises:
        ValueError: a size, the density, the block or the values are none of those.
        TypeError: the density is no number, or there are no kernels for the dtype.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        density: float,
        block: int | tuple[int, int] = 32,
        values: str = "float",
    ) -> None:
        super().__init__()
        self._set_sizes(in_features, out_features)
        self.dtype = check_dtype("BlockSparseLinear", dtype or torch.get_default_dtype())
        self.config = BlockSparse(block, values=values)
        self.nnz = kept_of("BlockSparseLinear", density, self.grid[0] * self.grid[1])
        self._set_new(bias, device)

    def forward(self, input: Tensor) -> Tensor:
        x, values = self._operands(input)
        index = self._buffers  # a tenth of the time that an attribute of nn.Module takes
        return bsr_linear(
            x,
            values,
            index["crow_indices"],  # type: ignore[arg-type]
            index["col_indices"],  # type: ignore[arg-type]
            index["transposed_index"],  # type: ignore[arg-type]
            index["scale"],
            self._parameters["bias"],
            self.out_features,
        )
