"""What the low-rank layers have in common: intermediates of the rank's width, and sums in parts.

A rank-sized intermediate is a :class:`Sums`: fp32, with one split for each part of the depth it was summed over.
Whoever reads it adds the splits in order, multiplies by its factor and rounds to x's dtype (:func:`stored`), so no
launch is spent on that. Gradients summed in parts are added by *sum*, likewise in order. Nothing is added atomically:
the bits depend on the shapes and the device alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from burnish import dropout as mask
from burnish.kernels.common.philox import kept
from burnish.kernels.common.products import float_dot
from burnish.kernels.common.tiles import LAUNCH_BYTES
from burnish.kernels.common.variants import Variant

#: ranks that a program holds beside a tile of something else, by the operands' bytes; beyond, it goes through blocks
MAX_RANK_BLOCK = {2: 64, 4: 32}
#: and that it adds to a tile at a time
TILE_RANK_BLOCK = {2: 64, 4: 16}
#: elements a program of *sum* adds
SUM_BLOCK = 512


@triton.jit
def stored(
    sums_ptr,  # [splits, M, width], from the first row and rank wanted on
    rows_left,
    ranks_left,
    M,
    width,
    splits,
    factor,
    dtype: tl.constexpr,
    ROWS: tl.constexpr,
    RANKS: tl.constexpr,
):
    """s [ROWS, RANKS] in ``dtype``: the splits of the sums added up, times the factor; zero where there is none."""
    m, r = tl.arange(0, ROWS), tl.arange(0, RANKS)
    inside = (m < rows_left)[:, None] & (r < ranks_left)[None, :]
    offsets = m[:, None] * width + r[None, :]
    total = tl.load(sums_ptr + offsets, mask=inside, other=0.0)
    for _ in tl.range(1, splits, num_stages=1):
        sums_ptr += tl.full([], 1, tl.int64) * M * width
        total += tl.load(sums_ptr + offsets, mask=inside, other=0.0)
    return (total * factor).to(dtype)


@triton.jit
def lowrank_operands(
    sums_ptr,  # [splits, M, width], from the first row and rank wanted on
    factor_ptr,  # [R, N] by its strides, from the first rank and column wanted on
    rows_left,
    columns_left,
    ranks_left,
    M,
    width,
    splits,
    factor,
    stride_fr,
    stride_fn,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RANKS: tl.constexpr,
):
    """s [ROWS, RANKS] and F [RANKS, COLUMNS], zero where there is none."""
    r, n = tl.arange(0, RANKS), tl.arange(0, COLUMNS)
    s = stored(sums_ptr, rows_left, ranks_left, M, width, splits, factor, factor_ptr.dtype.element_ty, ROWS, RANKS)
    inside = (r < ranks_left)[:, None] & (n < columns_left)[None, :]
    return s, tl.load(factor_ptr + r[:, None] * stride_fr + n[None, :] * stride_fn, mask=inside, other=0.0)


@triton.jit
def add_lowrank(
    product,  # fp32 [ROWS, COLUMNS]
    sums_ptr,  # [splits, M, width]
    factor_ptr,  # [R, N] by its strides
    first_m,  # int64, as first_n
    first_n,
    M,
    N,
    R,
    width,
    splits,
    factor,
    stride_fr,
    stride_fn,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RANKS: tl.constexpr,
):
    """product + s F of a tile, RANKS ranks at a time."""
    sums_ptr += first_m * width
    factor_ptr += first_n * stride_fn
    for start in tl.range(0, R, RANKS, num_stages=1):
        s, thin = lowrank_operands(
            sums_ptr, factor_ptr, M - first_m, N - first_n, R - start, M, width, splits, factor, stride_fr, stride_fn,
            ROWS, COLUMNS, RANKS,
        )  # fmt: skip
        product = float_dot(s, thin, product)
        sums_ptr += RANKS
        factor_ptr += stride_fr * tl.full([], RANKS, tl.int64)
    return product


@triton.jit
def lowrank_tile(
    sums_ptr,
    factor_ptr,
    seed_ptr,  # [1]; not read unless DROP
    first_m,
    first_n,
    M,
    N,
    R,
    width,
    splits,
    threshold,
    factor,
    stride_fr,
    stride_fn,
    DROP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RANKS: tl.constexpr,
):
    """s F of a tile, fp32 [ROWS, COLUMNS], as :func:`add_lowrank` has it; DROP: zero where an element of it drops."""
    product = add_lowrank(
        tl.zeros([ROWS, COLUMNS], tl.float32), sums_ptr, factor_ptr, first_m, first_n, M, N, R, width, splits, factor,
        stride_fr, stride_fn, ROWS, COLUMNS, RANKS,
    )  # fmt: skip
    if DROP:
        product = kept(product, tl.load(seed_ptr), first_m + tl.arange(0, ROWS), first_n, threshold)
    return product


@triton.jit
def lowrank_linear_bwd_dw_kernel_sum(
    parts_ptr,  # fp32 [parts, size]
    out_ptr,  # [size]
    size,
    parts,
    BLOCK: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for _ in range(0, parts):
        total += tl.load(parts_ptr + index, mask=index < size, other=0.0)
        parts_ptr += size
    tl.store(out_ptr + index, total.to(out_ptr.dtype.element_ty), mask=index < size)


@dataclass(frozen=True)
class Dropout:
    """A mask: the seed, int64 [1], and how many of 65536 words drop an element."""

    seed: torch.Tensor
    threshold: int

    @classmethod
    def of(cls, seed: torch.Tensor | None, p: float) -> Dropout | None:
        """The mask of a probability; None where nothing is dropped."""
        dropped = mask.threshold(p)
        return cls(seed, dropped) if seed is not None and dropped else None


@dataclass(frozen=True)
class Sums:
    """A rank-sized intermediate: ``factor`` times the sum of fp32 ``data`` [splits, M, width], of which R <= width
    columns count; rows lie ``width`` apart."""

    data: torch.Tensor
    rank: int
    factor: float

    @property
    def arguments(self) -> tuple[torch.Tensor, int, int, float]:
        """What kernels take: (sums, width, splits, factor)."""
        return self.data, self.data.stride(1), self.data.shape[0], self.factor

    def read_by(self, programs: int) -> Sums:
        """The same in one split, where that many programs a row would read more than a launch is worth."""
        splits = self.data.shape[0]
        if splits == 1 or self.data.nbytes * programs <= LAUNCH_BYTES:
            return self
        whole = torch.empty((1, *self.data.shape[1:]), dtype=torch.float32, device=self.data.device)
        add_parts(self.data, whole)
        return Sums(whole, self.rank, self.factor)


def drop_arguments(dropout: Dropout | None, like: torch.Tensor) -> tuple[torch.Tensor, int]:
    """What kernels take: (seed, threshold); without dropout, any pointer and a number."""
    return (like, 0) if dropout is None else (dropout.seed, dropout.threshold)


def rank_block(rank: int, most: int) -> int:
    """The ranks a program holds, of at most ``most``: a power of two, 16 at least."""
    return min(max(triton.next_power_of_2(rank), 16), most)


def add_parts(parts: torch.Tensor, whole: torch.Tensor) -> None:
    """Write whole, contiguous, = the sum of parts [parts, *], in order."""
    size = whole.numel()
    lowrank_linear_bwd_dw_kernel_sum[(triton.cdiv(size, SUM_BLOCK),)](
        *(parts, whole, size, parts.shape[0]), BLOCK=SUM_BLOCK, num_warps=4, enable_fp_fusion=False
    )


def variants(arch: str) -> Iterator[Variant]:
    for parts, out in (("*fp32", "*fp32"), ("*fp32", "*bf16")):
        types = {"parts_ptr": parts, "out_ptr": out, "size": "i32", "parts": "i32"}
        yield Variant(out[1:], lowrank_linear_bwd_dw_kernel_sum, types, {"BLOCK": SUM_BLOCK}, num_warps=4)
