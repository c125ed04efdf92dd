"""The products of the low-rank layers that a thin matrix comes out of.

Two kernels, each of which reads its large operand once:

- *down*: the sums of ``x F``, F [K, R] thin. K is cut into splits where M is too small to fill the GPU. From the same
  read of x, where asked for, ``x^T s`` of other sums s, and the column sums of x.
- *dw*: ``x^T s``, and the column sums of x, in parts of the rows.

Dropout of x masks x's tile on its way into the product (:mod:`common.philox`). Ranks beyond a program's are blocks of
their own, which read x again.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from burnish.kernels.common import target
from burnish.kernels.common.operands import MAX_WIDTH, UNITS, parts_like, parts_of, pointer_of
from burnish.kernels.common.philox import kept
from burnish.kernels.common.products import float_dot
from burnish.kernels.common.tiles import Tile
from burnish.kernels.common.variants import Variant
from burnish.kernels.lowrank.lowrank_linear_sums import (
    MAX_RANK_BLOCK,
    Dropout,
    Sums,
    add_parts,
    drop_arguments,
    rank_block,
    stored,
)

#: ranks that a program of *down* holds where it holds nothing else, by the operands' bytes
MAX_DOWN_RANK = {2: 256, 4: 64}
#: bytes of a pipeline stage, and stages: about 64 KiB in flight a multiprocessor, within its shared memory
STAGE_BYTES = {"sm_80": 24 << 10, "sm_90": 32 << 10, "sm_100": 32 << 10, "gfx942": 24 << 10}
STAGES = {"sm_80": 3, "sm_90": 4, "sm_100": 4, "gfx942": 2}


@triton.jit
def lowrank_linear_fwd_kernel_down(
    x_ptr,  # [M, K]
    factor_ptr,  # [K, R] by its strides
    seed_ptr,  # [1]; not read unless DROP
    other_ptr,  # sums [other_splits, M, width]; not read unless OUTER
    sums_ptr,  # fp32 [K / depth, M, width]
    outer_ptr,  # [M / BLOCK_M, K, R]: x^T s of a block's rows; not written unless OUTER
    totals_ptr,  # fp32 [M / BLOCK_M, K]; not written unless TOTALS
    M,
    K,
    R,
    width,
    depth,  # columns of x in a split, a multiple of BLOCK_K
    threshold,
    other_splits,
    other_factor,
    stride_xm,
    stride_fk,
    stride_fr,
    DROP: tl.constexpr,
    OUTER: tl.constexpr,
    TOTALS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    block, split = tl.program_id(0).to(tl.int64), tl.program_id(2)
    first_m, first_r = block * BLOCK_M, tl.program_id(1) * BLOCK_R
    m, r, k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_K)
    in_rows, in_rank = (m < M - first_m)[:, None], (r < R - first_r)[None, :]
    first = split * depth
    last = tl.minimum(first + depth, K)
    x_ptr += first_m * stride_xm
    x_offsets = m[:, None] * stride_xm + k[None, :]
    factor_ptr += first.to(tl.int64) * stride_fk + first_r.to(tl.int64) * stride_fr
    factor_offsets = k[:, None] * stride_fk + r[None, :] * stride_fr
    factor_step = stride_fk * tl.full([], BLOCK_K, tl.int64)
    sums_ptr += (split.to(tl.int64) * M + first_m) * width + first_r
    if DROP:
        seed = tl.load(seed_ptr)
    if OUTER:
        s = stored(
            other_ptr + first_m * width + first_r, M - first_m, R - first_r, M, width, other_splits, other_factor,
            x_ptr.dtype.element_ty, BLOCK_M, BLOCK_R,
        )  # fmt: skip
        outer_ptr += (block * K + first) * R + first_r
        outer_offsets = k[:, None] * R + r[None, :]
    totals_ptr += block * K
    sums = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    for start in range(first, last, BLOCK_K):
        in_depth = k < K - start
        x = tl.load(x_ptr + start + x_offsets, mask=in_rows & in_depth[None, :], other=0.0)
        thin = tl.load(factor_ptr + factor_offsets, mask=in_depth[:, None] & in_rank, other=0.0)
        factor_ptr += factor_step
        if DROP:
            x = kept(x, seed, first_m + m, start, threshold)
        sums = float_dot(x, thin, sums)
        if OUTER:
            outer = float_dot(tl.trans(x), s, tl.zeros([BLOCK_K, BLOCK_R], tl.float32))
            inside = in_depth[:, None] & in_rank
            tl.store(outer_ptr + outer_offsets, outer.to(outer_ptr.dtype.element_ty), mask=inside)
            outer_ptr += R * tl.full([], BLOCK_K, tl.int64)
        if TOTALS:
            tl.store(totals_ptr + start + k, tl.sum(x.to(tl.float32), axis=0), mask=in_depth)
    tl.store(sums_ptr + m[:, None] * width + r[None, :], sums, mask=in_rows & in_rank)


@triton.jit
def lowrank_linear_bwd_dw_kernel(
    x_ptr,  # [M, K]
    sums_ptr,  # [splits, M, width]; not read unless FACTOR
    seed_ptr,  # [1]; not read unless DROP
    dw_ptr,  # [M / rows, K, R] by its strides; not written unless FACTOR
    totals_ptr,  # fp32 [M / rows, K]; not written unless TOTALS
    M,
    K,
    R,
    width,
    rows,  # of a part, a multiple of BLOCK_K
    threshold,
    splits,
    factor,
    stride_xm,
    stride_dk,
    stride_dr,
    DROP: tl.constexpr,
    FACTOR: tl.constexpr,
    TOTALS: tl.constexpr,
    BLOCK_M: tl.constexpr,  # of K, the output's rows
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,  # of M, which is summed
):
    part = tl.program_id(2).to(tl.int64)
    first_k, first_r, first_m = tl.program_id(0) * BLOCK_M, tl.program_id(1) * BLOCK_R, part * rows
    k, r, m = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_K)
    in_width = k < K - first_k
    if DROP:
        seed = tl.load(seed_ptr)
    x_ptr += first_m * stride_xm + first_k
    x_offsets = m[:, None] * stride_xm + k[None, :]
    sums_ptr += first_m * width + first_r
    dw = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    totals = tl.zeros([BLOCK_M], tl.float32)
    for start in range(0, rows, BLOCK_K):
        left = M - first_m - start
        x = tl.load(x_ptr + x_offsets, mask=(m < left)[:, None] & in_width[None, :], other=0.0)
        x_ptr += stride_xm * tl.full([], BLOCK_K, tl.int64)
        if TOTALS:
            totals += tl.sum(x.to(tl.float32), axis=0)
        if FACTOR:
            if DROP:
                x = kept(x, seed, first_m + start + m, first_k, threshold)
            s = stored(sums_ptr, left, R - first_r, M, width, splits, factor, x_ptr.dtype.element_ty, BLOCK_K, BLOCK_R)
            sums_ptr += width * tl.full([], BLOCK_K, tl.int64)
            dw = float_dot(tl.trans(x), s, dw)
    if FACTOR:
        dw_ptr += part * K * R + first_k.to(tl.int64) * stride_dk + first_r.to(tl.int64) * stride_dr
        offsets = k[:, None] * stride_dk + r[None, :] * stride_dr
        inside = in_width[:, None] & (r < R - first_r)[None, :]
        tl.store(dw_ptr + offsets, dw.to(dw_ptr.dtype.element_ty), mask=inside)
    if TOTALS:
        tl.store(totals_ptr + part * K + first_k + k, totals, mask=in_width)


def down_tile(arch: str, m: int, rank: int, itemsize: int, outer: bool) -> Tile:
    """``block_n`` is of the rank. Few rows take little of a stage, which is then deeper; parts of fp32 operands take
    registers, so theirs is not."""
    block_r = rank_block(rank, MAX_RANK_BLOCK[itemsize] if outer else MAX_DOWN_RANK[itemsize])
    block_m = 16 if m <= 16 else 128 if outer and m > 64 else 64 if block_r * itemsize < 512 else 32
    depth = STAGE_BYTES[arch] // itemsize // (block_m + block_r)
    deepest = (16 if arch == "sm_80" else 32) if itemsize == 4 else 64 if outer else 128
    block_k = max(16, min(1 << depth.bit_length() - 1, deepest))
    warps = 8 if arch != "gfx942" and (block_m * block_r * itemsize > 8192 or block_m == 128) else 4
    return Tile(block_m, block_r, block_k, warps, STAGES[arch])


def dw_tile(arch: str, rank: int, itemsize: int) -> Tile:
    """``block_n`` is of the rank, ``block_m`` of x's columns, ``block_k`` of its rows. Warps and depth are those that
    leave nothing on the stack."""
    block_r = rank_block(rank, MAX_RANK_BLOCK[itemsize])
    if arch == "sm_80":
        return Tile(64, block_r, (64 if block_r == 16 else 128) // itemsize, 4 if block_r == 16 else 8, 3)
    many = arch != "gfx942" and (itemsize == 4 or (arch == "sm_100" and block_r == 64))
    return Tile(64, block_r, 128 // itemsize, 8 if many else 4, min(STAGES[arch], 3))


def down(
    x: torch.Tensor,
    thin: torch.Tensor,
    factor: float = 1.0,
    dropout: Dropout | None = None,
    other: Sums | None = None,
    outer: torch.Tensor | None = None,
    totals: torch.Tensor | None = None,
) -> Sums:
    """The sums of x [M, K] @ thin [K, R], M > 0; on the way ``x^T other`` into outer [K, R], a contiguous tensor, and
    the column sums of x into totals, fp32 [K]."""
    (m, k), rank = x.shape, thin.shape[1]
    arch, sm_count = target.arch(x.device), target.sm_count(x.device)
    tile = down_tile(arch, m, rank, x.element_size(), outer is not None)
    blocks, steps = triton.cdiv(m, tile.block_m), triton.cdiv(k, tile.block_k)
    programs = blocks * triton.cdiv(rank, tile.block_n)
    depth = max(triton.cdiv(steps, parts_of(steps, programs, sm_count)), 1) * tile.block_k
    splits, width = max(triton.cdiv(k, depth), 1), triton.cdiv(rank, 16) * 16
    sums = torch.empty((splits, m, width), dtype=torch.float32, device=x.device)
    outer_parts, totals_parts = parts_like(outer, blocks), parts_like(totals, blocks)
    other_arguments = (sums, width, 1, 1.0) if other is None else other.arguments
    seed, threshold = drop_arguments(dropout, x)
    lowrank_linear_fwd_kernel_down[(blocks, triton.cdiv(rank, tile.block_n), splits)](
        *(x, thin, seed, other_arguments[0], sums),
        *(sums if outer_parts is None else outer_parts, sums if totals_parts is None else totals_parts),
        *(m, k, rank, width, depth, threshold, *other_arguments[2:]),
        *(x.stride(0), *thin.stride()),
        DROP=dropout is not None,
        OUTER=outer is not None,
        TOTALS=totals is not None,
        BLOCK_M=tile.block_m,
        BLOCK_R=tile.block_n,
        BLOCK_K=tile.block_k,
        **tile.options,
    )
    for parts, whole in ((outer_parts, outer), (totals_parts, totals)):
        if parts is not None and whole is not None and blocks > 1:
            add_parts(parts, whole)
    return Sums(sums, rank, factor)


def dw(
    x: torch.Tensor,
    sums: Sums | None,
    out: torch.Tensor | None,
    dropout: Dropout | None = None,
    totals: torch.Tensor | None = None,
    transposed: bool = False,
) -> None:
    """Write out [K, R] (transposed: [R, K]) = x^T s for x [M, K], M and K > 0, and the column sums of x into totals,
    fp32 [K]; either may be None, with its operand."""
    m, k = x.shape
    rank = 1 if sums is None else sums.rank
    tile = dw_tile(target.arch(x.device), rank, x.element_size())
    sums = sums and sums.read_by(MAX_WIDTH)  # the loop over rows is pipelined only without another in it
    columns, ranks = triton.cdiv(k, tile.block_m), triton.cdiv(rank, tile.block_n)
    steps = triton.cdiv(m, tile.block_k)
    rows = triton.cdiv(steps, parts_of(steps, columns * ranks, target.sm_count(x.device))) * tile.block_k
    parts = triton.cdiv(m, rows)
    out_parts, totals_parts = parts_like(out, parts), parts_like(totals, parts)
    data, width, splits, factor = (x, 16, 1, 1.0) if sums is None else sums.arguments
    seed, threshold = drop_arguments(dropout, x)
    lowrank_linear_bwd_dw_kernel[(columns, ranks, parts)](
        *(x, data, seed),
        *(x if out_parts is None else out_parts, x if totals_parts is None else totals_parts),
        *(m, k, rank, width, rows, threshold, splits, factor),
        *(x.stride(0), *((1, k) if transposed else (rank, 1))),
        DROP=dropout is not None,
        FACTOR=out is not None,
        TOTALS=totals is not None,
        BLOCK_M=tile.block_m,
        BLOCK_R=tile.block_n,
        BLOCK_K=tile.block_k,
        **tile.options,
    )
    for partial, whole in ((out_parts, out), (totals_parts, totals)):
        if partial is not None and whole is not None and parts > 1:
            add_parts(partial, whole)


def variants(arch: str) -> Iterator[Variant]:
    """Every rank block in fp32 and one 16-bit type, with few rows and many for *down*; the 16-bit types and each
    kernel's options are spread over them."""
    index = 0
    for itemsize, m in ((2, 128), (2, 16), (4, 128), (4, 16)):
        for rank in (16, 32, 64, 128, 256):
            if rank <= MAX_DOWN_RANK[itemsize]:
                yield down_variant(arch, m, rank, itemsize, index, ({"DROP"}, set(), {"TOTALS"})[index % 3])
                index += 1
            if itemsize == 2 and rank <= MAX_RANK_BLOCK[itemsize]:
                on = {"OUTER"} if rank == 32 else {"OUTER", "TOTALS"}
                yield down_variant(arch, m, rank, itemsize, index, on)
    options = ({"FACTOR"}, {"FACTOR", "DROP"}, {"FACTOR", "TOTALS"})
    for index, (rank, itemsize) in enumerate(((16, 2), (16, 4), (32, 2), (32, 4), (64, 2))):
        for on in (options[index % 3], options[(index + 1) % 3]):
            yield dw_variant(arch, rank, itemsize, index // 2, on)
    yield dw_variant(arch, 1, 2, 0, {"TOTALS"})


def down_variant(arch: str, m: int, rank: int, itemsize: int, index: int, on: set[str]) -> Variant:
    """The factor is A^T, whose columns are contiguous, in odd variants, as in the forward; else B."""
    tile, pointer = down_tile(arch, m, rank, itemsize, "OUTER" in on), pointer_of(itemsize, index)
    types = {"x_ptr": pointer, "factor_ptr": pointer, "seed_ptr": "*i64", "outer_ptr": "*fp32"}
    types |= dict.fromkeys(("other_ptr", "sums_ptr", "totals_ptr"), "*fp32")
    types |= dict.fromkeys(("M", "K", "R", "width", "depth", "threshold", "stride_xm"), "i32")
    one, other = ("stride_fk", "stride_fr") if index % 2 else ("stride_fr", "stride_fk")
    constants = {"other_splits": 1, one: 1, **{name: name in on for name in ("DROP", "OUTER", "TOTALS")}}
    constants |= {"BLOCK_M": tile.block_m, "BLOCK_R": tile.block_n, "BLOCK_K": tile.block_k}
    return Variant(
        "-".join((tile.name, pointer[1:], *sorted(on))).lower(), lowrank_linear_fwd_kernel_down,
        types | {other: "i32", "other_factor": "fp32"}, constants, tile.num_warps, tile.num_stages, UNITS[pointer],
    )  # fmt: skip


def dw_variant(arch: str, rank: int, itemsize: int, index: int, on: set[str]) -> Variant:
    tile, pointer = dw_tile(arch, rank, itemsize), pointer_of(itemsize, index)
    types = {"x_ptr": pointer, "sums_ptr": "*fp32", "seed_ptr": "*i64", "dw_ptr": pointer, "totals_ptr": "*fp32"}
    types |= dict.fromkeys(("M", "K", "R", "width", "rows", "threshold", "stride_xm", "stride_dk"), "i32")
    constants = {"splits": 1, "stride_dr": 1, **{name: name in on for name in ("DROP", "FACTOR", "TOTALS")}}
    constants |= {"BLOCK_M": tile.block_m, "BLOCK_R": tile.block_n, "BLOCK_K": tile.block_k}
    label = "-".join((tile.name, pointer[1:], *sorted(on))).lower()
    return Variant(
        label, lowrank_linear_bwd_dw_kernel, types | {"factor": "fp32"}, constants, tile.num_warps, tile.num_stages,
        UNITS[pointer] if "FACTOR" in on else None,
    )  # fmt: skip
