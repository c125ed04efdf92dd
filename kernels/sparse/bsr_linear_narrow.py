"""Block-sparse products with blocks of fewer rows than a matrix unit takes, 1 or 4: on plain arithmetic.

Each element of x that such a block names is multiplied once or four times, so what bounds these kernels is how fast x
is gathered, not how fast it is multiplied. A program takes several rows of blocks, a block of each at a time, and goes
on to the end of the longest.
"""

from __future__ import annotations

from collections.abc import Iterator

import triton
import triton.language as tl
from burnish.kernels.common import target
from burnish.kernels.common.epilogues import store_linear
from burnish.kernels.common.operands import parts_like, pointer_of, row_parts
from burnish.kernels.common.tiles import Tile, pick
from burnish.kernels.common.variants import Variant
from burnish.kernels.lowrank.lowrank_linear_sums import add_parts

#: block shapes (rows, columns) of the format that run here
BLOCKS = ((4, 16), (1, 16))
#: forward: ``block_n`` is of N, ``block_k`` the columns of a block
TILES = (Tile(16, 16, 16, 4, 1), Tile(1, 64, 16, 4, 1))
#: gradient of the values: ``block_m`` is of N, ``block_k`` of M
DW_TILE = Tile(16, 16, 16, 4, 1)


@triton.jit
def lists(crow_ptr, n, N, OUT: tl.constexpr):
    """The first and last entry of the row of blocks of each output channel, padding included; none beyond the rows."""
    stripe = n // OUT
    first = tl.load(crow_ptr + stripe, mask=stripe * OUT < N, other=0)
    return first, tl.load(crow_ptr + stripe + 1, mask=stripe * OUT < N, other=0)


@triton.jit
def bsr_linear_fwd_kernel_narrow(
    x_ptr,  # [M, K]; int8, of at least K columns, for int8 values
    row_scale_ptr,  # [M]; not read unless int8, as scale_ptr
    values_ptr,  # [blocks, OUT, DEPTH]
    crow_ptr,  # [N / OUT + 1]
    col_ptr,  # [blocks]
    scale_ptr,  # [N]
    bias_ptr,  # [N]; not read unless HAS_BIAS
    y_ptr,  # [M, N]
    M,
    N,
    K,
    stride_xm,
    HAS_BIAS: tl.constexpr,
    OUT: tl.constexpr,
    DEPTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    first_n, first_m = tl.program_id(0) * BLOCK_N, tl.program_id(1).to(tl.int64) * BLOCK_M
    n, k = first_n + tl.arange(0, BLOCK_N), tl.arange(0, DEPTH)
    first, last = lists(crow_ptr, n, N, OUT)
    m = tl.minimum(tl.arange(0, BLOCK_M), (M - first_m - 1).to(tl.int32))
    x_rows = x_ptr + first_m * stride_xm + (m * stride_xm)[:, None, None]
    w_offsets = (n % OUT * DEPTH)[:, None] + k[None, :]
    kind: tl.constexpr = tl.int32 if x_ptr.dtype.element_ty == tl.int8 else tl.float32
    product = tl.zeros([BLOCK_M, BLOCK_N], kind)
    for step in range(0, tl.max(last - first, axis=0)):
        entry = first + step
        listed = entry < last
        columns = (tl.load(col_ptr + entry, mask=listed, other=0) * DEPTH)[:, None] + k[None, :]
        inside = listed[:, None] & (columns < K)
        w_block = values_ptr + entry.to(tl.int64)[:, None] * (OUT * DEPTH)
        w = tl.load(w_block + w_offsets, mask=listed[:, None], other=0).to(kind)
        x = tl.load(x_rows + columns[None, :, :], mask=inside[None, :, :], other=0).to(kind)
        product += tl.sum(x * w[None, :, :], axis=2)
    store_linear(
        product, row_scale_ptr + first_m, scale_ptr, bias_ptr, y_ptr + first_m * N, M - first_m, first_n, N, N,
        HAS_BIAS, BLOCK_M, BLOCK_N,
    )  # fmt: skip


@triton.jit
def bsr_linear_bwd_dw_kernel_narrow(
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
    BLOCK_M: tl.constexpr,  # of N
    BLOCK_K: tl.constexpr,  # of M, which is summed
):
    n, k, m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, DEPTH), tl.arange(0, BLOCK_K)
    first, last = lists(crow_ptr, n, N, OUT)
    entry = first + tl.program_id(1)
    listed = entry < last
    if tl.max(listed.to(tl.int32), axis=0) > 0:
        part = tl.program_id(2).to(tl.int64)
        first_m = part * rows
        columns = (tl.load(col_ptr + entry, mask=listed, other=0) * DEPTH)[:, None] + k[None, :]
        in_rows = listed & (n < N)
        inside = in_rows[:, None] & (columns < K)
        dy_ptr += first_m * stride_dym
        x_ptr += first_m * stride_xm
        dw = tl.zeros([BLOCK_M, DEPTH], tl.float32)
        for start in range(0, rows, BLOCK_K):
            left = m < M - first_m - start
            dy = tl.load(
                dy_ptr + m[:, None] * stride_dym + n[None, :], mask=left[:, None] & in_rows[None, :], other=0.0
            )
            x_rows = x_ptr + (m * stride_xm)[:, None, None]
            x = tl.load(x_rows + columns[None, :, :], mask=left[:, None, None] & inside[None, :, :], other=0.0)
            dw += tl.sum(dy.to(tl.float32)[:, :, None] * x.to(tl.float32), axis=0)
            dy_ptr += stride_dym * tl.full([], BLOCK_K, tl.int64)
            x_ptr += stride_xm * tl.full([], BLOCK_K, tl.int64)
        dw = tl.where(inside, dw, 0.0)  # in padding, of an infinity times none
        dw_blocks = dw_ptr + (part * blocks + entry)[:, None] * (OUT * DEPTH)
        offsets = (n % OUT * DEPTH)[:, None] + k[None, :]
        tl.store(dw_blocks + offsets, dw.to(dw_ptr.dtype.element_ty), mask=listed[:, None])


def forward(x, row_scales, values, crow_indices, col_indices, scale, bias, y):  # type: ignore[no-untyped-def]
    """Write y [..., N] from x [M, K], or from a quantised one and the scales; M and N > 0."""
    (m, k), n, (_, out, depth) = x.shape, y.shape[-1], values.shape
    tile = pick(TILES, m, n, target.sm_count(x.device))
    bsr_linear_fwd_kernel_narrow[(triton.cdiv(n, tile.block_n), triton.cdiv(m, tile.block_m))](
        *(x, row_scales, values, crow_indices, col_indices, scale),
        *(x if bias is None else bias.contiguous(), y, m, n, k, x.stride(0)),
        HAS_BIAS=bias is not None,
        OUT=out,
        DEPTH=depth,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        **tile.options,
    )


def values_gradient(dy, x, crow_indices, col_indices, dvalues):  # type: ignore[no-untyped-def]
    """Write dvalues [blocks, OUT, DEPTH], of one block or more, from dy [M, N] and x [M, K]."""
    (m, n), k, (blocks, out, depth) = dy.shape, x.shape[1], dvalues.shape
    tile = DW_TILE
    rows, parts = row_parts(m, tile.block_k, triton.cdiv(blocks * out, tile.block_m), target.sm_count(x.device))
    sums = parts_like(dvalues, parts)
    bsr_linear_bwd_dw_kernel_narrow[(triton.cdiv(n, tile.block_m), triton.cdiv(k, depth), parts)](
        *(dy, x, crow_indices, col_indices, sums, m, n, k, blocks, rows, dy.stride(0), x.stride(0)),
        OUT=out,
        DEPTH=depth,
        BLOCK_M=tile.block_m,
        BLOCK_K=tile.block_k,
        **tile.options,
    )
    if parts > 1:
        add_parts(sums, dvalues)


def variants(arch: str) -> Iterator[Variant]:
    """Every block shape, tile and type. Below 32 bits a tile of the weight or of y has fewer words than threads."""
    for index, (out, depth) in enumerate(BLOCKS):
        constants = {"OUT": out, "DEPTH": depth}
        for tile in TILES:
            for pointer in ("*i8", "*fp32", pointer_of(2, index)):
                result = pointer_of(2, index + 1) if pointer == "*i8" else pointer
                types = {"x_ptr": pointer, "values_ptr": pointer, "bias_ptr": result, "y_ptr": result}
                types |= dict.fromkeys(("row_scale_ptr", "scale_ptr"), "*fp32")
                types |= dict.fromkeys(("crow_ptr", "col_ptr"), "*i32")
                types |= dict.fromkeys(("M", "N", "K", "stride_xm"), "i32")
                sizes = {"HAS_BIAS": index == 0, "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n}
                yield Variant(
                    f"{out}x{depth}-{tile.name}-{pointer[1:]}", bsr_linear_fwd_kernel_narrow, types, constants | sizes,
                    tile.num_warps, narrow=pointer != "*fp32",
                )  # fmt: skip
        for itemsize in (2, 4):
            pointer = pointer_of(itemsize, index)
            types = {"dy_ptr": pointer, "x_ptr": pointer, "crow_ptr": "*i32", "col_ptr": "*i32"}
            types |= {"dw_ptr": "*fp32" if index else pointer}
            types |= dict.fromkeys(("M", "N", "K", "blocks", "rows", "stride_dym", "stride_xm"), "i32")
            yield Variant(
                f"{out}x{depth}-{pointer[1:]}", bsr_linear_bwd_dw_kernel_narrow, types,
                constants | {"BLOCK_M": DW_TILE.block_m, "BLOCK_K": DW_TILE.block_k}, DW_TILE.num_warps,
                narrow=itemsize == 2,
            )  # fmt: skip
