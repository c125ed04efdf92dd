"""Block-sparse weights in torch's BSR form: a dense ``[N, K]`` matrix to its kept blocks, and back; products of them.

==============  ==================  =====================================================================
values          [nnzb, bn, bk]      the kept blocks, by rows of blocks, ascending in each
crow_indices    int32 [Nb + 1]      where each row of blocks begins in values; Nb = ceil(N / bn)
col_indices     int32 [nnzb]        the column of blocks of each; there are Kb = ceil(K / bk)
transposed      int32 [Kb + 1 +     the same blocks by columns: where each column of blocks begins, then of each
                2 nnzb]             block its row of blocks and its place in values, rows ascending
==============  ==================  =====================================================================

A size that the block does not divide is padded with zeros: elements of values beyond N or K. :func:`compress` and
:func:`expand` are exact inverses, bit for bit.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from burnish.checks import check_devices, check_floating
from burnish.registry import dtype_name

#: the shapes of a block that kernels know: rows of N by columns of K
BLOCKS = ((16, 16), (32, 32), (64, 64), (128, 128), (1, 16), (4, 16))


def blocks_along(size: int, block: int) -> int:
    """How many blocks cover ``size`` elements."""
    return (size + block - 1) // block


def _padded(matrix: Tensor, block: tuple[int, int]) -> Tensor:
    """``[N, K]`` as ``[Nb, bn, Kb, bk]``, zeros beyond its edges."""
    (rows, columns), (bn, bk) = matrix.shape, block
    down, across = blocks_along(rows, bn), blocks_along(columns, bk)
    return F.pad(matrix, (0, across * bk - columns, 0, down * bn - rows)).reshape(down, bn, across, bk)


def block_mask(keep: Tensor, block: tuple[int, int]) -> Tensor:
    """bool ``[Nb, Kb]``: the blocks with a kept element, of a bool ``[N, K]``."""
    return _padded(keep, block).any(3).any(1)


def compress(weight: Tensor, block: tuple[int, int], keep: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The blocks of ``weight`` in which anything is kept: values, crow_indices, col_indices.

    Args:
        weight: ``[N, K]``, any dtype.
        block: one of :data:`BLOCKS`.
        keep: bool ``[N, K]``, or None for what is not zero. A block is kept whole.

    Raises:
        ValueError: a block shape that no kernel knows, a weight that is no matrix, a mask of another shape or dtype,
            or a weight that is not zero outside the blocks that ``keep`` names.
    """
    if tuple(block) not in BLOCKS:
        raise ValueError(f"compress: block is {tuple(block)}, expected one of {', '.join(map(str, BLOCKS))}")
    if weight.dim() != 2:
        raise ValueError(f"compress: weight has shape {tuple(weight.shape)}, expected [N, K]")
    if keep is None:
        kept = block_mask(weight != 0, block)  # NaN != 0
    else:
        if keep.dtype != torch.bool or keep.shape != weight.shape:
            raise ValueError(
                f"compress: keep is {keep.dtype} {tuple(keep.shape)}, expected bool {tuple(weight.shape)} as weight is"
            )
        kept = block_mask(keep, block)
        lost = block_mask(weight != 0, block) & ~kept
        if lost.any():
            row, column = (int(i) for i in lost.nonzero()[0])
            raise ValueError(
                f"compress: weight is not zero in block ({row}, {column}), of which keep names nothing; "
                f"{int(lost.sum())} of {lost.numel()} blocks are so"
            )
    values = _padded(weight, block).permute(0, 2, 1, 3)[kept].contiguous()
    crow = F.pad(kept.sum(1).cumsum(0), (1, 0)).to(torch.int32)
    return values, crow, kept.nonzero()[:, 1].to(torch.int32).contiguous()


def expand(values: Tensor, crow_indices: Tensor, col_indices: Tensor, N: int, K: int) -> Tensor:
    """The dense ``[N, K]`` in values' dtype."""
    _, bn, bk = values.shape
    down, across = blocks_along(N, bn), blocks_along(K, bk)
    dense = values.new_zeros(down, across, bn, bk)
    dense[rows_of(crow_indices), col_indices.long()] = values
    return dense.permute(0, 2, 1, 3).reshape(down * bn, across * bk)[:N, :K].contiguous()


def rows_of(crow_indices: Tensor) -> Tensor:
    """int64 ``[nnzb]``: the row of blocks of each block."""
    counts = crow_indices.long().diff()
    return torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)


def transpose_index(crow_indices: Tensor, col_indices: Tensor, Kb: int) -> Tensor:
    """The blocks by columns, as backward walks them: int32 ``[Kb + 1 + 2 nnzb]``."""
    columns = col_indices.long()
    order = columns.argsort(stable=True)
    starts = F.pad(torch.bincount(columns, minlength=Kb).cumsum(0), (1, 0))
    return torch.cat((starts, rows_of(crow_indices)[order], order)).to(torch.int32)


def check_index(what: str, crow_indices: Tensor, col_indices: Tensor, Kb: int) -> None:
    """Raise unless the two describe blocks in ``Kb`` columns: what a kernel cannot ask at each call.

    Raises:
        ValueError: rows of blocks that do not begin at 0, run backwards or do not end at the last block; a column out
            of range; columns of a row that do not ascend. ``what`` names the layer.
    """
    crow, col = crow_indices.long().cpu(), col_indices.long().cpu()
    if int(crow[0]) != 0 or int(crow[-1]) != len(col) or bool((crow.diff() < 0).any()):
        raise ValueError(
            f"{what}: crow_indices must run from 0 to {len(col)}, the number of blocks, and never backwards"
        )
    if len(col) and not 0 <= int(col.min()) <= int(col.max()) < Kb:
        raise ValueError(f"{what}: col_indices are {int(col.min())} to {int(col.max())}, expected 0 to {Kb - 1}")
    row = rows_of(crow)
    falls = (col.diff() <= 0) & (row.diff() == 0)
    if falls.any():
        at = int(falls.nonzero()[0])
        raise ValueError(
            f"{what}: col_indices of row of blocks {int(row[at])} must ascend, got {col[at]}, {col[at + 1]}"
        )


def check_weight(
    op: str, x: Tensor, values: Tensor, crow_indices: Tensor, col_indices: Tensor, transposed: Tensor,
    scale: Tensor | None, N: int,
) -> None:  # fmt: skip
    """What forward and backward ask alike: that x and the tensors of a weight of N outputs fit together."""
    check_floating(op, x=x)
    torch._check(x.dim() >= 1, lambda: f"{op}: x is a scalar, expected at least one dimension")
    index = {"crow_indices": crow_indices, "col_indices": col_indices, "transposed": transposed}
    check_devices(op, x, values=values, scale=scale, **index)
    expected = x.dtype if scale is None else torch.int8
    torch._check(
        values.dtype == expected,
        lambda: (
            f"{op}: values is {dtype_name(values.dtype)}, expected {dtype_name(expected)} "
            + ("as x is, or int8 with a scale" if scale is None else "as there is a scale")
        ),
    )
    torch._check(
        values.dim() == 3 and tuple(values.shape[1:]) in BLOCKS,
        lambda: (
            f"{op}: values has shape {tuple(values.shape)}, expected [nnzb, bn, bk] with blocks of "
            + ", ".join(f"{bn}x{bk}" for bn, bk in BLOCKS)
        ),
    )
    K = x.shape[-1]
    torch._check(N >= 1, lambda: f"{op}: N is {N}, expected at least 1")
    nnzb, bn, bk = values.shape
    down, across = blocks_along(N, bn), blocks_along(K, bk)
    lengths = {"crow_indices": down + 1, "col_indices": nnzb, "transposed": across + 1 + 2 * nnzb}
    for name, tensor in index.items():
        torch._check(
            tensor.dtype == torch.int32,
            lambda name=name, tensor=tensor: f"{op}: {name} is {dtype_name(tensor.dtype)}, expected int32",
        )
        torch._check(
            tensor.dim() == 1 and tensor.shape[0] == lengths[name],
            lambda name=name, tensor=tensor: (
                f"{op}: {name} has shape {tuple(tensor.shape)}, expected "
                f"[{lengths[name]}] for N={N}, K={K}, {nnzb} blocks of {bn}x{bk}"
            ),
        )
    for name, tensor in {"values": values, **index}.items():
        torch._check(tensor.is_contiguous(), lambda name=name: f"{op}: {name} is not contiguous")
    if scale is not None:
        torch._check(scale.dtype == torch.float32, lambda: f"{op}: scale is {dtype_name(scale.dtype)}, expected fp32")
        torch._check(
            scale.dim() == 1 and scale.shape[0] == N,
            lambda: f"{op}: scale has shape {tuple(scale.shape)}, expected [{N}]",
        )


def draw(
    N: int, K: int, block: tuple[int, int], kept: int, what: str, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """A weight of ``kept`` blocks at random places: values, which are still to be converted, crow_indices and
    col_indices. ``what`` is ``normal``, ``integers``, ``int8`` or ``extreme``."""
    bn, bk = block
    down, across = blocks_along(N, bn), blocks_along(K, bk)
    places = torch.randperm(down * across, generator=generator)[:kept].sort().values
    row, column = places // max(across, 1), places % max(across, 1)
    shape = (len(places), bn, bk)
    if what == "normal":
        values = torch.randn(shape, generator=generator) / max(kept * bn * bk / N, 1.0) ** 0.5
    else:
        limit = 8 if what == "integers" else 127
        values = torch.randint(-limit, limit + 1, shape, generator=generator)
        values = values.sign() * 127 if what == "extreme" else values
    values[row[:, None] * bn + torch.arange(bn) >= N] = 0
    values.transpose(1, 2)[column[:, None] * bk + torch.arange(bk) >= K] = 0
    crow = F.pad(torch.bincount(row, minlength=down).cumsum(0), (1, 0))
    return values, crow.to(torch.int32), column.to(torch.int32)


def block_product(x: Tensor, values: Tensor, starts: Tensor, columns: Tensor, N: int) -> Tensor:
    """x times the kept blocks, transposed: every row of blocks filled up to the longest by a block of zeros that meets
    zeros of x."""
    _, bn, bk = values.shape
    M, K = x.shape
    across, counts = blocks_along(K, bk), starts.long().diff()
    longest, down = int(counts.max()) if len(counts) else 0, len(counts)
    slots = torch.arange(longest, device=x.device).expand(down, longest)
    slots = torch.where(slots < counts[:, None], starts[:-1, None] + slots, len(columns)).reshape(-1)
    places = F.pad(columns.long(), (0, 1), value=across)[slots]
    left = F.pad(x, (0, (across + 1) * bk - K)).reshape(M, across + 1, bk).transpose(0, 1).index_select(0, places)
    right = F.pad(values, (0, 0, 0, 0, 0, 1)).index_select(0, slots)
    left = left.reshape(down, longest, M, bk).permute(0, 2, 1, 3).reshape(down, M, longest * bk)
    right = right.reshape(down, longest, bn, bk).permute(0, 1, 3, 2).reshape(down, longest * bk, bn)
    return torch.bmm(left, right).permute(1, 0, 2).reshape(M, down * bn)[:, :N]


def block_outer(dy: Tensor, x: Tensor, crow_indices: Tensor, col_indices: Tensor, block: tuple[int, int]) -> Tensor:
    """dy^T x of the kept blocks alone: ``[nnzb, bn, bk]``, zero beyond the edges whatever dy and x are."""
    operands, inside = [], []
    for of, width, places in ((dy, block[0], rows_of(crow_indices)), (x, block[1], col_indices.long())):
        M, size = of.shape
        count = blocks_along(size, width)
        padded = F.pad(of, (0, count * width - size)).reshape(M, count, width).transpose(0, 1)
        operands.append(padded.index_select(0, places))  # [nnzb, M, width]
        inside.append(places[:, None] * width + torch.arange(width, device=of.device) < size)
    product = torch.bmm(operands[0].transpose(1, 2), operands[1])
    return torch.where(inside[0][:, :, None] & inside[1][:, None], product, torch.zeros_like(product))
