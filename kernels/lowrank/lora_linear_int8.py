"""lora_linear's products on an int8 base: those of :mod:`quant.int8_linear`, with the low-rank product joined on.

Forward: *int8_quantize_rows*, then the int8 product; s B^T is added to its fp32 preactivation, and y is rounded and
written once. Backward: (dy * scale) W, then keep * (t A), likewise. Both add a slice of columns at a time, which bounds
the registers, and take the tiles of int8_linear, and its bits where s is zero.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from burnish.kernels.common import target
from burnish.kernels.common.epilogues import preactivation, store_rows
from burnish.kernels.common.operands import pointer_of
from burnish.kernels.common.products import column_slices, int8_product, scaled_product
from burnish.kernels.common.tiles import INT8_GEMM, SPLIT_GEMM, Tile, pick, split_tiles, swizzle
from burnish.kernels.common.variants import Variant, of_tile
from burnish.kernels.lowrank.lowrank_linear_sums import (
    TILE_RANK_BLOCK,
    Dropout,
    Sums,
    add_lowrank,
    drop_arguments,
    lowrank_tile,
    rank_block,
)
from burnish.kernels.quant.int8_linear import GRADIENTS, gradient_parts
from burnish.kernels.quant.int8_quantize_rows import quantize

#: by architecture and parts, where int8_linear's tiles leave no registers for these and a mask: other warps, less tile
FITTED = {
    ("sm_80", 3): (Tile(128, 128, 32, 8, 3), Tile(64, 64, 32, 8, 3), Tile(16, 64, 64, 8, 3)),
    ("sm_90", 2): (*SPLIT_GEMM["sm_90"][:2], Tile(16, 64, 64, 4, 3)),
    ("gfx942", 3): SPLIT_GEMM["gfx942"][1:],
}


@triton.jit
def lora_linear_fwd_kernel_int8(
    q_ptr,  # [M, base_width]
    row_scale_ptr,  # [M]
    weight_ptr,  # [N, base_width]
    scale_ptr,  # [N]
    bias_ptr,  # [N]; not read unless HAS_BIAS
    sums_ptr,  # of s: [splits, M, width]
    factor_ptr,  # [R, N] by its strides
    y_ptr,  # [M, N]
    M,
    N,
    R,
    base_width,
    width,
    splits,
    factor,
    stride_fr,
    stride_fn,
    HAS_BIAS: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    tile_m, tile_n = swizzle(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP)
    first_m, first_n = tile_m.to(tl.int64) * BLOCK_M, tile_n.to(tl.int64) * BLOCK_N
    product = int8_product(
        q_ptr + first_m * base_width, weight_ptr + first_n * base_width, M - first_m, N - first_n, base_width,
        BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K,
    )  # fmt: skip
    m = first_m + tl.arange(0, BLOCK_M)
    row_scales = tl.load(row_scale_ptr + m, mask=m < M, other=0.0)
    slices = column_slices(product, BLOCK_M, BLOCK_N)
    WIDTH: tl.constexpr = slices[0].shape[1]
    for part in tl.static_range(BLOCK_N // WIDTH):
        first = first_n + part * WIDTH
        z = preactivation(slices[part], row_scales, scale_ptr, bias_ptr, first + tl.arange(0, WIDTH), N, HAS_BIAS)
        z = add_lowrank(
            z, sums_ptr, factor_ptr, first_m, first, M, N, R, width, splits, factor, stride_fr, stride_fn,
            BLOCK_M, WIDTH, BLOCK_R,
        )  # fmt: skip
        store_rows(z, bias_ptr, y_ptr + first_m * N, M - first_m, first, N, False, BLOCK_M, WIDTH)


@triton.jit
def lora_linear_bwd_dx_kernel_int8(
    dy_ptr,  # [M, N]
    weight_ptr,  # [N, base_width]
    scale_ptr,  # [N]
    sums_ptr,  # of t: [splits, M, width]
    factor_ptr,  # A [R, K]
    seed_ptr,  # [1]; not read unless DROP
    dx_ptr,  # [M, K]
    M,
    N,
    K,
    R,
    base_width,
    width,
    splits,
    threshold,
    factor,
    stride_dym,
    stride_fr,
    DROP: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,  # of K, the output's columns
    BLOCK_K: tl.constexpr,  # of N, which is summed
    GROUP: tl.constexpr,
):
    tile_m, tile_k = swizzle(tl.program_id(0), M, K, BLOCK_M, BLOCK_N, GROUP)
    first_m, first_k = tile_m.to(tl.int64) * BLOCK_M, tile_k * BLOCK_N
    dx = scaled_product(
        tl.zeros([BLOCK_M, BLOCK_N], tl.float32), dy_ptr, weight_ptr, scale_ptr, first_m + tl.arange(0, BLOCK_M),
        first_k + tl.arange(0, BLOCK_N), M, N, base_width, stride_dym, 1, PARTS, BLOCK_K,
    )  # fmt: skip
    slices = column_slices(dx, BLOCK_M, BLOCK_N)
    WIDTH: tl.constexpr = slices[0].shape[1]
    for part in tl.static_range(BLOCK_N // WIDTH):
        first = first_k.to(tl.int64) + part * WIDTH
        z = slices[part] + lowrank_tile(
            sums_ptr, factor_ptr, seed_ptr, first_m, first, M, K, R, width, splits, threshold, factor, stride_fr, 1,
            DROP, BLOCK_M, WIDTH, BLOCK_R,
        )  # fmt: skip
        store_rows(z, scale_ptr, dx_ptr + first_m * K, M - first_m, first, K, False, BLOCK_M, WIDTH)


def forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    sums: Sums,
    thin: torch.Tensor,
    y: torch.Tensor,
) -> None:
    """Write y [..., N] = int8_linear's + s @ thin [R, N], from x [M, K], M > 0."""
    m, n = x.shape[0], scale.shape[0]
    tile = pick(INT8_GEMM[target.arch(x.device)], m, n, target.sm_count(x.device))
    multiply(x, weight, scale.contiguous(), bias, sums, thin, y, tile)


def multiply(x, weight, scale, bias, sums, thin, y, tile):  # type: ignore[no-untyped-def]
    """:func:`forward` with a tile."""
    m, (n, base_width) = x.shape[0], weight.shape
    q = torch.empty((m, base_width), dtype=torch.int8, device=x.device)
    row_scales = torch.empty(m, dtype=torch.float32, device=x.device)
    quantize(x, q, row_scales, base_width)
    sums = sums.read_by(triton.cdiv(n, tile.block_n))
    data, width, splits, factor = sums.arguments
    lora_linear_fwd_kernel_int8[tile.grid(m, n)](
        *(q, row_scales, weight, scale, scale if bias is None else bias.contiguous(), data, thin, y),
        *(m, n, sums.rank, base_width, width, splits, factor, *thin.stride()),
        HAS_BIAS=bias is not None,
        EVEN_K=base_width % tile.block_k == 0,
        BLOCK_R=rank_block(sums.rank, TILE_RANK_BLOCK[thin.element_size()]),
        **tile.constants,
        **tile.options,
    )


def input_gradient(
    dy: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    sums: Sums,
    A: torch.Tensor,
    dropout: Dropout | None,
    dx: torch.Tensor,
) -> None:
    """Write dx [..., K] = keep * (t A) + (dy * scale) @ weight from dy [M, N]; M and K > 0."""
    (m, n), k = dy.shape, A.shape[1]
    tiles = gradient_tiles(target.arch(dy.device), gradient_parts(dx.dtype, n))
    tile = pick(tiles, m, k, target.sm_count(dy.device))
    pull_back(dy, weight, scale.contiguous(), sums, A, dropout, dx, tile)


def gradient_tiles(arch: str, parts: int) -> tuple[Tile, ...]:
    """int8_linear's, or :data:`FITTED`'s."""
    return FITTED.get((arch, parts), split_tiles(arch, parts))


def pull_back(dy, weight, scale, sums, A, dropout, dx, tile):  # type: ignore[no-untyped-def]
    """:func:`input_gradient` with a tile."""
    (m, n), k = dy.shape, A.shape[1]
    sums = sums.read_by(triton.cdiv(k, tile.block_n))
    data, width, splits, factor = sums.arguments
    seed, threshold = drop_arguments(dropout, data)
    lora_linear_bwd_dx_kernel_int8[tile.grid(m, k)](
        *(dy, weight, scale, data, A, seed, dx, m, n, k, sums.rank, weight.shape[1], width, splits, threshold, factor),
        *(dy.stride(0), A.stride(0)),
        DROP=dropout is not None,
        PARTS=gradient_parts(dx.dtype, n),
        BLOCK_R=rank_block(sums.rank, TILE_RANK_BLOCK[A.element_size()]),
        **tile.constants,
        **tile.options,
    )


def variants(arch: str) -> Iterator[Variant]:
    """Every tile: forward once, rank blocks and types spread over them, backward in each type."""
    sizes = "M:i32 N:i32 R:i32 base_width:i32 width:i32 factor:fp32"
    for index, tile in enumerate(INT8_GEMM[arch]):
        dtype, rank = spread(index)
        pointers = "q_ptr:*i8 row_scale_ptr:*fp32 weight_ptr:*i8 scale_ptr:*fp32 sums_ptr:*fp32 "
        pointers += f"bias_ptr:{dtype} factor_ptr:{dtype} y_ptr:{dtype}"
        yield of_tile(
            lora_linear_fwd_kernel_int8, tile, f"r{rank}-{dtype[1:]}", f"{pointers} {sizes} stride_fn:i32", "int8",
            stride_fr=1, splits=1, HAS_BIAS=True, EVEN_K=index % 2 == 0, BLOCK_R=rank,
        )  # fmt: skip
    for parts, dtype in GRADIENTS.items():
        for index, tile in enumerate(gradient_tiles(arch, parts)):
            rank, drop = TILE_RANK_BLOCK[4 if parts == 3 else 2], parts == 3 or index != 1
            pointers = f"weight_ptr:*i8 scale_ptr:*fp32 sums_ptr:*fp32 seed_ptr:*i64 dy_ptr:{dtype} factor_ptr:{dtype}"
            pointers += f" dx_ptr:{dtype} {sizes} K:i32 threshold:i32 stride_dym:i32 stride_fr:i32"
            yield of_tile(
                lora_linear_bwd_dx_kernel_int8, tile, f"r{rank}-{dtype[1:]}{'-drop' if drop else ''}", pointers,
                "bf16", splits=1, DROP=drop, PARTS=parts, BLOCK_R=rank,
            )  # fmt: skip


def spread(index: int) -> tuple[str, int]:
    """The operands' type and the rank block of variant ``index``: each type's largest among them."""
    itemsize = (2, 4, 2)[index % 3]
    return pointer_of(itemsize, index), (TILE_RANK_BLOCK[itemsize], TILE_RANK_BLOCK[itemsize], 16)[index % 3]
