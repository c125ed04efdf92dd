"""lora_linear and its backward in Triton, on a float base; :mod:`lora_linear_int8` has the int8 one.

Forward, in two launches:

1. *down* (:mod:`lowrank_linear_products`) reads x once: the fp32 sums of s = c h A^T, dropout included.
2. A tile's accumulators start as s B^T, go over the frozen K loop, take the bias, and are rounded and written once:
   nothing of y's size is read or written besides y.

s costs 2 M K bytes read in 16 bits, and the product 2 M N K operations: at the peaks of an H100's data sheet (3.35 TB/s,
989 TFLOP/s) 295 / N of the product's time where x comes from memory, 7 % at N = 4096, and less by what of x is still in
the 50 MB of L2, where the product then finds it. R / K more operations and the 4 R bytes a row of s, from L2 once a
column of tiles, stay below 2 % up to R = 64 and K = 4096. Taking s from the product's own K loop instead would add R
columns to each tile, 16 / 256 of its operations at R = 16 in the widest, and would draw the mask N / 256 times.

Where tiles of y are too few for the GPU, as for small M, K is cut into splits (:func:`plan`):

1. *split*: the fp32 sums of the base's product and, as further columns where there is no dropout, of s.
2. *join*: s B^T, the base's splits in order, the bias; y is written once.

W is read once there, which is what such a call costs. Tiles of 64 rows or more run on wgmma and tcgen05.

Backward: :func:`lowrank_linear.pull`, with dx = keep * (t A) + dy W by the same kernels. The mask comes from
:mod:`common.philox`, again each time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from burnish import dropout as mask
from burnish.kernels.common import target
from burnish.kernels.common.products import float_product
from burnish.kernels.common.tiles import FULL_GEMM, HALF_GEMM, Tile, swizzle
from burnish.kernels.common.variants import Variant
from burnish.kernels.lowrank import lora_linear_int8
from burnish.kernels.lowrank.lowrank_linear import pull
from burnish.kernels.lowrank.lowrank_linear_products import down
from burnish.kernels.lowrank.lowrank_linear_sums import (
    MAX_RANK_BLOCK,
    UNITS,
    Dropout,
    Sums,
    drop_arguments,
    lowrank_tile,
    matrix,
    objection,
    parts_of,
    pointer_of,
    rank_block,
    store_rows,
    stored,
)
from burnish.kernels.quant import int8_linear

#: the code of an int8 base, see burnish.bases
INT8 = 1
#: the tile of *join*, which only adds
JOIN = Tile(16, 64, 0, 4, 1)
#: tiles of fewer rows than this multiply neither on wgmma nor on tcgen05
MATRIX_ROWS = 64


@triton.jit
def lora_linear_fwd_kernel(
    x_ptr,  # [M, K]
    weight_ptr,  # [K, N] by its strides
    bias_ptr,  # [N]; not read unless HAS_BIAS
    sums_ptr,  # of s: [splits, M, width]
    factor_ptr,  # [R, N] by its strides
    seed_ptr,  # [1]; not read unless DROP
    y_ptr,  # [M, N]
    M,
    N,
    K,
    R,
    width,
    splits,
    threshold,
    factor,
    stride_xm,
    stride_wk,
    stride_wn,
    stride_fr,
    stride_fn,
    HAS_BIAS: tl.constexpr,
    DROP: tl.constexpr,  # for the backward: keep * (s F) instead of s F
    EVEN_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    tile_m, tile_n = swizzle(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP)
    first_m, first_n = tile_m.to(tl.int64) * BLOCK_M, tile_n.to(tl.int64) * BLOCK_N
    y = lowrank_tile(
        sums_ptr, factor_ptr, seed_ptr, first_m, first_n, M, N, R, width, splits, threshold, factor, stride_fr,
        stride_fn, DROP, BLOCK_M, BLOCK_N, BLOCK_R,
    )  # fmt: skip
    y = float_product(
        y, x_ptr + first_m * stride_xm, weight_ptr + first_n * stride_wn, M - first_m, N - first_n, K,
        stride_xm, stride_wk, stride_wn, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K,
    )  # fmt: skip
    store_rows(y, bias_ptr, y_ptr + first_m * N, M - first_m, first_n, N, HAS_BIAS, BLOCK_M, BLOCK_N)


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


def supports(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    A: torch.Tensor,
    B: torch.Tensor,
    seed: torch.Tensor | None,
    scale: float,
    p: float,
    format: int,
) -> str | None:
    return objection(x, *A.shape, *B.shape) or (int8_linear.supports(x, weight) if format == INT8 else None)


def supports_backward(dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, *rest: Any) -> str | None:
    weight_scale, A, B, seed, scale, p, format, *_ = rest
    return supports(x, weight, weight_scale, None, A, B, seed, scale, p, format)


def lora_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    A: torch.Tensor,
    B: torch.Tensor,
    seed: torch.Tensor | None,
    scale: float,
    p: float,
    format: int,
) -> torch.Tensor:
    rows, A, B = matrix(x), matrix(A), matrix(B)
    y = torch.empty((*x.shape[:-1], B.shape[0]), dtype=x.dtype, device=x.device)
    dropout, factor = Dropout.of(seed, p), scale * mask.factor(p)
    if rows.shape[0]:
        with target.on_device(x):
            if format == INT8:
                assert weight_scale is not None  # checked with the op's other arguments
                lora_linear_int8.forward(rows, weight, weight_scale, bias, down(rows, A.T, factor, dropout), B.T, y)
            else:
                forward(rows, matrix(weight), bias, A, B, dropout, factor, y)
    return y


def lora_linear_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor | None,
    A: torch.Tensor,
    B: torch.Tensor,
    seed: torch.Tensor | None,
    scale: float,
    p: float,
    format: int,
    x_grad: bool,
    factor_grad: bool,
    bias_grad: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    dropout = Dropout.of(seed, p)

    def input_gradient(dy: torch.Tensor, t: Sums, A: torch.Tensor, dx: torch.Tensor) -> None:
        if format == INT8:
            assert weight_scale is not None  # checked with the op's other arguments
            lora_linear_int8.input_gradient(dy, weight, weight_scale, t, A, dropout, dx)
        else:
            over(dy, matrix(weight), t, A, None, dropout, dx)

    return pull(dy, x, A, B, (x_grad, factor_grad, bias_grad), input_gradient, scale * mask.factor(p), dropout)


def forward(x, weight, bias, A, B, dropout, factor, y):  # type: ignore[no-untyped-def]
    """Write y [..., N] = x weight^T + bias + s B^T from x [M, K], M > 0, and weight [N, K]."""
    tile, parts = plan(x, weight.shape[0])
    if parts > 1 and dropout is None:
        base, s = split(x, weight.T, A.T, tile, parts)
        join(base, Sums(s, A.shape[0], factor), B.T, bias, None, y)
    else:
        over(x, weight.T, down(x, A.T, factor, dropout), B.T, bias, None, y)


def over(x, weight, sums, thin, bias, dropout, y):  # type: ignore[no-untyped-def]
    """Write y [..., N] = keep * (s thin) + x weight + bias from x [M, K], weight [K, N] and thin [R, N]; M and N > 0.
    The mask is of y's elements."""
    tile, parts = plan(x, weight.shape[1])
    if parts > 1:
        join(split(x, weight, None, tile, parts)[0], sums, thin, bias, dropout, y)
    else:
        multiply(x, weight, sums, thin, bias, dropout, y, tile)


def plan(x: torch.Tensor, n: int) -> tuple[Tile, int]:
    """The tile of a product x [M, K] @ [K, n], and the splits of K: one where the tiles are enough for seven of eight
    multiprocessors. Where no tile makes enough, it is the smallest of the matrix units'."""
    (m, k), sm_count = x.shape, target.sm_count(x.device)
    tiles = (FULL_GEMM if x.element_size() == 4 else HALF_GEMM)[target.arch(x.device)]
    fitting = [tile for tile in tiles if tile.block_m < 2 * m] or [tiles[-1]]
    fitting = [tile for tile in fitting if tile.block_m >= min(MATRIX_ROWS, fitting[0].block_m)]
    for tile in fitting:
        programs = tile.grid(m, n)[0]
        if 8 * programs >= 7 * sm_count:
            return tile, 1
    return tile, parts_of(triton.cdiv(k, tile.block_k), programs, sm_count)


def multiply(x, weight, sums, thin, bias, dropout, y, tile):  # type: ignore[no-untyped-def]
    """:func:`over` by one kernel."""
    (m, k), n = x.shape, weight.shape[1]
    sums = sums.read_by(triton.cdiv(n, tile.block_n))
    data, width, splits, factor = sums.arguments
    seed, threshold = drop_arguments(dropout, data)
    lora_linear_fwd_kernel[tile.grid(m, n)](
        *(x, weight, data if bias is None else bias.contiguous(), data, thin, seed, y),
        *(m, n, k, sums.rank, width, splits, threshold, factor, x.stride(0), *weight.stride(), *thin.stride()),
        HAS_BIAS=bias is not None,
        DROP=dropout is not None,
        EVEN_K=k % tile.block_k == 0,
        BLOCK_R=rank_block(sums.rank, MAX_RANK_BLOCK[x.element_size()]),
        **tile.constants,
        **tile.options,
    )


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
        BLOCK_R=rank_block(sums.rank, MAX_RANK_BLOCK[thin.element_size()]),
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        **tile.options,
    )


def variants(arch: str) -> Iterator[Variant]:
    """Every tile in fp32 and one 16-bit type, with its split where it may be split, and *join*. Rank blocks, bias, the
    adapter beside the base, the mask and the weight's strides alternate: forward and backward."""
    index = 0
    for itemsize, table in ((2, HALF_GEMM), (4, FULL_GEMM)):
        ranks = [rank for rank in (16, 32, 64) if rank <= MAX_RANK_BLOCK[itemsize]]
        for tile in table[arch]:
            for back in (False, True):
                yield multiply_variant(
                    tile, ranks[index % len(ranks)], pointer_of(itemsize, index), back, index % 4 < 2
                )
                index += 1
            if tile.block_m <= MATRIX_ROWS:
                yield split_variant(tile, pointer_of(itemsize, index), index % 4 < 2)
        for rank in ranks:
            yield join_variant(rank, pointer_of(itemsize, rank // 32), rank == ranks[-1])


def multiply_variant(tile: Tile, rank: int, pointer: str, back: bool, even: bool) -> Variant:
    """``back``: dx = keep * (t A) + dy W, whose factors' columns are contiguous; else the forward, depths are."""
    types = {"sums_ptr": "*fp32", "seed_ptr": "*i64", "factor": "fp32"}
    types |= dict.fromkeys(("x_ptr", "weight_ptr", "bias_ptr", "factor_ptr", "y_ptr"), pointer)
    types |= dict.fromkeys(("M", "N", "K", "R", "width", "threshold", "stride_xm"), "i32")
    one, other = ("n", "k") if back else ("k", "n")
    low_one, low_other = ("n", "r") if back else ("r", "n")
    types |= {f"stride_w{other}": "i32", f"stride_f{low_other}": "i32"}
    constants = {f"stride_w{one}": 1, f"stride_f{low_one}": 1, "splits": 1, "BLOCK_R": rank, **tile.constants}
    constants |= {"HAS_BIAS": not back, "DROP": back, "EVEN_K": even}
    label = f"{tile.name}-r{rank}-{pointer[1:]}-{'dx' if back else 'fwd'}{'-even' if even else ''}"
    return Variant(label, lora_linear_fwd_kernel, types, constants, tile.num_warps, tile.num_stages, UNITS[pointer])


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
