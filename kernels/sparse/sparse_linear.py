"""sparse_linear and its backward in Triton: a bitmap and packed values are expanded in registers.

A value's place in the packed row is the number of kept elements before it. *starts* counts them up to each tile of a
row; within a tile they are counted byte by byte, by a scan of the bytes' numbers of bits, and in a byte bit by bit,
plane by plane (:mod:`common.planes`). So a tile asks for its kept values alone, neighbours by neighbours, and whatever
follows is a dense product. Memory moves the bitmap, 1 bit an element, once more than the product does for *starts*, and
8 bytes a row and tile for its result.

Backward: dx expands the same tiles; the gradient of the values is a dense tile of dy^T x, of which the kept elements
are written to their places. M is cut into parts where the tiles are too few for the GPU, added in order.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from burnish.kernels.common import target
from burnish.kernels.common.epilogues import store_linear
from burnish.kernels.common.expanded import expanded_product, expanded_pull, expanded_tiles, outer_product
from burnish.kernels.common.operands import UNITS, matrix, objection, parts_like, pointer_of, row_parts
from burnish.kernels.common.planes import disguised, unweave, unweave_pair, weave
from burnish.kernels.common.tiles import FULL_GEMM, HALF_GEMM, Tile, pick, swizzle
from burnish.kernels.common.variants import Variant
from burnish.kernels.lowrank.lowrank_linear_sums import add_parts
from burnish.kernels.quant.int8_linear import column_sums

#: rows and bytes a program of *starts* counts at a time
START_ROWS, START_BYTES = 8, 128


@triton.jit
def ones(byte):
    """How many bits of a byte, as int32, are set."""
    byte = byte - ((byte >> 1) & 0x55)
    byte = (byte & 0x33) + ((byte >> 2) & 0x33)
    return (byte + (byte >> 4)) & 0x0F


@triton.jit
def places(bitmap_ptr, starts_ptr, first_n, first_k, N, width, tiles, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The bytes of a tile of the bitmap, and how many values lie before each, from the first of its row's tile on;
    int32 [ROWS, COLUMNS / 8]; and where that is, int64 [ROWS, 1]."""
    n, byte = tl.arange(0, ROWS), first_k // 8 + tl.arange(0, COLUMNS // 8)
    in_rows = n < N - first_n
    bitmap_ptr += first_n * tl.full([], 1, tl.int64) * width
    inside = in_rows[:, None] & (byte < width)[None, :]
    bits = tl.load(bitmap_ptr + n[:, None] * width + byte[None, :], mask=inside, other=0).to(tl.int32)
    counts = ones(bits)
    starts_ptr += first_n * tl.full([], 1, tl.int64) * tiles + first_k // COLUMNS
    starts = tl.load(starts_ptr + n * tiles, mask=in_rows, other=0)
    return bits, tl.cumsum(counts, 1) - counts, starts[:, None]


@triton.jit
def element(values, bits, before, BIT: tl.constexpr):
    """Plane BIT of a tile, and how many values lie before the next plane's elements."""
    kept = (bits >> BIT) & 1
    return disguised(tl.load(values + before, mask=kept != 0, other=0.0)), before + kept


@triton.jit
def sparse_tile(weight, first_n, first_k, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The format, for :mod:`common.expanded`: ``weight`` is (values, bitmap, starts, N, bytes of a bitmap's row, tiles
    of a row), starts being those of tiles of COLUMNS columns."""
    values_ptr, bitmap_ptr, starts_ptr, N, width, tiles = weight
    bits, before, starts = places(bitmap_ptr, starts_ptr, first_n, first_k, N, width, tiles, ROWS, COLUMNS)
    values = values_ptr + starts
    a, before = element(values, bits, before, 0)
    b, before = element(values, bits, before, 1)
    c, before = element(values, bits, before, 2)
    d, before = element(values, bits, before, 3)
    e, before = element(values, bits, before, 4)
    f, before = element(values, bits, before, 5)
    g, before = element(values, bits, before, 6)
    h, before = element(values, bits, before, 7)
    dense = tl.interleave(weave(a, c, e, g), weave(b, d, f, h))
    return dense.to(values_ptr.dtype.element_ty, bitcast=True)


@triton.jit
def sparse_linear_fwd_kernel_starts(
    bitmap_ptr,  # [N, width]
    row_starts_ptr,  # int64 [N + 1]
    starts_ptr,  # int64 [N, tiles]
    N,
    width,
    tiles,
    STEP: tl.constexpr,  # bytes of a tile
    ROWS: tl.constexpr,
    BYTES: tl.constexpr,  # a multiple of STEP
):
    n, byte = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS), tl.arange(0, BYTES)
    in_rows = n < N
    start = tl.load(row_starts_ptr + n, mask=in_rows, other=0)
    for first in range(0, width, BYTES):
        inside = in_rows[:, None] & (byte < width - first)[None, :]
        bits = tl.load(bitmap_ptr + n[:, None] * width + (first + byte)[None, :], mask=inside, other=0)
        counts = tl.sum(tl.reshape(ones(bits.to(tl.int32)), (ROWS, BYTES // STEP, STEP)), axis=2)
        before = start[:, None] + tl.cumsum(counts, 1) - counts
        tile = first // STEP + tl.arange(0, BYTES // STEP)
        tl.store(
            starts_ptr + n[:, None] * tiles + tile[None, :], before, mask=in_rows[:, None] & (tile < tiles)[None, :]
        )
        start += tl.sum(counts, axis=1)


@triton.jit
def sparse_linear_fwd_kernel(
    x_ptr,  # [M, K]
    values_ptr,  # [nnz]
    bitmap_ptr,  # [N, width]
    starts_ptr,  # [N, tiles]
    bias_ptr,  # [N]; not read unless HAS_BIAS
    y_ptr,  # [M, N]
    M,
    N,
    K,
    width,
    tiles,
    stride_xm,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    tile_m, tile_n = swizzle(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP)
    first_m, first_n = tile_m.to(tl.int64) * BLOCK_M, tile_n * BLOCK_N
    product = expanded_product(
        sparse_tile, (values_ptr, bitmap_ptr, starts_ptr, N, width, tiles), x_ptr + first_m * stride_xm, first_n,
        M - first_m, K, stride_xm, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    store_linear(
        product, y_ptr, y_ptr, bias_ptr, y_ptr + first_m * N, M - first_m, first_n, N, N, HAS_BIAS, BLOCK_M, BLOCK_N
    )


@triton.jit
def sparse_linear_bwd_dx_kernel(
    dy_ptr,  # [M, N]
    values_ptr,  # [nnz]
    bitmap_ptr,  # [N, width]
    starts_ptr,  # [N, tiles]
    dx_ptr,  # [M, K]
    M,
    N,
    K,
    width,
    tiles,
    stride_dym,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,  # of K, the output's columns
    BLOCK_K: tl.constexpr,  # of N, which is summed
    GROUP: tl.constexpr,
):
    tile_m, tile_k = swizzle(tl.program_id(0), M, K, BLOCK_M, BLOCK_N, GROUP)
    first_m, first_k = tile_m.to(tl.int64) * BLOCK_M, tile_k * BLOCK_N
    product = expanded_pull(
        sparse_tile, (values_ptr, bitmap_ptr, starts_ptr, N, width, tiles), dy_ptr, dy_ptr + first_m * stride_dym,
        first_k, M - first_m, N, stride_dym, 0, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    store_linear(
        product, dx_ptr, dx_ptr, dx_ptr, dx_ptr + first_m * K, M - first_m, first_k, K, K, False, BLOCK_M, BLOCK_N
    )


@triton.jit
def store_element(dw, plane, bits, before, BIT: tl.constexpr):
    """Write plane BIT of a tile of the gradient; how many values lie before the next plane's elements."""
    kept = (bits >> BIT) & 1
    tl.store(dw + before, plane, mask=kept != 0)
    return before + kept


@triton.jit
def sparse_linear_bwd_dw_kernel(
    dy_ptr,  # [M, N]
    x_ptr,  # [M, K]
    bitmap_ptr,  # [N, width]
    starts_ptr,  # [N, tiles]
    dw_ptr,  # [M / rows, nnz]
    M,
    N,
    K,
    width,
    tiles,
    nnz,
    rows,  # of a part, a multiple of BLOCK_K
    stride_dym,
    stride_xm,
    BLOCK_M: tl.constexpr,  # of N
    BLOCK_N: tl.constexpr,  # of K
    BLOCK_K: tl.constexpr,  # of M, which is summed
    GROUP: tl.constexpr,
):
    tile_n, tile_k = swizzle(tl.program_id(0), N, K, BLOCK_M, BLOCK_N, GROUP)
    first_n, first_k, part = tile_n * BLOCK_M, tile_k * BLOCK_N, tl.program_id(1).to(tl.int64)
    product = outer_product(
        dy_ptr + part * rows * stride_dym + first_n, x_ptr + part * rows * stride_xm + first_k, rows, M - part * rows,
        N - first_n, K - first_k, stride_dym, stride_xm, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    even, odd = unweave_pair(product.to(dw_ptr.dtype.element_ty))
    a, c, e, g = unweave(even)
    b, d, f, h = unweave(odd)
    bits, before, starts = places(bitmap_ptr, starts_ptr, first_n, first_k, N, width, tiles, BLOCK_M, BLOCK_N)
    dw = dw_ptr + part * nnz + starts
    before = store_element(dw, a, bits, before, 0)
    before = store_element(dw, b, bits, before, 1)
    before = store_element(dw, c, bits, before, 2)
    before = store_element(dw, d, bits, before, 3)
    before = store_element(dw, e, bits, before, 4)
    before = store_element(dw, f, bits, before, 5)
    before = store_element(dw, g, bits, before, 6)
    store_element(dw, h, bits, before, 7)


def supports(x: torch.Tensor, values: torch.Tensor, bitmap: torch.Tensor, *rest: Any) -> str | None:
    return objection(x, x.shape[-1], bitmap.shape[0])


def supports_backward(dy: torch.Tensor, x: torch.Tensor, *rest: Any) -> str | None:
    return objection(dy, x.shape[-1], dy.shape[-1])


def sparse_linear(
    x: torch.Tensor,
    values: torch.Tensor,
    bitmap: torch.Tensor,
    row_starts: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    y = torch.empty((*x.shape[:-1], bitmap.shape[0]), dtype=x.dtype, device=x.device)
    if y.numel():
        with target.on_device(x):
            forward(matrix(x), values, bitmap, row_starts, bias, y)
    return y


def starts(bitmap: torch.Tensor, row_starts: torch.Tensor, columns: int) -> torch.Tensor:
    """int64 [N, tiles]: where the values of each tile of ``columns`` columns begin."""
    n, width = bitmap.shape
    result = torch.empty((n, triton.cdiv(8 * width, columns)), dtype=torch.int64, device=bitmap.device)
    if width:
        sparse_linear_fwd_kernel_starts[(triton.cdiv(n, START_ROWS),)](
            *(bitmap, row_starts, result, n, width, result.shape[1]),
            STEP=columns // 8,
            ROWS=START_ROWS,
            BYTES=START_BYTES,
            num_warps=4,
            enable_fp_fusion=False,
        )
    return result


def tiles(arch: str, dtype: torch.dtype) -> tuple[Tile, ...]:
    return expanded_tiles({2: HALF_GEMM, 4: FULL_GEMM}[dtype.itemsize][arch])


def forward(x, values, bitmap, row_starts, bias, y, tile=None):  # type: ignore[no-untyped-def]
    """Write y [..., N] from x [M, K]; M and N > 0."""
    (m, k), (n, width) = x.shape, bitmap.shape
    tile = tile or pick(tiles(target.arch(x.device), x.dtype), m, n, target.sm_count(x.device))
    table = starts(bitmap, row_starts, tile.block_k)
    sparse_linear_fwd_kernel[tile.grid(m, n)](
        *(x, values, bitmap, table, x if bias is None else bias.contiguous(), y),
        *(m, n, k, width, table.shape[1], x.stride(0)),
        HAS_BIAS=bias is not None,
        **tile.constants,
        **tile.options,
    )


def sparse_linear_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    values: torch.Tensor,
    bitmap: torch.Tensor,
    row_starts: torch.Tensor,
    x_grad: bool,
    values_grad: bool,
    bias_grad: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dx = torch.empty(x.shape if x_grad else (0,), dtype=x.dtype, device=x.device)
    dvalues = torch.empty(values.shape if values_grad else (0,), dtype=x.dtype, device=x.device)
    rows = matrix(dy)
    with target.on_device(dy):
        if dx.numel():
            input_gradient(rows, values, bitmap, row_starts, dx)
        if dvalues.numel():
            values_gradient(rows, matrix(x), bitmap, row_starts, dvalues)
        dbias = column_sums(rows) if bias_grad else torch.empty(0, dtype=torch.float32, device=dy.device)
    return dx, dvalues, dbias


def input_gradient(dy, values, bitmap, row_starts, dx, tile=None):  # type: ignore[no-untyped-def]
    """Write dx [..., K] = dy W from dy [M, N]; M and K > 0."""
    (m, n), k = dy.shape, dx.shape[-1]
    tile = tile or pick(tiles(target.arch(dy.device), dy.dtype), m, k, target.sm_count(dy.device))
    table = starts(bitmap, row_starts, tile.block_n)
    sparse_linear_bwd_dx_kernel[tile.grid(m, k)](
        *(dy, values, bitmap, table, dx, m, n, k, bitmap.shape[1], table.shape[1], dy.stride(0)),
        **tile.constants,
        **tile.options,
    )


def dw_tile(arch: str, itemsize: int) -> Tile:
    """``block_m`` is of N, ``block_n`` of K, ``block_k`` of M."""
    return Tile(64, 64, 32 if itemsize == 2 or arch in ("sm_90", "sm_100") else 16, 8 if itemsize == 4 else 4, 2)


def values_gradient(dy, x, bitmap, row_starts, dvalues):  # type: ignore[no-untyped-def]
    """Write dvalues [nnz] from dy [M, N] and x [M, K]; N and K > 0."""
    (m, n), k, nnz = dy.shape, x.shape[1], dvalues.shape[0]
    tile = dw_tile(target.arch(x.device), x.element_size())
    (programs,) = tile.grid(n, k)
    rows, parts = row_parts(m, tile.block_k, programs, target.sm_count(x.device))
    sums, table = parts_like(dvalues, parts), starts(bitmap, row_starts, tile.block_n)
    sparse_linear_bwd_dw_kernel[(programs, parts)](
        *(dy, x, bitmap, table, sums, m, n, k, bitmap.shape[1], table.shape[1], nnz, rows, dy.stride(0), x.stride(0)),
        **tile.constants,
        **tile.options,
    )
    if parts > 1:
        add_parts(sums, dvalues)


def variants(arch: str) -> Iterator[Variant]:
    """Every tile in fp32 and one 16-bit type, which alternate, as the bias does; *starts* with each of their steps."""
    sizes = dict.fromkeys(("M", "N", "K", "width", "tiles"), "i32")
    types = {"bitmap_ptr": "*u8", "starts_ptr": "*i64", **sizes}
    steps, index = set(), 0
    for itemsize in (2, 4):
        for tile in tiles(arch, torch.bfloat16 if itemsize == 2 else torch.float32):
            pointer = pointer_of(itemsize, index)
            operands = types | dict.fromkeys(("x_ptr", "values_ptr", "bias_ptr", "y_ptr"), pointer)
            yield Variant(
                f"{tile.name}-{pointer[1:]}", sparse_linear_fwd_kernel, operands | {"stride_xm": "i32"},
                {"HAS_BIAS": index % 2 == 0, **tile.constants}, tile.num_warps, tile.num_stages, UNITS[pointer],
                narrow=True,
            )  # fmt: skip
            operands = types | dict.fromkeys(("dy_ptr", "values_ptr", "dx_ptr"), pointer)
            yield Variant(
                f"{tile.name}-{pointer[1:]}", sparse_linear_bwd_dx_kernel, operands | {"stride_dym": "i32"},
                tile.constants, tile.num_warps, tile.num_stages, UNITS[pointer], narrow=True,
            )  # fmt: skip
            steps |= {tile.block_n, tile.block_k}
            index += 1
        tile, pointer = dw_tile(arch, itemsize), pointer_of(itemsize, 0)
        operands = types | dict.fromkeys(("dy_ptr", "x_ptr", "dw_ptr"), pointer)
        operands |= dict.fromkeys(("nnz", "rows", "stride_dym", "stride_xm"), "i32")
        yield Variant(
            f"{tile.name}-{pointer[1:]}", sparse_linear_bwd_dw_kernel, operands, tile.constants, tile.num_warps,
            tile.num_stages, UNITS[pointer], narrow=True,
        )  # fmt: skip
        steps.add(tile.block_n)
    for step in sorted(steps):
        pointers = {"bitmap_ptr": "*u8", "row_starts_ptr": "*i64", "starts_ptr": "*i64"}
        constants = {"STEP": step // 8, "ROWS": START_ROWS, "BYTES": START_BYTES}
        yield Variant(
            str(step), sparse_linear_fwd_kernel_starts, pointers | dict.fromkeys(("N", "width", "tiles"), "i32"),
            constants, num_warps=4,
        )  # fmt: skip
