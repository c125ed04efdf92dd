"""The dense layer behind a call of a sparse op: what peers make their own form of."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from burnish.ops.bsr_linear import expand as expand_bsr
from burnish.ops.sparse_linear import expand as expand_sparse
from burnish.registry import Case
from burnish.sparse24_format import expand as expand_sparse24

#: the forward ops that stand for one dense layer
SPARSE_OPS = ("bsr_linear", "sparse24_linear", "sparse_linear")


def dense_bytes(case: Case) -> int:
    """Bytes of the dense weight behind a case of a sparse op."""
    return case.dims["N"] * case.dims["K"] * case.dtype.itemsize


def dense_layer(op: str, args: tuple[Any, ...]) -> tuple[Tensor, Tensor, Tensor | None]:
    """x, the weight ``[N, K]`` in x's dtype and the bias of a call of one of :data:`SPARSE_OPS`."""
    x, scale, K = args[0], None, args[0].shape[-1]
    if op == "bsr_linear":
        _, values, crow_indices, col_indices, _, scale, bias, N = args
        weight = expand_bsr(values, crow_indices, col_indices, N, K)
    elif op == "sparse24_linear":
        _, values, metadata, scale, bias = args
        weight = expand_sparse24(values, metadata, metadata.shape[0], K)
    else:
        _, values, bitmap, _, bias = args
        weight = expand_sparse(values, bitmap, bitmap.shape[0], K)
    if scale is not None:
        weight = weight * scale.unsqueeze(-1)
    return x, weight.to(x.dtype), bias
