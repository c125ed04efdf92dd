"""bsr_linear and its backward in Triton; :mod:`bsr_linear_dw` has the gradient of the kept blocks.

Both directions are one product, :func:`blocks_product`. A stripe of the output, which is a row of blocks forward and a
column of them backward, has a list of blocks. A program makes a tile of a stripe and goes over the list, the depths of
its blocks one after the other as if they were one: a step is a part of a block where blocks are deep, and several
blocks where they are shallow, whose columns of x are then gathered. Only what the lists name is read. Stripes narrower
than a matrix unit go by :mod:`bsr_linear_narrow`.

The tiles are those of a dense product, made taller where a stripe is narrower than they are (:func:`tiles.narrowed`):
with blocks of 128 a tile of 256 x 128 reads as many bytes for a product as the dense 128 x 256. Each stripe reads its
columns of x for itself, so what L2 delivers bounds small blocks. For few rows tiles are narrower than the stripe, so
that a few large blocks fill the GPU.

int8 values: x is quantised by :mod:`int8_quantize_rows`, sums are int32, the epilogue is int8_linear's, and so are the
bits. Their dx takes dy * scale in bf16 parts, one for a bf16 dy, as int8_linear's does.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from burnish.kernels.common import target
from burnish.kernels.common.epilogues import store_linear
from burnish.kernels.common.operands import UNITS, matrix, objection
from burnish.kernels.common.products import weight_dot
from burnish.kernels.common.tiles import FULL_GEMM, HALF_GEMM, INT8_GEMM, Tile, narrowed, pick, split_tiles, swizzle
from burnish.kernels.common.variants import Variant
from burnish.kernels.quant.int8_linear import GRADIENTS, column_sums, gradient_parts
from burnish.kernels.quant.int8_quantize_rows import quantize
from burnish.kernels.sparse import bsr_linear_described, bsr_linear_narrow
from burnish.kernels.sparse.bsr_linear_dw import values_gradient

#: block shapes (rows, columns) whose rows a matrix unit takes
BLOCKS = ((128, 128), (64, 64), (32, 32), (16, 16))
#: depths of a step that leave parts of fp32 operands in registers
FP32_DEPTH = {"sm_80": 16, "sm_90": 32, "sm_100": 32, "gfx942": 32}
#: columns of the narrowest stripe that a matrix unit takes
NARROW_STRIPE = 16
#: columns of the narrowest tile, for few rows
NARROWEST = 32


@triton.jit
def listed(index_ptr, position_ptr, entry, last, TRANSPOSED: tl.constexpr):
    """Which columns of x, and which block of values, an entry of the lists names; any that exist beyond the last."""
    index = tl.load(index_ptr + entry, mask=entry < last, other=0)
    if TRANSPOSED:
        return index, tl.load(position_ptr + entry, mask=entry < last, other=0)
    else:
        return index, entry


@triton.jit
def blocks_product(
    x_ptr,  # [M, K], from the tile's first row on
    values_ptr,  # of each block [OUT, DEPTH], TRANSPOSED [DEPTH, OUT], from the tile's first column on
    scale_ptr,  # [K]; not read unless PARTS
    index_ptr,  # of the list's blocks: which columns of x
    position_ptr,  # likewise, which block of values; not read unless TRANSPOSED
    first,  # entry of the lists
    last,
    rows_left,
    K,
    stride_xm,
    TRANSPOSED: tl.constexpr,
    PARTS: tl.constexpr,
    EVEN_K: tl.constexpr,  # promises that x has every column of every block
    OUT: tl.constexpr,
    DEPTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The sum over a list's blocks of x's columns times the block, a tile [BLOCK_M, BLOCK_N] of the list's stripe."""
    k, n = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_N)
    size = tl.full([], OUT * DEPTH, tl.int64)
    STRIDE_N: tl.constexpr = 1 if TRANSPOSED else DEPTH
    STRIDE_K: tl.constexpr = OUT if TRANSPOSED else 1
    x_offsets = tl.minimum(tl.arange(0, BLOCK_M), (rows_left - 1).to(tl.int32))[:, None] * stride_xm
    product = tl.zeros([BLOCK_M, BLOCK_N], tl.int32 if x_ptr.dtype.element_ty == tl.int8 else tl.float32)
    # an entry is loaded a step ahead: loads that wait for another load are hardly pipelined
    if BLOCK_K <= DEPTH:
        STEPS: tl.constexpr = DEPTH // BLOCK_K
        w_offsets = k[:, None] * STRIDE_K + n[None, :] * STRIDE_N
        index, block = listed(index_ptr, position_ptr, first, last, TRANSPOSED)
        for step in range(first * STEPS, last * STEPS):
            within = step % STEPS * BLOCK_K
            column = index * DEPTH + within
            w = tl.load(values_ptr + block * size + within * STRIDE_K + w_offsets)
            inside = k < K - column
            if EVEN_K:
                x = tl.load(x_ptr + column + x_offsets + k[None, :])
            else:
                x = tl.load(x_ptr + column + x_offsets + k[None, :], mask=inside[None, :], other=0)
            index, block = listed(index_ptr, position_ptr, (step + 1) // STEPS, last, TRANSPOSED)
            product = weight_dot(x, w, product, scale_ptr, column + k, inside, PARTS)
    else:
        VECTOR: tl.constexpr = min(DEPTH, 16)
        w_offsets = (k % DEPTH)[:, None] * STRIDE_K + n[None, :] * STRIDE_N
        index, block = listed(index_ptr, position_ptr, first + k // DEPTH, last, TRANSPOSED)
        for start in range(first, last, BLOCK_K // DEPTH):
            entry = start + k // DEPTH
            inside = entry < last
            w_block = values_ptr + block[:, None] * size
            w = tl.load(w_block + w_offsets, mask=inside[:, None], other=0)
            columns = tl.max_contiguous(tl.multiple_of(index * DEPTH + k % DEPTH, [VECTOR]), [VECTOR])
            if not EVEN_K:
                inside &= columns < K
            x = tl.load(x_ptr + x_offsets + columns[None, :], mask=inside[None, :], other=0)
            index, block = listed(index_ptr, position_ptr, entry + BLOCK_K // DEPTH, last, TRANSPOSED)
            product = weight_dot(x, w, product, scale_ptr, columns, inside, PARTS)
    return product


@triton.jit
def bsr_linear_fwd_kernel(
    x_ptr,  # [M, K]; int8, of at least K columns, for int8 values
    row_scale_ptr,  # [M]; not read unless int8, as scale_ptr
    values_ptr,  # [blocks, OUT, DEPTH]
    crow_ptr,  # [stripes + 1]
    col_ptr,  # [blocks]
    scale_ptr,  # [N]
    bias_ptr,  # [N]; not read unless HAS_BIAS
    y_ptr,  # [M, N]
    M,
    N,
    K,
    stripes,
    stride_xm,
    HAS_BIAS: tl.constexpr,
    EVEN_K: tl.constexpr,
    OUT: tl.constexpr,
    DEPTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    TILES: tl.constexpr = OUT // BLOCK_N
    tile_m, tile_n = swizzle(tl.program_id(0), M, stripes * TILES, BLOCK_M, 1, GROUP)
    first_m, stripe, within = tile_m.to(tl.int64) * BLOCK_M, tile_n // TILES, tile_n % TILES * BLOCK_N
    first, last = tl.load(crow_ptr + stripe), tl.load(crow_ptr + stripe + 1)
    product = blocks_product(
        x_ptr + first_m * stride_xm, values_ptr + within * DEPTH, scale_ptr, col_ptr, col_ptr, first, last,
        M - first_m, K, stride_xm, False, 0, EVEN_K, OUT, DEPTH, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    store_linear(
        product, row_scale_ptr + first_m, scale_ptr, bias_ptr, y_ptr + first_m * N, M - first_m, stripe * OUT + within,
        tl.minimum(stripe * OUT + OUT, N), N, HAS_BIAS, BLOCK_M, BLOCK_N,
    )  # fmt: skip


@triton.jit
def bsr_linear_bwd_dx_kernel(
    dy_ptr,  # [M, N]
    values_ptr,  # [blocks, DEPTH, OUT]
    transposed_ptr,  # [stripes + 1 + 2 blocks]: where a stripe's list starts, the rows of blocks, the positions
    scale_ptr,  # [N]; not read unless PARTS
    dx_ptr,  # [M, K]
    M,
    N,
    K,
    stripes,
    blocks,
    stride_dym,
    PARTS: tl.constexpr,
    EVEN_K: tl.constexpr,
    OUT: tl.constexpr,
    DEPTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    TILES: tl.constexpr = OUT // BLOCK_N
    tile_m, tile_n = swizzle(tl.program_id(0), M, stripes * TILES, BLOCK_M, 1, GROUP)
    first_m, stripe, within = tile_m.to(tl.int64) * BLOCK_M, tile_n // TILES, tile_n % TILES * BLOCK_N
    first, last = tl.load(transposed_ptr + stripe), tl.load(transposed_ptr + stripe + 1)
    rows_ptr = transposed_ptr + stripes + 1
    product = blocks_product(
        dy_ptr + first_m * stride_dym, values_ptr + within, scale_ptr, rows_ptr, rows_ptr + blocks, first, last,
        M - first_m, N, stride_dym, True, PARTS, EVEN_K, OUT, DEPTH, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    store_linear(
        product, dx_ptr, dx_ptr, dx_ptr, dx_ptr + first_m * K, M - first_m, stripe * OUT + within,
        tl.minimum(stripe * OUT + OUT, K), K, False, BLOCK_M, BLOCK_N,
    )  # fmt: skip


def supports(
    x: torch.Tensor,
    values: torch.Tensor,
    crow_indices: torch.Tensor,
    col_indices: torch.Tensor,
    transposed: torch.Tensor,
    scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    N: int,
) -> str | None:
    return objection(x, N, x.shape[-1])


def supports_backward(dy: torch.Tensor, x: torch.Tensor, *rest: Any) -> str | None:
    return objection(dy, dy.shape[-1], x.shape[-1])


def bsr_linear(
    x: torch.Tensor,
    values: torch.Tensor,
    crow_indices: torch.Tensor,
    col_indices: torch.Tensor,
    transposed: torch.Tensor,
    scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    N: int,
) -> torch.Tensor:
    rows = matrix(x)
    y = torch.empty((*x.shape[:-1], N), dtype=x.dtype, device=x.device)
    if y.numel():
        with target.on_device(x):
            if scale is None:
                forward(rows, x, values, crow_indices, col_indices, x, bias, y)
            else:
                q, row_scales = quantized(rows, values.shape[2])
                forward(q, row_scales, values, crow_indices, col_indices, scale.contiguous(), bias, y)
    return y


def quantized(x: torch.Tensor, depth: int) -> tuple[torch.Tensor, torch.Tensor]:
    """x [M, K] in int8, with zeros up to the end of the last block, and its rows' scales."""
    m, k = x.shape
    q = torch.empty((m, triton.cdiv(k, depth) * depth), dtype=torch.int8, device=x.device)
    row_scales = torch.empty(m, dtype=torch.float32, device=x.device)
    quantize(x, q, row_scales, q.shape[1])
    return q, row_scales


def tiles(arch: str, dtype: torch.dtype, out: int) -> tuple[Tile, ...]:
    """Those of a product of this type in stripes of ``out`` columns. On sm_80 a third stage of the widest fp32 one puts
    two registers on the stack."""
    table = narrowed({1: INT8_GEMM, 2: HALF_GEMM, 4: FULL_GEMM}[dtype.itemsize][arch], out)
    if dtype == torch.float32:
        depth, stages = FP32_DEPTH[arch], 2 if arch == "sm_80" and out == 128 else 3
        return tuple(
            replace(tile, block_k=min(tile.block_k, depth), num_stages=min(tile.num_stages, stages)) for tile in table
        )
    if table[-1].block_n <= NARROWEST:
        return table
    return *table, replace(table[-1], block_n=NARROWEST)


def forward(x, row_scales, values, crow_indices, col_indices, scale, bias, y, tile=None):  # type: ignore[no-untyped-def]
    """Write y [..., N] from x [M, K], or from a quantised one and the scales; M and N > 0."""
    (m, k), n, (_, out, depth) = x.shape, y.shape[-1], values.shape
    if (out, depth) in bsr_linear_narrow.BLOCKS:
        return bsr_linear_narrow.forward(x, row_scales, values, crow_indices, col_indices, scale, bias, y)
    stripes = crow_indices.shape[0] - 1
    if tile is None:
        arch, sm_count = target.arch(x.device), target.sm_count(x.device)
        tile = pick(tiles(arch, values.dtype, out), m, stripes * out, sm_count)
    if bsr_linear_described.takes(x, values, y.view(m, n), tile):
        return bsr_linear_described.forward(x, values, crow_indices, col_indices, bias, y.view(m, n), tile)
    bsr_linear_fwd_kernel[(triton.cdiv(m, tile.block_m) * stripes * (out // tile.block_n),)](
        *(x, row_scales, values, crow_indices, col_indices, scale),
        *(x if bias is None else bias.contiguous(), y, m, n, k, stripes, x.stride(0)),
        HAS_BIAS=bias is not None,
        EVEN_K=k % depth == 0,
        OUT=out,
        DEPTH=depth,
        **tile.constants,
        **tile.options,
    )


def bsr_linear_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    values: torch.Tensor,
    crow_indices: torch.Tensor,
    col_indices: torch.Tensor,
    transposed: torch.Tensor,
    scale: torch.Tensor | None,
    x_grad: bool,
    values_grad: bool,
    bias_grad: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rows = matrix(dy)
    dx = torch.empty(x.shape if x_grad else (0,), dtype=x.dtype, device=x.device)
    dvalues = torch.empty(values.shape if values_grad else (0,), dtype=x.dtype, device=x.device)
    with target.on_device(dy):
        if dx.numel():
            input_gradient(rows, values, transposed, scale, dx)
        if dvalues.numel():
            narrow = values.shape[1:] in bsr_linear_narrow.BLOCKS
            gradient = bsr_linear_narrow.values_gradient if narrow else values_gradient
            gradient(rows, matrix(x), crow_indices, col_indices, dvalues)
        dbias = column_sums(rows) if bias_grad else torch.empty(0, dtype=torch.float32, device=dy.device)
    return dx, dvalues, dbias


def input_gradient(dy, values, transposed, scale, dx, tile=None):  # type: ignore[no-untyped-def]
    """Write dx [..., K] = (dy * scale) W from dy [M, N]; M and K > 0."""
    (m, n), k, (blocks, depth, out) = dy.shape, dx.shape[-1], values.shape
    stripes = transposed.shape[0] - 1 - 2 * blocks
    parts = 0 if scale is None else gradient_parts(dx.dtype, n)
    if tile is None:
        table = gradient_tiles(target.arch(dy.device), dy.dtype, out, depth, parts)
        tile = pick(table, m, stripes * out, target.sm_count(dy.device))
    bsr_linear_bwd_dx_kernel[(triton.cdiv(m, tile.block_m) * stripes * (out // tile.block_n),)](
        *(dy, values, transposed, dy if scale is None else scale.contiguous(), dx),
        *(m, n, k, stripes, blocks, dy.stride(0)),
        PARTS=parts,
        EVEN_K=n % depth == 0,
        OUT=out,
        DEPTH=depth,
        **tile.constants,
        **tile.options,
    )


def gradient_tiles(arch: str, dtype: torch.dtype, out: int, depth: int, parts: int) -> tuple[Tile, ...]:
    """Those of dx; ``parts`` unless the values are floats. Taller ones put the parts, or the columns that are gathered
    for shallow blocks, on the stack."""
    table = narrowed(split_tiles(arch, parts), out) if parts else tiles(arch, dtype, out)
    if parts and (depth <= 4 or (parts == 3 and out == NARROW_STRIPE)):
        tallest = 64
    else:
        tallest = 128 if parts or out == NARROW_STRIPE else 256
    return tuple(dict.fromkeys(replace(tile, block_m=min(tile.block_m, tallest)) for tile in table))


TYPES = {torch.int8: "*i8", torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}


def variants(arch: str) -> Iterator[Variant]:
    """Every tile with the deepest blocks and with the shallowest, the largest with those between, for each type of
    values; the 16-bit types, the bias and the promise on K alternate."""
    index = 0
    for out, depth in (*BLOCKS, *bsr_linear_narrow.BLOCKS):
        count = None if out in (128, 16) else 1
        for dtype in (torch.bfloat16, torch.float32, torch.int8):
            for tile in tiles(arch, dtype, out)[:count] if out >= 16 else ():
                yield forward_variant(tile, out, depth, half(dtype, index), index)
                index += 1
            for parts in GRADIENTS if dtype == torch.int8 else (0,):
                for tile in gradient_tiles(arch, dtype, depth, out, parts)[:count]:
                    yield gradient_variant(tile, depth, out, half(dtype, index), parts, index)
                    index += 1


def half(dtype: torch.dtype, index: int) -> torch.dtype:
    return torch.float16 if dtype == torch.bfloat16 and index % 2 else dtype


def forward_variant(tile: Tile, out: int, depth: int, dtype: torch.dtype, index: int) -> Variant:
    pointer = TYPES[dtype]
    result = ("*bf16", "*fp16", "*fp32")[index % 3] if dtype == torch.int8 else pointer
    types = {"x_ptr": pointer, "values_ptr": pointer, "bias_ptr": result, "y_ptr": result}
    types |= dict.fromkeys(("row_scale_ptr", "scale_ptr"), "*fp32") | dict.fromkeys(("crow_ptr", "col_ptr"), "*i32")
    types |= dict.fromkeys(("M", "N", "K", "stripes", "stride_xm"), "i32")
    constants = {"HAS_BIAS": index % 2 == 0, "EVEN_K": dtype == torch.int8 or index % 4 < 2, "OUT": out, "DEPTH": depth}
    return Variant(
        f"{out}x{depth}-{tile.name}-{pointer[1:]}", bsr_linear_fwd_kernel, types, constants | tile.constants,
        tile.num_warps, tile.num_stages, "int8" if dtype == torch.int8 else UNITS[pointer],
    )  # fmt: skip


def gradient_variant(tile: Tile, out: int, depth: int, dtype: torch.dtype, parts: int, index: int) -> Variant:
    pointer = GRADIENTS[parts] if parts else TYPES[dtype]
    types = {"dy_ptr": pointer, "values_ptr": TYPES[dtype], "dx_ptr": pointer, "scale_ptr": "*fp32"}
    types |= {"transposed_ptr": "*i32"} | dict.fromkeys(("M", "N", "K", "stripes", "blocks", "stride_dym"), "i32")
    constants = {"PARTS": parts, "EVEN_K": index % 4 < 2, "OUT": out, "DEPTH": depth}
    return Variant(
        f"{depth}x{out}-{tile.name}-{TYPES[dtype][1:]}-{pointer[1:]}", bsr_linear_bwd_dx_kernel, types,
        constants | tile.constants, tile.num_warps, tile.num_stages, "bf16" if parts else UNITS[pointer],
        narrow=depth < 16,
    )  # fmt: skip
