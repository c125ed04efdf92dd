"""What layers with a block-sparse weight share: :class:`burnish.nn.BlockSparseLinear` and ``SparseConv2d``.

================  ==========================  =========================================================================
state_dict        tensor                      meaning
================  ==========================  =========================================================================
values            [nnzb, bn, bk]              the kept blocks, by rows of blocks
crow_indices      int32 [Nb + 1]              where each row of blocks begins; Nb = ceil(N / bn)
col_indices       int32 [nnzb]                the column of blocks of each, ascending in a row
scale             fp32 [N]                    with int8 values alone
bias              [N], optional               a parameter
================  ==========================  =========================================================================

The buffer ``transposed_index`` is the same index by columns, for backward: made of it and not in the state dict.
Blocks that pass the edge of the weight are padded with zeros, which stay zero in training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from burnish.block_format import block_mask, blocks_along, check_index, compress, expand, transpose_index
from burnish.configs import BlockSparse
from burnish.errors import PatternError
from burnish.nn.derived import derive
from burnish.nn.sparse_layer import SparseLayer, drawn


class BlockLayer(SparseLayer):
    """The parent of the block-sparse layers."""

    INDEX: ClassVar = {"crow_indices": torch.int32, "col_indices": torch.int32}
    CONFIG: ClassVar = BlockSparse
    config: BlockSparse
    crow_indices: Tensor
    col_indices: Tensor
    transposed_index: Tensor

    @property
    def grid(self) -> tuple[int, int]:
        """Blocks along N and along K."""
        (N, K), (bn, bk) = self.matrix, self.config.sides
        return blocks_along(N, bn), blocks_along(K, bk)

    @property
    def density(self) -> float:
        """The share of the blocks that is kept."""
        rows, columns = self.grid
        return self.nnz / (rows * columns)

    @property
    def pattern(self) -> str:
        high, wide = self.config.sides
        return f"{high}x{wide} blocks"

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return {
            "values": (self.nnz, *self.config.sides),
            "crow_indices": (self.grid[0] + 1,),
            "col_indices": (self.nnz,),
        }

    def _check_pattern(self, weight: Tensor, kept: Tensor, has_mask: bool) -> None:
        blocks = block_mask(kept, self.config.sides)
        self.nnz = int(blocks.sum())
        if has_mask:
            whole = blocks.repeat_interleave(self.config.sides[0], 0).repeat_interleave(self.config.sides[1], 1)
            lost = whole[: kept.shape[0], : kept.shape[1]] & ~kept
            if bool(lost.any()):
                row, column = lost.nonzero()[0].tolist()
                raise PatternError(
                    f"its mask is not one of {self.pattern}: it leaves out row {row}, column {column} of a block that "
                    "it keeps, and training would bring that back; prune with burnish.prune.Block, or make the mask "
                    "permanent first"
                )
        self._check_density("blocks")

    def _compress(self, weight: Tensor, kept: Tensor) -> Sequence[Tensor]:
        return compress(weight, self.config.sides, kept)

    def _expand(self) -> Tensor:
        return expand(self.values, self.crow_indices, self.col_indices, *self.matrix)

    def _drawn(self, device: torch.device) -> Tensor:
        (N, K), (bn, bk) = self.matrix, self.config.sides
        blocks = drawn(*self.grid, self.nnz, device)
        return blocks.repeat_interleave(bn, 0)[:N].repeat_interleave(bk, 1)[:, :K]

    def _finish(self) -> None:
        crow, col, columns = self.crow_indices, self.col_indices, self.grid[1]

        def make() -> Tensor:
            if col.is_meta:
                return torch.empty(columns + 1 + 2 * self.nnz, dtype=torch.int32, device=col.device)
            return transpose_index(crow, col, columns)

        made = derive(col, ("transposed", columns), make)
        known = self._buffers.get("transposed_index")
        if known is None or known.device != made.device:
            self.register_buffer("transposed_index", made, persistent=False)
        elif not known.is_meta:
            known.copy_(made)

    def _fault(self, index: Mapping[str, Tensor], values: Tensor | None) -> str | None:
        try:
            check_index("*", index["crow_indices"], index["col_indices"], self.grid[1])
        except ValueError as error:
            return str(error)
        if values is None:
            return None
        (N, K), (down, across), (bn, bk) = self.matrix, self.grid, self.config.sides
        over = expand(values, index["crow_indices"], index["col_indices"], down * bn, across * bk)
        if bool(over[N:].any()) or bool(over[:, K:].any()):
            return f"values has something beyond the weight of {N} x {K}, expected zeros"
        return None
