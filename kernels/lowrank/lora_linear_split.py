"""lora_linear's products where tiles of y are too few for the GPU, as for small M: K is cut into splits.

- *split*: the fp32 sums of the base's product and, as further columns of one launch, of s where nothing is dropped.
- *join*: s B^T, the base's splits in order, the bias; y is rounded and written once.

What such a call costs is W, which is read once. The sums are 8 M N bytes a split, written and read, in L2.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from burnish.kernels.common.epilogues import store_rows
from burnish.kernels.common.operands import UNITS, pointer_of
from burnish.kernels.common.products import float_product
from burnish.kernels.common.tiles import FULL_GEMM, HALF_GEMM, Tile
from burnish.kernels.common.variants import Variant
from burnish.kernels.lowrank.lowrank_linear_sums import (
    TILE_RANK_BLOCK,
    drop_arguments,
    lowrank_tile,
    rank_block,
    stored,
)

#: tiles of fewer rows than this multiply neither on wgmma nor on tcgen05; larger ones are not split
MATRIX_ROWS = 64
#: the tile of *join*, which only adds
JOIN = Tile(16, 64, 0, 4, 1)


@triton.jit
def lora_linear_fwd_kernel_split(
    x_ptr,  # [M, K]
    weight_ptr,  # [K, N] by its strides
    adapter_ptr,  # [K, R], stride_wk down; not read unless ADAPTER
    sums_ptr,  # fp32 [K / depth, M, width]: of x weight, then, from column ``aside`` on, of x adapter
    M,
    N,
    K,
    R,
    width,
    aside,
    depth,  # of a split, a multiple of BLOCK_K
    stride_xm,
    stride_wk,
    stride_wn,
    stride_ar,
    ADAPTER: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tile_n, split = tl.program_id(0), tl.program_id(2).to(tl.int64)
    first_m, first_k = tl.program_id(1).to(tl.int64) * BLOCK_M, split * depth
    sums_ptr += (split * M + first_m) * width
    if ADAPTER:
        tiles = tl.cdiv(N, BLOCK_N)
        beyond = tile_n >= tiles
        weight_ptr, stride_wn = tl.where(beyond, adapter_ptr, weight_ptr), tl.where(beyond, stride_ar, stride_wn)
        N, sums_ptr = tl.where(beyond, R, N), tl.where(beyond, sums_ptr + aside, sums_ptr)
        tile_n -= tl.where(beyond, tiles, 0)
    first_n = tile_n.to(tl.int64) * BLOCK_N
    sums = float_product(
        tl.zeros([BLOCK_M, BLOCK_N], tl.float32), x_ptr + first_m * stride_xm + first_k,
        weight_ptr + first_k * stride_wk + first_n * stride_wn, M - first_m, N - first_n,
        tl.minimum(K - first_k, depth).to(tl.int32), stride_xm, stride_wk, stride_wn, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K,
    )  # fmt: skip
    m, n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    inside = (m < M - first_m)[:, None] & (n < N - first_n)[None, :]
    tl.store(sums_ptr + first_n + m[:, None] * width + n[None, :], sums, mask=inside)


@triton.jit
def lora_linear_fwd_kernel_join(
    base_ptr,  # [base_splits, M, base_width]
    bias_ptr,  # [N]; not read unless HAS_BIAS
    sums_ptr,  # of s: [splits, M, width]
    factor_ptr,  # [R, N] by its strides
    seed_ptr,  # [1]; not read unless DROP
    y_ptr,  # [M, N]
    M,
    N,
    R,
    base_width,
    base_splits,
    width,
    splits,
    threshold,
    factor,
    stride_fr,
    stride_fn,
    HAS_BIAS: tl.constexpr,
    DROP: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    first_m, first_n = tl.program_id(1).to(tl.int64) * BLOCK_M, tl.program_id(0).to(tl.int64) * BLOCK_N
    y = lowrank_tile(
        sums_ptr, factor_ptr, seed_ptr, first_m, first_n, M, N, R, width, splits, threshold, factor, stride_fr,
        stride_fn, DROP, BLOCK_M, BLOCK_N, BLOCK_R,
    )  # fmt: skip
    y += stored(
        base_ptr + first_m * base_width + first_n, M - first_m, N - first_n, M, base_width, base_splits, 1.0,
        tl.float32, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    store_rows(y, bias_ptr, y_ptr + first_m * N, M - first_m, first_n, N, HAS_BIAS, BLOCK_M, BLOCK_N)


def split(x, weight, adapter, tile, parts):  # type: ignore[no-untyped-def]
    """fp32 [splits, M, N] and [splits, M, R]: the sums of x [M, K] @ weight [K, N] and, unless None, @ adapter [K, R],
    whose stride of K is the weight's."""
    (m, k), n = x.shape, weight.shape[1]
    rank = 0 if adapter is None else adapter.shape[1]
    depth = triton.cdiv(triton.cdiv(k, tile.block_k), parts) * tile.block_k
    aside, splits = triton.cdiv(n, 16) * 16, triton.cdiv(k, depth)
    width = aside + triton.cdiv(rank, 16) * 16
    data = torch.empty((splits, m, width), dtype=torch.float32, device=x.device)
    columns = triton.cdiv(n, tile.block_n) + triton.cdiv(rank, tile.block_n)
    lora_linear_fwd_kernel_split[(columns, triton.cdiv(m, tile.block_m), splits)](
        *(x, weight, weight if adapter is None else adapter, data, m, n, k, rank, width, aside, depth),
        *(x.stride(0), *weight.stride(), 1 if adapter is None else adapter.stride(1)),
        ADAPTER=adapter is not None,
        EVEN_K=k % tile.block_k == 0,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        **tile.options,
    )
    return data[..., :n], data[..., aside : aside + rank]


def join(base, sums, thin, bias, dropout, y):  # type: ignore[no-untyped-def]
    """Write y [..., N] from the base's sums [splits, M, N], the rest as :func:`over`."""
    splits, m, n = base.shape
    tile = JOIN
    data, width, low_splits, factor = sums.arguments
    seed, threshold = drop_arguments(dropout, data)
    lora_linear_fwd_kernel_join[(triton.cdiv(n, tile.block_n), triton.cdiv(m, tile.block_m))](
        *(base, data if bias is None else bias.contiguous(), data, thin, seed, y),
        *(m, n, sums.rank, base.stride(1), splits, width, low_splits, threshold, factor, *thin.stride()),
        HAS_BIAS=bias is not None,
        DROP=dropout is not None,
        BLOCK_R=rank_block(sums.rank, TILE_RANK_BLOCK[thin.element_size()]),
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        **tile.options,
    )


def variants(arch: str) -> Iterator[Variant]:
    """Every tile that is split, in fp32 and one 16-bit type, and *join* with every rank block; the adapter beside the
    base alternates, as the weight's strides do."""
    for itemsize, table in ((2, HALF_GEMM), (4, FULL_GEMM)):
        for index, tile in enumerate(tile for tile in table[arch] if tile.block_m <= MATRIX_ROWS):
            yield split_variant(tile, pointer_of(itemsize, index), index % 2 == 0)
        for rank in (16, 32, 64):
            if rank <= TILE_RANK_BLOCK[itemsize]:
                yield join_variant(rank, pointer_of(itemsize, rank // 32), rank != 32)


def split_variant(tile: Tile, pointer: str, adapter: bool) -> Variant:
    types = dict.fromkeys(("x_ptr", "weight_ptr", "adapter_ptr"), pointer) | {"sums_ptr": "*fp32"}
    types |= dict.fromkeys(("M", "N", "K", "R", "width", "aside", "depth", "stride_xm", "stride_ar"), "i32")
    one, other = ("stride_wk", "stride_wn") if adapter else ("stride_wn", "stride_wk")
    constants = {one: 1, "ADAPTER": adapter, "EVEN_K": adapter, **tile.constants}
    del constants["GROUP"]
    label = f"{tile.name}-{pointer[1:]}{'-adapter' if adapter else ''}"
    return Variant(
        label, lora_linear_fwd_kernel_split, types | {other: "i32"}, constants, tile.num_warps, tile.num_stages,
        UNITS[pointer],
    )  # fmt: skip


def join_variant(rank: int, pointer: str, drop: bool) -> Variant:
    types = {"base_ptr": "*fp32", "sums_ptr": "*fp32", "seed_ptr": "*i64", "factor": "fp32"}
    types |= dict.fromkeys(("bias_ptr", "factor_ptr", "y_ptr"), pointer)
    sizes = ("M", "N", "R", "base_width", "base_splits", "width", "splits", "threshold", "stride_fn")
    constants = {"stride_fr": 1, "HAS_BIAS": not drop, "DROP": drop, "BLOCK_R": rank}
    constants |= {"BLOCK_M": JOIN.block_m, "BLOCK_N": JOIN.block_n}
    return Variant(
        f"r{rank}-{pointer[1:]}", lora_linear_fwd_kernel_join, types | dict.fromkeys(sizes, "i32"), constants,
        JOIN.num_warps, JOIN.num_stages, UNITS[pointer],
    )  # fmt: skip
