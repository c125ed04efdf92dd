"""Products with a weight W [N, K] that is kept in a packed format and expanded tile by tile, in registers.

The format is a function, ``tile(weight, first_n, first_k, ROWS, COLUMNS)``: the dense ROWS x COLUMNS elements of W from
(first_n, first_k) on, zero where there is none; ``weight`` is the tuple of what it reads. Each function here makes one
output tile for a kernel to store.
"""

from dataclasses import replace

import triton
import triton.language as tl
from burnish.kernels.common.products import float_dot, weight_dot
from burnish.kernels.common.tiles import Tile, narrowed

#: columns of the widest tile, weights a thread expands, and stages: more take registers that the sums need
WIDEST, EXPANDED, STAGES = 128, 64, 4


def expanded_tiles(tiles: tuple[Tile, ...]) -> tuple[Tile, ...]:
    """Those of a product that leave registers to expand the weight in."""
    return tuple(
        replace(tile, num_stages=min(tile.num_stages, STAGES))
        for tile in narrowed(tiles, WIDEST)
        if tile.block_n * tile.block_k <= EXPANDED * 32 * tile.num_warps
    )


def narrow(tile: Tile, group: int) -> bool:
    """Whether a tile has fewer words of a byte for each ``group`` weights than threads."""
    return tile.block_n * tile.block_k < 128 * group * tile.num_warps


@triton.jit
def expanded_product(
    tile: tl.constexpr,
    weight,
    x_ptr,  # [M, K], from the tile's first row on
    first_n,
    rows_left,
    K,
    stride_xm,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """x W^T: fp32 of floats, int32 of int8."""
    k = tl.arange(0, BLOCK_K)
    offsets = tl.minimum(tl.arange(0, BLOCK_M), (rows_left - 1).to(tl.int32))[:, None] * stride_xm + k[None, :]
    product = tl.zeros([BLOCK_M, BLOCK_N], tl.int32 if x_ptr.dtype.element_ty == tl.int8 else tl.float32)
    for start in range(0, K, BLOCK_K):
        x = tl.load(x_ptr + start + offsets, mask=(k < K - start)[None, :], other=0)
        # what lies beyond K counts for nothing, NaN too; and Triton 3.9 transposes no tile as it was woven
        w = tl.where((k < K - start)[None, :], tile(weight, first_n, start, BLOCK_N, BLOCK_K), 0)
        product = weight_dot(x, tl.trans(w), product, x_ptr, k, k < K, 0)
    return product


@triton.jit
def expanded_pull(
    tile: tl.constexpr,
    weight,
    scale_ptr,  # [N]; not read unless PARTS
    dy_ptr,  # [M, N], from the tile's first row on
    first_k,
    rows_left,
    N,
    stride_dym,
    PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,  # of K, the output's columns
    BLOCK_K: tl.constexpr,  # of N, which is summed
):
    """dy W, or (dy * scale) W of an int8 W in PARTS parts."""
    n = tl.arange(0, BLOCK_K)
    offsets = tl.minimum(tl.arange(0, BLOCK_M), (rows_left - 1).to(tl.int32))[:, None] * stride_dym + n[None, :]
    product = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, N, BLOCK_K):
        inside = n < N - start
        dy = tl.load(dy_ptr + start + offsets, mask=inside[None, :], other=0.0)
        # always true, and no instruction; but Triton 3.6 multiplies by no tile as it was woven
        w = tl.where(start < N, tile(weight, start, first_k, BLOCK_K, BLOCK_N), 0)
        product = weight_dot(dy, w, product, scale_ptr, start + n, inside, PARTS)
    return product


@triton.jit
def outer_product(
    dy_ptr,  # [M, N], from the part's first row and the tile's first column on
    x_ptr,  # [M, K], likewise
    rows,  # of the part
    rows_left,  # of M, from the part's first row on
    n_left,
    k_left,
    stride_dym,
    stride_xm,
    BLOCK_M: tl.constexpr,  # of N
    BLOCK_N: tl.constexpr,  # of K
    BLOCK_K: tl.constexpr,  # of M, which is summed
):
    """dy^T x of a part of the rows, fp32."""
    m, n, k = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    product = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, rows, BLOCK_K):
        left = (m < rows_left - start)[:, None]
        dy = tl.load(dy_ptr + m[:, None] * stride_dym + n[None, :], mask=left & (n < n_left)[None, :], other=0.0)
        x = tl.load(x_ptr + m[:, None] * stride_xm + k[None, :], mask=left & (k < k_left)[None, :], other=0.0)
        product = float_dot(tl.trans(dy), x, product)
        dy_ptr += stride_dym * tl.full([], BLOCK_K, tl.int64)
        x_ptr += stride_xm * tl.full([], BLOCK_K, tl.int64)
    return product
