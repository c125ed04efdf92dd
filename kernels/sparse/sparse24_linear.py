"""sparse24_linear and its backward in Triton: the weight is read packed and expanded in registers.

Per group of four, two values and their positions become four elements, plane by plane (:mod:`common.planes`), so that
memory moves 9/16 of a dense weight's bytes in 16 bits; what follows is a dense product. That pays where the weight's
bytes bound, for few rows. Tensor cores that skip the zeros are for CUDA C++: Triton has no instruction for them.

int8 values: x is quantised by :mod:`int8_quantize_rows`, sums are int32, the epilogue is int8_linear's, and so are the
bits. Their dx takes dy * scale in bf16 parts, one for a bf16 dy, as int8_linear's does.

Backward: dx expands the same tiles; the gradient of the values is a dense tile of dy^T x, of which each group's two
positions are picked and written. M is cut into parts where the tiles are too few for the GPU, added in order.
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
from burnish.kernels.common.expanded import expanded_product, expanded_pull, expanded_tiles, narrow, outer_product
from burnish.kernels.common.operands import UNITS, matrix, objection, parts_like, pointer_of, row_parts
from burnish.kernels.common.planes import unweave, unweave_pair, weave
from burnish.kernels.common.tiles import FULL_GEMM, HALF_GEMM, INT8_GEMM, Tile, pick, split_tiles, swizzle
from burnish.kernels.common.variants import Variant
from burnish.kernels.lowrank.lowrank_linear_sums import add_parts
from burnish.kernels.quant.int8_linear import GRADIENTS, column_sums, gradient_parts
from burnish.kernels.quant.int8_quantize_rows import quantize


@triton.jit
def positions(metadata_ptr, first_n, first_k, N, eighth, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The two positions in each group of a tile, int8 [ROWS, COLUMNS / 4]."""
    n, byte = tl.arange(0, ROWS), first_k // 8 + tl.arange(0, COLUMNS // 8)
    inside = (n < N - first_n)[:, None] & (byte < eighth)[None, :]
    metadata_ptr += first_n * tl.full([], 1, tl.int64) * eighth
    pairs = tl.load(metadata_ptr + n[:, None] * eighth + byte[None, :], mask=inside, other=0)
    codes = tl.interleave(pairs & 15, pairs >> 4)
    return codes & 3, codes >> 2


@triton.jit
def sparse24_tile(weight, first_n, first_k, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The format, for :mod:`common.expanded`: ``weight`` is (values, metadata, N, Kp / 2, Kp / 8)."""
    values_ptr, metadata_ptr, N, half, eighth = weight
    n, k = tl.arange(0, ROWS), first_k // 2 + tl.arange(0, COLUMNS // 2)
    inside = (n < N - first_n)[:, None] & (k < half)[None, :]
    values_ptr += first_n * tl.full([], 1, tl.int64) * half
    values = tl.load(values_ptr + n[:, None] * half + k[None, :], mask=inside, other=0)
    first, second = unweave_pair(values)
    p, q = positions(metadata_ptr, first_n, first_k, N, eighth, ROWS, COLUMNS)
    none = tl.zeros_like(first)
    return weave(
        tl.where(p == 0, first, none),
        tl.where(p == 1, first, tl.where(q == 1, second, none)),
        tl.where(p == 2, first, tl.where(q == 2, second, none)),
        tl.where(q == 3, second, none),
    )


@triton.jit
def sparse24_linear_fwd_kernel(
    x_ptr,  # [M, K], int8 for int8 values
    row_scale_ptr,  # [M]; not read unless int8, as scale_ptr
    values_ptr,  # [N, half]
    metadata_ptr,  # [N, eighth]
    scale_ptr,  # [N]
    bias_ptr,  # [N]; not read unless HAS_BIAS
    y_ptr,  # [M, N]
    M,
    N,
    K,
    half,
    eighth,
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
        sparse24_tile, (values_ptr, metadata_ptr, N, half, eighth), x_ptr + first_m * stride_xm, first_n, M - first_m,
        K, stride_xm, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    store_linear(
        product, row_scale_ptr + first_m, scale_ptr, bias_ptr, y_ptr + first_m * N, M - first_m, first_n, N, N,
        HAS_BIAS, BLOCK_M, BLOCK_N,
    )  # fmt: skip


@triton.jit
def sparse24_linear_bwd_dx_kernel(
    dy_ptr,  # [M, N]
    values_ptr,  # [N, half]
    metadata_ptr,  # [N, eighth]
    scale_ptr,  # [N]; not read unless PARTS
    dx_ptr,  # [M, K]
    M,
    N,
    K,
    half,
    eighth,
    stride_dym,
    PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,  # of K, the output's columns
    BLOCK_K: tl.constexpr,  # of N, which is summed
    GROUP: tl.constexpr,
):
    tile_m, tile_k = swizzle(tl.program_id(0), M, K, BLOCK_M, BLOCK_N, GROUP)
    first_m, first_k = tile_m.to(tl.int64) * BLOCK_M, tile_k * BLOCK_N
    product = expanded_pull(
        sparse24_tile, (values_ptr, metadata_ptr, N, half, eighth), scale_ptr, dy_ptr + first_m * stride_dym, first_k,
        M - first_m, N, stride_dym, PARTS, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    store_linear(
        product, dx_ptr, dx_ptr, dx_ptr, dx_ptr + first_m * K, M - first_m, first_k, K, K, False, BLOCK_M, BLOCK_N
    )


@triton.jit
def sparse24_linear_bwd_dw_kernel(
    dy_ptr,  # [M, N]
    x_ptr,  # [M, K]
    metadata_ptr,  # [N, eighth]
    dw_ptr,  # [M / rows, N, half]
    M,
    N,
    K,
    half,
    eighth,
    rows,  # of a part, a multiple of BLOCK_K
    stride_dym,
    stride_xm,
    BLOCK_M: tl.constexpr,  # of N
    BLOCK_N: tl.constexpr,  # of K
    BLOCK_K: tl.constexpr,  # of M, which is summed
    GROUP: tl.constexpr,
):
    tile_n, tile_k = swizzle(tl.program_id(0), N, half * 2, BLOCK_M, BLOCK_N, GROUP)
    first_n, first_k, part = tile_n * BLOCK_M, tile_k * BLOCK_N, tl.program_id(1).to(tl.int64)
    product = outer_product(
        dy_ptr + part * rows * stride_dym + first_n, x_ptr + part * rows * stride_xm + first_k, rows, M - part * rows,
        N - first_n, K - first_k, stride_dym, stride_xm, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    k = first_k + tl.arange(0, BLOCK_N)
    product = tl.where((k < K)[None, :], product, 0.0)  # in padding, of an infinity times none
    a, b, c, d = unweave(product)
    p, q = positions(metadata_ptr, first_n, first_k, N, eighth, BLOCK_M, BLOCK_N)
    first = tl.where(p == 0, a, tl.where(p == 1, b, c))
    second = tl.where(q == 1, b, tl.where(q == 2, c, d))
    kept = tl.interleave(first, second).to(dw_ptr.dtype.element_ty)
    n, column = tl.arange(0, BLOCK_M), first_k // 2 + tl.arange(0, BLOCK_N // 2)
    dw_ptr += (part * N + first_n) * half
    inside = (n < N - first_n)[:, None] & (column < half)[None, :]
    tl.store(dw_ptr + n[:, None] * half + column[None, :], kept, mask=inside)


def supports(x: torch.Tensor, values: torch.Tensor, *rest: Any) -> str | None:
    return objection(x, x.shape[-1], values.shape[0])


def supports_backward(dy: torch.Tensor, x: torch.Tensor, *rest: Any) -> str | None:
    return objection(dy, x.shape[-1], dy.shape[-1])


def sparse24_linear(
    x: torch.Tensor,
    values: torch.Tensor,
    metadata: torch.Tensor,
    scale: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    rows, n = matrix(x), values.shape[0]
    y = torch.empty((*x.shape[:-1], n), dtype=x.dtype, device=x.device)
    if y.numel():
        with target.on_device(x):
            if scale is None:
                forward(rows, x, values, metadata, x, bias, y)
            else:
                q = torch.empty((rows.shape[0], 2 * values.shape[1]), dtype=torch.int8, device=x.device)
                row_scales = torch.empty(rows.shape[0], dtype=torch.float32, device=x.device)
                quantize(rows, q, row_scales, q.shape[1])
                forward(q, row_scales, values, metadata, scale.contiguous(), bias, y)
    return y


def tiles(arch: str, dtype: torch.dtype) -> tuple[Tile, ...]:
    """Those of the forward product. On sm_90 eight warps put two registers of the lowest int8 one on the stack."""
    table = expanded_tiles({1: INT8_GEMM, 2: HALF_GEMM, 4: FULL_GEMM}[dtype.itemsize][arch])
    if dtype != torch.int8 or arch != "sm_90":
        return table
    return tuple(replace(tile, num_warps=4) if tile.block_m == 16 else tile for tile in table)


def gradient_tiles(arch: str, dtype: torch.dtype, parts: int) -> tuple[Tile, ...]:
    """Those of dx; ``parts`` unless the values are floats. On sm_100 four warps put two registers of the square one on
    the stack."""
    table = expanded_tiles(split_tiles(arch, parts)) if parts else tiles(arch, dtype)
    warps = {(64, 64): 8} if arch == "sm_100" else {}
    return tuple(replace(tile, num_warps=warps.get((tile.block_m, tile.block_n), tile.num_warps)) for tile in table)


def forward(x, row_scales, values, metadata, scale, bias, y, tile=None):  # type: ignore[no-untyped-def]
    """Write y [..., N] from x [M, K], or from a quantised one and the scales; M and N > 0."""
    (m, k), (n, half) = x.shape, values.shape
    tile = tile or pick(tiles(target.arch(x.device), values.dtype), m, n, target.sm_count(x.device))
    sparse24_linear_fwd_kernel[tile.grid(m, n)](
        *(x, row_scales, values, metadata, scale, x if bias is None else bias.contiguous(), y),
        *(m, n, k, half, metadata.shape[1], x.stride(0)),
        HAS_BIAS=bias is not None,
        **tile.constants,
        **tile.options,
    )


def sparse24_linear_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    values: torch.Tensor,
    metadata: torch.Tensor,
    scale: torch.Tensor | None,
    x_grad: bool,
    values_grad: bool,
    bias_grad: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dx = torch.empty(x.shape if x_grad else (0,), dtype=x.dtype, device=x.device)
    dvalues = torch.empty(values.shape if values_grad else (0,), dtype=x.dtype, device=x.device)
    rows = matrix(dy)
    with target.on_device(dy):
        if dx.numel():
            input_gradient(rows, values, metadata, scale, dx)
        if dvalues.numel():
            values_gradient(rows, matrix(x), metadata, dvalues)
        dbias = column_sums(rows) if bias_grad else torch.empty(0, dtype=torch.float32, device=dy.device)
    return dx, dvalues, dbias


def input_gradient(dy, values, metadata, scale, dx, tile=None):  # type: ignore[no-untyped-def]
    """Write dx [..., K] = (dy * scale) W from dy [M, N]; M and K > 0."""
    (m, n), k, half = dy.shape, dx.shape[-1], values.shape[1]
    parts = 0 if scale is None else gradient_parts(dx.dtype, n)
    tile = tile or pick(gradient_tiles(target.arch(dy.device), dx.dtype, parts), m, k, target.sm_count(dy.device))
    sparse24_linear_bwd_dx_kernel[tile.grid(m, k)](
        *(dy, values, metadata, dy if scale is None else scale.contiguous(), dx),
        *(m, n, k, half, metadata.shape[1], dy.stride(0)),
        PARTS=parts,
        **tile.constants,
        **tile.options,
    )


def dw_tile(arch: str, itemsize: int) -> Tile:
    """``block_m`` is of N, ``block_n`` of K, ``block_k`` of M."""
    return Tile(64, 64, 32 if itemsize == 2 or arch in ("sm_90", "sm_100") else 16, 8 if itemsize == 4 else 4, 2)


def values_gradient(dy, x, metadata, dvalues):  # type: ignore[no-untyped-def]
    """Write dvalues [N, Kp / 2] from dy [M, N] and x [M, K]; N and K > 0."""
    (m, n), k, half = dy.shape, x.shape[1], dvalues.shape[1]
    tile = dw_tile(target.arch(x.device), x.element_size())
    (programs,) = tile.grid(n, 2 * half)
    rows, parts = row_parts(m, tile.block_k, programs, target.sm_count(x.device))
    sums = parts_like(dvalues, parts)
    sparse24_linear_bwd_dw_kernel[(programs, parts)](
        *(dy, x, metadata, sums, m, n, k, half, metadata.shape[1], rows, dy.stride(0), x.stride(0)),
        **tile.constants,
        **tile.options,
    )
    if parts > 1:
        add_parts(sums, dvalues)


def variants(arch: str) -> Iterator[Variant]:
    """Every tile of every type of values; the 16-bit types and the bias alternate."""
    sizes = dict.fromkeys(("M", "N", "K", "half", "eighth"), "i32")
    index = 0
    for dtype in (torch.bfloat16, torch.float32, torch.int8):
        for tile in tiles(arch, dtype):
            pointer = "*i8" if dtype == torch.int8 else pointer_of(dtype.itemsize, index)
            result = pointer_of(2, index) if dtype == torch.int8 else pointer
            types = {"x_ptr": pointer, "values_ptr": pointer, "metadata_ptr": "*u8", "bias_ptr": result}
            types |= {"y_ptr": result, "row_scale_ptr": "*fp32", "scale_ptr": "*fp32", "stride_xm": "i32", **sizes}
            yield Variant(
                f"{tile.name}-{pointer[1:]}", sparse24_linear_fwd_kernel, types,
                {"HAS_BIAS": index % 2 == 0, **tile.constants}, tile.num_warps, tile.num_stages,
                "int8" if dtype == torch.int8 else UNITS[pointer], narrow(tile, 8),
            )  # fmt: skip
            index += 1
        for parts in GRADIENTS if dtype == torch.int8 else (0,):
            for tile in gradient_tiles(arch, dtype, parts):
                pointer = GRADIENTS[parts] if parts else pointer_of(dtype.itemsize, index)
                values = "*i8" if parts else pointer
                types = {"dy_ptr": pointer, "values_ptr": values, "metadata_ptr": "*u8", "dx_ptr": pointer}
                types |= {"scale_ptr": "*fp32", "stride_dym": "i32", **sizes}
                yield Variant(
                    f"{tile.name}-{values[1:]}-{pointer[1:]}", sparse24_linear_bwd_dx_kernel, types,
                    {"PARTS": parts, **tile.constants}, tile.num_warps, tile.num_stages,
                    "bf16" if parts else UNITS[pointer], narrow(tile, 8),
                )  # fmt: skip
                index += 1
    for itemsize, out in ((2, "*bf16"), (2, "*fp32"), (4, "*fp32")):
        tile, pointer = dw_tile(arch, itemsize), pointer_of(itemsize, 0)
        types = {"dy_ptr": pointer, "x_ptr": pointer, "metadata_ptr": "*u8", "dw_ptr": out, **sizes}
        types |= dict.fromkeys(("rows", "stride_dym", "stride_xm"), "i32")
        yield Variant(
            f"{tile.name}-{pointer[1:]}-{out[1:]}", sparse24_linear_bwd_dw_kernel, types, tile.constants,
            tile.num_warps, tile.num_stages, UNITS[pointer], narrow=True,
        )  # fmt: skip
