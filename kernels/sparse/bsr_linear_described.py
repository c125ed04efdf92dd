"""bsr_linear's product of many rows on sm_90 and sm_100, whose operands come by descriptors; see :mod:`bsr_linear`.

Stripes differ in their numbers of blocks, and the GPU hands tiles to multiprocessors as they become free, so the last
tiles decide how long it waits. Stripes are taken from the longest list to the shortest. A simulation of that, of 32
stripes with 16 of 32 blocks on average, 16 rows of tiles, 132 multiprocessors, and tiles that begin and end in the time
of 1.5 blocks, has 0.88 of the time in products; the stripes' own order has 0.80, and programs that walk the tiles in
steps of their number 0.77.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from burnish.kernels.common.descriptors import (
    ARCHITECTURES,
    GROUP_ROWS,
    MIN_ROWS,
    block_type,
    describable,
    describe,
    described_blocks,
    described_store,
)
from burnish.kernels.common.operands import UNITS, pointer_of
from burnish.kernels.common.products import halves
from burnish.kernels.common.tiles import HALF_GEMM, Tile, narrowed, swizzle
from burnish.kernels.common.variants import Variant

#: block shapes (rows, columns)
BLOCKS = ((128, 128), (64, 64))
#: the most stripes that are sorted: each program finds their order for itself, by comparing all with all
MAX_SORTED = 128


@triton.jit
def longest(crow_ptr, place, stripes, SORTED: tl.constexpr):
    """The stripe at a place when, among each SORTED of them, those with most blocks come first, and of equal ones the
    first."""
    base = place // SORTED * SORTED
    stripe = tl.arange(0, SORTED)
    there, crow_ptr = stripe < stripes - base, crow_ptr + base
    count = tl.load(crow_ptr + stripe + 1, mask=there, other=-1) - tl.load(crow_ptr + stripe, mask=there, other=0)
    earlier = (count[None, :] == count[:, None]) & (stripe[None, :] < stripe[:, None])
    places = tl.sum((earlier | (count[None, :] > count[:, None])).to(tl.int32), axis=1)
    return base + tl.sum(tl.where(places == place - base, stripe, 0), axis=0)


@triton.jit
def bsr_linear_fwd_kernel_described(
    x,  # of [M, K], in blocks [BLOCK_M, BLOCK_K]
    values,  # of [blocks * BLOCK_N, DEPTH], in blocks [BLOCK_N, BLOCK_K]
    y,  # of [M, N], in blocks [BLOCK_M, BLOCK_N / 2]
    crow_ptr,  # [stripes + 1]
    col_ptr,  # [blocks]
    bias_ptr,  # [N]; not read unless HAS_BIAS
    M,
    N,
    stripes,
    HAS_BIAS: tl.constexpr,
    SORTED: tl.constexpr,  # stripes that are sorted, a power of two
    DEPTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,  # a stripe's columns
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    tile_m, place = swizzle(tl.program_id(0), M, stripes, BLOCK_M, 1, GROUP)
    stripe = longest(crow_ptr, place, stripes, SORTED)
    first_m, first_n = tile_m * BLOCK_M, stripe * BLOCK_N
    product = described_blocks(
        tl.zeros([BLOCK_M, BLOCK_N], tl.float32), x, values, col_ptr, tl.load(crow_ptr + stripe),
        tl.load(crow_ptr + stripe + 1), first_m, BLOCK_N, DEPTH, BLOCK_K,
    )  # fmt: skip
    # as a whole in bf16, Triton 3.6 makes code of which ptxas serializes the wgmma
    left, right = halves(product, BLOCK_M, BLOCK_N)
    described_store(left, bias_ptr, y, first_m, first_n, N, HAS_BIAS)
    described_store(right, bias_ptr, y, first_m, first_n + BLOCK_N // 2, N, HAS_BIAS)


def takes(x: torch.Tensor, values: torch.Tensor, y: torch.Tensor, tile: Tile) -> bool:
    """Whether this kernel multiplies x [M, K] and values [blocks, OUT, DEPTH] into y by a tile."""
    fits = values.shape[1:] in BLOCKS and tile.block_n == values.shape[1]
    return fits and describable(tile.block_m, x, values.flatten(0, 1), y)


def forward(x, values, crow_indices, col_indices, bias, y, tile):  # type: ignore[no-untyped-def]
    """:func:`bsr_linear.forward` by this kernel; y is [M, N]."""
    (m, n), stripes = y.shape, crow_indices.shape[0] - 1
    bsr_linear_fwd_kernel_described[(triton.cdiv(m, tile.block_m) * stripes,)](
        describe(x, tile.block_m, tile.block_k),
        describe(values.flatten(0, 1), tile.block_n, tile.block_k),
        describe(y, tile.block_m, tile.block_n // 2),
        *(crow_indices, col_indices, x if bias is None else bias.contiguous(), m, n, stripes),
        HAS_BIAS=bias is not None,
        SORTED=sorted_stripes(stripes),
        DEPTH=values.shape[2],
        **tile.constants | {"GROUP": GROUP_ROWS // tile.block_m},
        **tile.options,
    )


def sorted_stripes(stripes: int) -> int:
    return min(triton.next_power_of_2(stripes), MAX_SORTED)


def variants(arch: str) -> Iterator[Variant]:
    """Every tile of each block shape, a few stripes and many; the types and the bias are spread over them."""
    index = 0
    for out, depth in BLOCKS if arch in ARCHITECTURES else ():
        for tile in narrowed(HALF_GEMM[arch], out):
            for sort in (32, MAX_SORTED) if tile.block_m >= MIN_ROWS else ():
                yield variant(tile, out, depth, pointer_of(2, index), sort, index % 3 == 0)
                index += 1


def variant(tile: Tile, out: int, depth: int, pointer: str, sort: int, bias: bool) -> Variant:
    types = {"x": block_type(pointer, tile.block_m, tile.block_k), "bias_ptr": pointer}
    types |= {"values": block_type(pointer, tile.block_n, tile.block_k)}
    types |= {"y": block_type(pointer, tile.block_m, tile.block_n // 2), "crow_ptr": "*i32", "col_ptr": "*i32"}
    types |= dict.fromkeys(("M", "N", "stripes"), "i32")
    constants = {"HAS_BIAS": bias, "SORTED": sort, "DEPTH": depth, **tile.constants}
    label = f"{out}x{depth}-{tile.name}-{pointer[1:]}{'-bias' * bias}-sorted{sort}"
    return Variant(
        label, bsr_linear_fwd_kernel_described, types, constants | {"GROUP": GROUP_ROWS // tile.block_m},
        tile.num_warps, tile.num_stages, UNITS[pointer], described=True,
    )  # fmt: skip
