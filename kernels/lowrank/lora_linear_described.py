"""lora_linear's product of many rows on sm_90 and sm_100, whose operands come by descriptors; see :mod:`lora_linear`.

As many programs as multiprocessors walk the tiles, so that a tile's stores go on under the next one's first steps. What
a tile needs of s and of the other factor is asked for before its loop over K and multiplied after it, where it is at
most :data:`LATE_RANK` ranks: it arrives while the loop runs. More would fill a thread's registers, and is asked for
after the loop.

Triton 3.6 and 3.9 do not specialise warps here: with eight they ignore the request, with four they fail to split a tile
of two warp groups whose descriptors come from the host. A loop over the steps of all tiles as one (``flatten``) moves
every sum of a thread at each step. Clusters would share what they load, but 3.6 does not compile them, and 3.9 makes no
multicast.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
import triton
import triton.language as tl
from burnish.kernels.common import target
from burnish.kernels.common.descriptors import (
    ARCHITECTURES,
    GROUP_ROWS,
    MIN_ROWS,
    block_type,
    describable,
    describe,
    described_product,
    described_store,
)
from burnish.kernels.common.operands import UNITS, pointer_of
from burnish.kernels.common.products import column_slices, float_dot, halves
from burnish.kernels.common.tiles import HALF_GEMM, Tile, swizzle
from burnish.kernels.common.variants import Variant
from burnish.kernels.lowrank.lowrank_linear_sums import (
    TILE_RANK_BLOCK,
    add_lowrank,
    drop_arguments,
    lowrank_operands,
    lowrank_tile,
    rank_block,
)

#: ranks of which a program keeps its operands while it multiplies something else
LATE_RANK = 32


@triton.jit
def lora_linear_fwd_kernel_described(
    x,  # of [M, K], in blocks [BLOCK_M, BLOCK_K]
    weight,  # of [K, N], in blocks [BLOCK_K, BLOCK_N]; ROWS: of [N, K], in blocks [BLOCK_N, BLOCK_K]
    y,  # of [M, N], in blocks [BLOCK_M, BLOCK_N / SLICES]
    bias_ptr,  # [N]; not read unless HAS_BIAS
    sums_ptr,  # of s: [splits, M, width]
    factor_ptr,  # [R, N] by its strides
    seed_ptr,  # [1]; not read unless DROP
    M,
    N,
    K,
    R,
    width,
    splits,
    threshold,
    factor,
    stride_fr,
    stride_fn,
    ROWS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    DROP: tl.constexpr,  # for the backward: keep * (s F) instead of s F
    LATE: tl.constexpr,  # promises that R is at most BLOCK_R
    SLICES: tl.constexpr,  # 1, 2 or 4
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=False):
        tile_m, tile_n = swizzle(tile, M, N, BLOCK_M, BLOCK_N, GROUP)
        first_m, first_n = tile_m.to(tl.int64) * BLOCK_M, tile_n.to(tl.int64) * BLOCK_N
        if LATE:
            s, thin = lowrank_operands(
                sums_ptr + first_m * width, factor_ptr + first_n * stride_fn, M - first_m, N - first_n, R, M, width,
                splits, factor, stride_fr, stride_fn, BLOCK_M, BLOCK_N, BLOCK_R,
            )  # fmt: skip
        product = described_product(
            tl.zeros([BLOCK_M, BLOCK_N], tl.float32), x, weight, tile_m * BLOCK_M, tile_n * BLOCK_N, K, ROWS, BLOCK_K
        )
        if LATE:
            product = float_dot(s, thin, product)
        elif not DROP:
            product = add_lowrank(
                product, sums_ptr, factor_ptr, first_m, first_n, M, N, R, width, splits, factor, stride_fr, stride_fn,
                BLOCK_M, BLOCK_N, BLOCK_R,
            )  # fmt: skip
        if SLICES == 1:
            slices = (product,)
        elif SLICES == 2:
            slices = halves(product, BLOCK_M, BLOCK_N)
        else:
            slices = column_slices(product, BLOCK_M, BLOCK_N)
        WIDTH: tl.constexpr = BLOCK_N // SLICES
        for part in tl.static_range(SLICES):
            first, z = first_n + part * WIDTH, slices[part]
            if DROP:
                z += lowrank_tile(
                    sums_ptr, factor_ptr, seed_ptr, first_m, first, M, N, R, width, splits, threshold, factor,
                    stride_fr, stride_fn, DROP, BLOCK_M, WIDTH, BLOCK_R,
                )  # fmt: skip
            described_store(z, bias_ptr, y, tile_m * BLOCK_M, tile_n * BLOCK_N + part * WIDTH, N, HAS_BIAS)


def takes(x: torch.Tensor, weight: torch.Tensor, y: torch.Tensor, tile: Tile) -> bool:
    """Whether this kernel multiplies x [M, K] and weight [K, N], one of whose strides is 1, into y by a tile."""
    return describable(tile.block_m, x, _rows(weight)[0], y)


def _rows(weight: torch.Tensor) -> tuple[torch.Tensor, bool]:
    """The weight with its last stride 1, and whether that is its transpose, [N, K]."""
    return (weight.T, True) if weight.stride(0) == 1 else (weight, False)


def launched(tile: Tile, late: bool, block_r: int, dropped: bool) -> tuple[Tile, int]:
    """The tile with as many stages as shared memory has room for beside what is stored and what comes late, and the
    slices it is stored in: a mask of all of a thread's sums would spill."""
    slices = 4 if dropped else 2 if late and block_r > 16 else 1
    return replace(tile, num_stages=5 if tile.block_n == 128 else 4 if dropped else 3), slices


def multiply(x, weight, sums, thin, bias, dropout, y, tile):  # type: ignore[no-untyped-def]
    """:func:`lora_linear.over` by this kernel; y is [M, N]."""
    (m, k), n = x.shape, weight.shape[1]
    sums = sums.read_by(triton.cdiv(n, tile.block_n))
    data, width, splits, factor = sums.arguments
    seed, threshold = drop_arguments(dropout, data)
    weight, rows = _rows(weight)
    block_r = rank_block(sums.rank, TILE_RANK_BLOCK[2])
    late = dropout is None and sums.rank <= LATE_RANK
    tile, slices = launched(tile, late, block_r, dropout is not None)
    programs = min(tile.grid(m, n)[0], target.sm_count(x.device))
    lora_linear_fwd_kernel_described[(programs,)](
        describe(x, tile.block_m, tile.block_k),
        describe(weight, *((tile.block_n, tile.block_k) if rows else (tile.block_k, tile.block_n))),
        describe(y, tile.block_m, tile.block_n // slices),
        *(data if bias is None else bias.contiguous(), data, thin, seed),
        *(m, n, k, sums.rank, width, splits, threshold, factor, *thin.stride()),
        ROWS=rows,
        HAS_BIAS=bias is not None,
        DROP=dropout is not None,
        LATE=late,
        SLICES=slices,
        BLOCK_R=block_r,
        **tile.constants | {"GROUP": GROUP_ROWS // tile.block_m},
        **tile.options,
    )


def variants(arch: str) -> Iterator[Variant]:
    """Every tile: forward with a bias and without, dx with a mask and without; ranks are spread over them."""
    ranks = (16, 32, 64)
    for index, tile in enumerate(tile for tile in HALF_GEMM[arch] if tile.block_m >= MIN_ROWS):
        if arch in ARCHITECTURES:
            for rank in ranks:
                yield variant(tile, rank, pointer_of(2, index), True, rank == 32, False)
            for rank, drop in ((16, False), (16 << index, True)):
                yield variant(tile, rank, pointer_of(2, index + 1), False, False, drop)


def variant(tile: Tile, rank: int, pointer: str, rows: bool, bias: bool, drop: bool) -> Variant:
    late = rank <= LATE_RANK and not drop
    tile, slices = launched(tile, late, rank, drop)
    weight = (tile.block_n, tile.block_k) if rows else (tile.block_k, tile.block_n)
    types = {"x": block_type(pointer, tile.block_m, tile.block_k), "weight": block_type(pointer, *weight)}
    types |= {
        "y": block_type(pointer, tile.block_m, tile.block_n // slices),
        "bias_ptr": pointer,
        "factor_ptr": pointer,
    }
    types |= {"sums_ptr": "*fp32", "seed_ptr": "*i64", "factor": "fp32", "stride_fn" if rows else "stride_fr": "i32"}
    types |= dict.fromkeys(("M", "N", "K", "R", "width", "threshold"), "i32")
    constants = {"splits": 1, "stride_fr" if rows else "stride_fn": 1, "ROWS": rows, "HAS_BIAS": bias, "DROP": drop}
    constants |= {"LATE": late, "SLICES": slices, "BLOCK_R": rank, **tile.constants}
    constants["GROUP"] = GROUP_ROWS // tile.block_m
    label = f"{tile.name}-r{rank}-{pointer[1:]}-{'fwd' if rows else 'dx'}{'-bias' * bias}{'-drop' * drop}"
    return Variant(
        label, lora_linear_fwd_kernel_described, types, constants, tile.num_warps, tile.num_stages, UNITS[pointer],
        described=True,
    )  # fmt: skip
