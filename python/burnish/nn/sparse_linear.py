"""SparseLinear: nn.Linear that keeps any of its weights, and a bit for each place: for few rows, where the time is that
of reading the weight.

    y = x W^T + bias

==========  ================================  ===========================================================
state_dict  tensor                            meaning
==========  ================================  ===========================================================
values      [nnz]                             the kept weights, row by row
bitmap      uint8 [N, 8 * ceil(K / 64)]       bit k % 8 of byte k / 8 of a row: weight k is kept
row_starts  int64 [N + 1]                     where the rows begin in values
bias        [N], optional                     a parameter
==========  ================================  ===========================================================

:mod:`burnish.nn.sparse_layer` has what all sparse layers do. Under autocast x and the values are cast. The op is
:func:`burnish.ops.sparse_linear`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from burnish.configs import Sparse
from burnish.nn.linear_form import LinearForm
from burnish.nn.sparse_layer import check_dtype, drawn, kept_of
from burnish.ops.sparse_linear import bitmap_bytes, compress, expand, sparse_linear


class SparseLinear(LinearForm):
    """A linear layer without the zeros of its weight.

    Args:
        in_features: K, at least 1.
        out_features: N, at least 1.
        bias: whether there is one.
        device: where the tensors live; ``meta`` allocates nothing.
        dtype: fp32, bf16 or fp16.
        density: the share of the weights that is kept, drawn at random.

    Usually made by :meth:`from_float`, :func:`burnish.swap_` or :func:`burnish.prune.finalize_`.

    Raises:
        ValueError: a size or the density is out of range.
        TypeError: the density is no number, or there are no kernels for the dtype.
    """

    INDEX: ClassVar = {"bitmap": torch.uint8, "row_starts": torch.int64}
    CONFIG: ClassVar = Sparse
    config: Sparse
    bitmap: Tensor
    row_starts: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        density: float,
    ) -> None:
        super().__init__()
        self._set_sizes(in_features, out_features)
        self.dtype = check_dtype("SparseLinear", dtype or torch.get_default_dtype())
        self.config = Sparse()
        self.nnz = kept_of("SparseLinear", density, in_features * out_features)
        self._set_new(bias, device)

    @property
    def density(self) -> float:
        """The share of the weights that is kept."""
        return self.nnz / (self.in_features * self.out_features)

    @property
    def pattern(self) -> str:
        return "any"

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        N, K = self.matrix
        return {"values": (self.nnz,), "bitmap": (N, bitmap_bytes(K)), "row_starts": (N + 1,)}

    def _check_pattern(self, weight: Tensor, kept: Tensor, has_mask: bool) -> None:
        self.nnz = int(kept.sum())
        self._check_density("weights")

    def _compress(self, weight: Tensor, kept: Tensor) -> Sequence[Tensor]:
        return compress(weight, kept)

    def _expand(self) -> Tensor:
        return expand(self.values, self.bitmap, *self.matrix)

    def _drawn(self, device: torch.device) -> Tensor:
        return drawn(*self.matrix, self.nnz, device)

    def _fault(self, index: Mapping[str, Tensor], values: Tensor | None) -> str | None:
        bitmap, starts, K = index["bitmap"], index["row_starts"].cpu(), self.in_features
        bits = bitmap.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8, device=bitmap.device) & 1
        if bool(bits.flatten(1)[:, K:].any()):
            return f"bitmap has bits beyond the {K} inputs, expected zeros"
        counts = bits.sum((1, 2)).cpu()
        if int(starts[0]) != 0 or not torch.equal(starts.diff(), counts):
            wrong = (starts.diff() != counts).nonzero()
            row = int(wrong[0]) if len(wrong) else 0
            return (
                f"row_starts has {int(starts[row])} and {int(starts[row + 1])} for row {row}, whose bitmap keeps "
                f"{int(counts[row])}: the two must agree, from 0 on"
            )
        if int(starts[-1]) != self.nnz:
            return f"row_starts ends at {int(starts[-1])}, expected {self.nnz}, the number of values"
        return None

    def forward(self, input: Tensor) -> Tensor:
        x, values = self._operands(input)
        buffers = self._buffers  # a tenth of the time that an attribute of nn.Module takes
        return sparse_linear(x, values, buffers["bitmap"], buffers["row_starts"], self._parameters["bias"])  # type: ignore[arg-type]
