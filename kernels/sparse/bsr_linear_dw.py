"""The gradient of a block-sparse layer's kept blocks, dy^T x at their places.

A program makes several blocks of a row of blocks side by side, because they share dy's columns; the columns of x are
gathered. M is cut into parts where the blocks are too few for the GPU; parts are added in order. A grid has room for a
full row, since the host does not know the rows' lengths, and programs beyond a row's last block end at once.
"""

from __future__ import annotations

from collections.abc import Iterator

import triton
import triton.language as tl
from burnish.kernels.common import target
from burnish.kernels.common.operands import UNITS, parts_like, pointer_of, row_parts
from burnish.kernels.common.products import float_dot
from burnish.kernels.common.tiles import Tile
from burnish.kernels.common.variants import Variant
from burnish.kernels.lowrank.lowrank_linear_sums import add_parts

#: block shapes (rows, columns) whose rows a matrix unit takes
BLOCKS = ((128, 128), (64, 64), (32, 32), (16, 16))
#: architectures with more than 100 KiB of shared memory
SHARED = ("sm_90", "sm_100")


@triton.jit
def bsr_linear_bwd_dw_kernel(
    dy_ptr,  # [M, N]
    x_ptr,  # [M, K]
    crow_ptr,  # [N / OUT + 1]
    col_ptr,  # [blocks]
    dw_ptr,  # [M / rows, blocks, OUT, DEPTH]
    M,
    N,
    K,
    blocks,
    rows,  # of a part, a multiple of BLOCK_K
    stride_dym,
    stride_xm,
    OUT: tl.constexpr,
    DEPTH: tl.constexpr,
    BLOCK_M: tl.constexpr,  # of a block's rows
    BLOCK_N: tl.constexpr,  # of the columns of several blocks
    BLOCK_K: tl.constexpr,  # of M, which is summed
):
    TILES: tl.constexpr = OUT // BLOCK_M
    VECTOR: tl.constexpr = 16
    row, within, part = tl.program_id(0) // TILES, tl.program_id(0) % TILES * BLOCK_M, tl.program_id(2).to(tl.int64)
    first = tl.load(crow_ptr + row) + tl.program_id(1) * (BLOCK_N // DEPTH)
    last = tl.load(crow_ptr + row + 1)
    if first < last:
        m, n, k = tl.arange(0, BLOCK_K), within + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
        entry = first + k // DEPTH
        columns = tl.load(col_ptr + entry, mask=entry < last, other=0) * DEPTH + k % DEPTH
        columns = tl.max_contiguous(tl.multiple_of(columns, [VECTOR]), [VECTOR])
        in_rows = row * OUT + n < N
        in_columns = (entry < last) & (columns < K)
        first_m = part * rows
        dy_ptr += first_m * stride_dym + row * OUT
        x_ptr += first_m * stride_xm
        dw = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for start in range(0, rows, BLOCK_K):
            left = (m < M - first_m - start)[:, None]
            dy = tl.load(dy_ptr + m[:, None] * stride_dym + n[None, :], mask=left & in_rows[None, :], other=0.0)
            x = tl.load(x_ptr + m[:, None] * stride_xm + columns[None, :], mask=left & in_columns[None, :], other=0.0)
            dw = float_dot(tl.trans(dy), x, dw)
            dy_ptr += stride_dym * tl.full([], BLOCK_K, tl.int64)
            x_ptr += stride_xm * tl.full([], BLOCK_K, tl.int64)
        dw = tl.where(in_rows[:, None] & in_columns[None, :], dw, 0.0)  # in padding, of an infinity times none
        dw_ptr += (part * blocks + first) * (OUT * DEPTH)
        offsets = (k // DEPTH * (OUT * DEPTH) + k % DEPTH)[None, :] + n[:, None] * DEPTH
        tl.store(dw_ptr + offsets, dw.to(dw_ptr.dtype.element_ty), mask=(entry < last)[None, :])


def dw_tile(arch: str, out: int, depth: int, itemsize: int) -> Tile:
    """``block_k`` is of M. Parts of fp32 operands take registers, so there the tile is smaller."""
    block_m = min(out, 64 if itemsize == 4 else 128)
    block_n = max(depth, 64) if itemsize == 4 else 128
    block_k = (32 if arch in SHARED else 16) if itemsize == 4 else 64 if block_m < 128 or arch in SHARED else 32
    warps = 8 if block_m * block_n * itemsize > 16384 else 4
    return Tile(block_m, block_n, block_k, warps, 2 if arch == "gfx942" else 3)


def values_gradient(dy, x, crow_indices, col_indices, dvalues):  # type: ignore[no-untyped-def]
    """Write dvalues [blocks, OUT, DEPTH], of one block or more, from dy [M, N] and x [M, K]."""
    (m, n), k, (blocks, out, depth) = dy.shape, x.shape[1], dvalues.shape
    tile = dw_tile(target.arch(x.device), out, depth, x.element_size())
    tiles, abreast = out // tile.block_m, tile.block_n // depth
    rows, parts = row_parts(m, tile.block_k, triton.cdiv(blocks, abreast) * tiles, target.sm_count(x.device))
    sums = parts_like(dvalues, parts)
    grid = ((crow_indices.shape[0] - 1) * tiles, triton.cdiv(triton.cdiv(k, depth), abreast), parts)
    bsr_linear_bwd_dw_kernel[grid](
        *(dy, x, crow_indices, col_indices, sums, m, n, k, blocks, rows, dy.stride(0), x.stride(0)),
        OUT=out,
        DEPTH=depth,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        **tile.options,
    )
    if parts > 1:
        add_parts(sums, dvalues)


def variants(arch: str) -> Iterator[Variant]:
    """Every block shape in fp32 and one 16-bit type, to the result and to parts of it."""
    for index, (out, depth) in enumerate(BLOCKS):
        for itemsize in (2, 4):
            tile, pointer = dw_tile(arch, out, depth, itemsize), pointer_of(itemsize, index)
            types = {"dy_ptr": pointer, "x_ptr": pointer, "crow_ptr": "*i32", "col_ptr": "*i32"}
            types |= {"dw_ptr": pointer if index % 2 else "*fp32"}
            types |= dict.fromkeys(("M", "N", "K", "blocks", "rows", "stride_dym", "stride_xm"), "i32")
            constants = {"OUT": out, "DEPTH": depth}
            constants |= {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k}
            yield Variant(
                f"{out}x{depth}-{tile.name}-{pointer[1:]}", bsr_linear_bwd_dw_kernel, types, constants, tile.num_warps,
                tile.num_stages, UNITS[pointer],
            )  # fmt: skip
