"""What the sparse formats share: which weights are kept, the moves between a dense weight and its stored
values, and the dense layer's own gradients.

A format is an index: for each element of the dense weight its place in the values, or, for one that is not stored, the
place one beyond their end, where :func:`spread` finds a zero. Moves copy bits, so a negative zero or a NaN at a kept
place survives, and they can be differentiated.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from burnish.registry import dtype_name


def kept_weights(op: str, weight: Tensor, mask: Tensor | None) -> Tensor:
    """Which elements of a dense weight ``[N, K]`` are stored: ``mask``, or what is not zero (a NaN is not).

    Raises:
        ValueError: the weight is no matrix, or the mask is not a bool tensor of its shape.
    """
    if weight.dim() != 2 or weight.shape[0] == 0:
        raise ValueError(f"{op}: weight has shape {tuple(weight.shape)}, expected [N, K] with N >= 1")
    if mask is None:
        return weight != 0
    if mask.dtype != torch.bool or mask.shape != weight.shape:
        raise ValueError(
            f"{op}: mask is {dtype_name(mask.dtype)} of shape {tuple(mask.shape)}, "
            f"expected bool of shape {tuple(weight.shape)}"
        )
    return mask


def spread(values: Tensor, index: Tensor) -> Tensor:
    """Dense elements in the shape of ``index``: element ``index[...]`` of the values, or zero beyond their end."""
    extended = torch.cat((values.reshape(-1), values.new_zeros(1)))
    return extended.index_select(0, index.reshape(-1)).view(index.shape)


def pick(dense: Tensor, columns: Tensor) -> Tensor:
    """Elements ``columns[n, j]`` of row n of a dense matrix, in the shape of ``columns``; zeros beyond its width."""
    width = dense.shape[1]
    rows = torch.arange(dense.shape[0], device=dense.device).unsqueeze(-1) * width
    places = rows + columns.clamp_max(width - 1)
    picked = dense.reshape(-1).index_select(0, places.reshape(-1)).view(columns.shape)
    return torch.where(columns < width, picked, 0)


def dense_gradients(
    dy: Tensor, x: Tensor, dense: Tensor, x_grad: bool, weight_grad: bool, bias_grad: bool
) -> Callable[[], tuple[Tensor | None, ...]]:
    """The products that torch's autograd makes for a dense layer: what gradients of sparse ones are timed beside."""
    return lambda: (
        dy @ dense if x_grad else None,
        dy.T @ x if weight_grad else None,
        dy.sum(0) if bias_grad else None,
    )
