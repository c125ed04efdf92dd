"""Sparse24Linear: nn.Linear that keeps two of each four weights along its inputs, trainable or int8.

    y = x W^T + bias               W [N, K]: at most two non-zeros in each group of four along K

==========  =======================  ================================================================
state_dict  tensor                   meaning
==========  =======================  ================================================================
values      [N, Kp / 2]              the two of each group, in order; Kp = K up to a multiple of 8
metadata    uint8 [N, Kp / 8]        their positions, 2 bits each, first below second
scale       fp32 [N]                 with int8 values alone
bias        [N], optional            a parameter
==========  =======================  ================================================================

A group with fewer than two non-zeros keeps zeros at its first free positions, which training may fill.
:mod:`burnish.nn.sparse_layer` has what all sparse layers do. Under autocast x and float values are cast; before int8
values x is. The op is :func:`burnish.ops.sparse24_linear`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from burnish.configs import Sparse24
from burnish.errors import PatternError
from burnish.nn.linear_form import LinearForm
from burnish.nn.sparse_layer import check_dtype
from burnish.ops.sparse24_linear import sparse24_linear
from burnish.sparse24_format import compress, expand, padded


class Sparse24Linear(LinearForm):
    """A linear layer with a 2:4 weight.

    Args:
        in_features: K, at least 1.
        out_features: N, at least 1.
        bias: whether there is one.
        device: where the tensors live; ``meta`` allocates nothing.
        dtype: fp32, bf16 or fp16.
        values: ``float`` or ``int8``.

    The places are drawn at random. Usually made by :meth:`from_float`, :func:`burnish.swap_` or
    :func:`burnish.prune.finalize_`.

    Raises:
        ValueError: a size or the values are none of those.
        TypeError: there are no kernels for the dtype.
    """

    INDEX: ClassVar = {"metadata": torch.uint8}
    CONFIG: ClassVar = Sparse24
    config: Sparse24
    metadata: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        values: str = "float",
    ) -> None:
        super().__init__()
        self._set_sizes(in_features, out_features)
        self.dtype = check_dtype("Sparse24Linear", dtype or torch.get_default_dtype())
        self.config = Sparse24(values)
        self.nnz = out_features * padded(in_features) // 2
        self._set_new(bias, device)

    @property
    def density(self) -> float:
        """The share of the weight that has a place."""
        return 0.5

    @property
    def pattern(self) -> str:
        return "2:4"

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        N, width = self.out_features, padded(self.in_features)
        return {"values": (N, width // 2), "metadata": (N, width // 8)}

    def _check_pattern(self, weight: Tensor, kept: Tensor, has_mask: bool) -> None:
        self.nnz = weight.shape[0] * padded(weight.shape[1]) // 2
        counts = F.pad(kept, (0, -kept.shape[1] % 4)).unflatten(1, (-1, 4)).sum(2)
        crowded = counts > 2
        if bool(crowded.any()):
            row, group = crowded.nonzero()[0].tolist()
            what = "kept weights" if has_mask else "non-zeros"
            raise PatternError(
                f"not 2:4 along K: row {row}, group {group} has {int(counts[row, group])} {what}, "
                f"{int(crowded.sum())} of {crowded.numel()} groups have more than two; prune it first with "
                "burnish.prune"
            )

    def _compress(self, weight: Tensor, kept: Tensor) -> Sequence[Tensor]:
        return compress(weight, kept)

    def _expand(self) -> Tensor:
        return expand(self.values, self.metadata, *self.matrix)

    def _drawn(self, device: torch.device) -> Tensor:
        N, K = self.matrix
        order = torch.rand(N, padded(K) // 4, 4, device=device).argsort(-1)
        return (order < 2).flatten(1)[:, :K]

    def _fault(self, index: Mapping[str, Tensor], values: Tensor | None) -> str | None:
        metadata, K = index["metadata"], self.in_features
        for nibble in (metadata & 15, metadata >> 4):
            wrong = (nibble & 3) >= (nibble >> 2)
            if bool(wrong.any()):
                row, byte = wrong.nonzero()[0].tolist()
                return (
                    f"metadata is {int(metadata[row, byte])} at row {row}, byte {byte}, expected a first position "
                    "below the second in each half"
                )
        over = padded(K) - K
        if values is None or not over:
            return None
        last = expand(values[:, -4:].contiguous(), metadata[:, -1:].contiguous(), len(values), 8)
        return f"values has something beyond the {K} inputs, expected zeros" if bool(last[:, -over:].any()) else None

    def forward(self, input: Tensor) -> Tensor:
        x, values = self._operands(input)
        metadata, scale = (self._buffers[name] for name in ("metadata", "scale"))
        return sparse24_linear(x, values, metadata, scale, self._parameters["bias"])  # type: ignore[arg-type]
