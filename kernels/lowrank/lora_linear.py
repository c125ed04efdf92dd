"""lora_linear and its backward in Triton, on a float base; :mod:`lora_linear_int8` has the int8 one.

Forward, in two launches:

1. *down* (:mod:`lowrank_linear_products`) reads x once: the fp32 sums of s = c h A^T, dropout included.
2. A tile goes over the frozen K loop, takes s B^T and the bias, and is rounded and written once: nothing of y's size is
   read or written besides y. The loop begins with zeros, since ptxas waits for each wgmma if sums begin as others.

s costs 2 M K bytes read in 16 bits, and the product 2 M N K operations: at the peaks of an H100's data sheet (3.35
TB/s, 989 TFLOP/s) 295 / N of the product's time where x comes from memory, 7 % at N = 4096, and less by what of x is
still in the 50 MB of L2, where the product then finds it. Adding s B^T to a tile is R / K more operations, and 4 R
bytes a row of s from L2: about 2 % at R = 64 and K = 4096. Taking s from the product's own K loop instead would add R
columns to each tile, 16 / 256 of its operations at R = 16 in the widest, and would draw the mask N / 256 times.

Where no tile makes enough programs, as for small M, :mod:`lora_linear_split` cuts K into splits (:func:`plan`). Tiles
of 64 rows or more run on wgmma and tcgen05; of those of 128, the aligned ones of 16 bits take
:mod:`lora_linear_described`.

Backward: :func:`lowrank_linear.pull`, with dx by the same kernels, t in the place of s. A mask on t A is applied after
the product instead, a slice of columns at a time; it comes from :mod:`common.philox`, again each time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from burnish import dropout as mask
from burnish.kernels.common import target
from burnish.kernels.common.epilogues import store_rows
from burnish.kernels.common.operands import UNITS, matrix, objection, parts_of, pointer_of
from burnish.kernels.common.products import column_slices, float_product
from burnish.kernels.common.tiles import FULL_GEMM, HALF_GEMM, Tile, swizzle
from burnish.kernels.common.variants import Variant
from burnish.kernels.lowrank import lora_linear_described, lora_linear_int8
from burnish.kernels.lowrank.lora_linear_split import MATRIX_ROWS, join, split
from burnish.kernels.lowrank.lowrank_linear import pull
from burnish.kernels.lowrank.lowrank_linear_products import down
from burnish.kernels.lowrank.lowrank_linear_sums import (
    TILE_RANK_BLOCK,
    Dropout,
    Sums,
    add_lowrank,
    drop_arguments,
    lowrank_tile,
    rank_block,
)
from burnish.kernels.quant import int8_linear

#: the code of an int8 base, see burnish.bases
INT8 = 1


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
    y = float_product(
        tl.zeros([BLOCK_M, BLOCK_N], tl.float32), x_ptr + first_m * stride_xm, weight_ptr + first_n * stride_wn,
        M - first_m, N - first_n, K, stride_xm, stride_wk, stride_wn, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K,
    )  # fmt: skip
    if not DROP:
        y = add_lowrank(
            y, sums_ptr, factor_ptr, first_m, first_n, M, N, R, width, splits, factor, stride_fr, stride_fn,
            BLOCK_M, BLOCK_N, BLOCK_R,
        )  # fmt: skip
    slices = column_slices(y, BLOCK_M, BLOCK_N)
    WIDTH: tl.constexpr = slices[0].shape[1]
    for part in tl.static_range(BLOCK_N // WIDTH):
        first, z = first_n + part * WIDTH, slices[part]
        if DROP:  # a mask of all of a thread's accumulators would spill
            z += lowrank_tile(
                sums_ptr, factor_ptr, seed_ptr, first_m, first, M, N, R, width, splits, threshold, factor, stride_fr,
                stride_fn, DROP, BLOCK_M, WIDTH, BLOCK_R,
            )  # fmt: skip
        store_rows(z, bias_ptr, y_ptr + first_m * N, M - first_m, first, N, HAS_BIAS, BLOCK_M, WIDTH)


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
    rows = y.view(x.shape[0], weight.shape[1])
    if parts > 1:
        join(split(x, weight, None, tile, parts)[0], sums, thin, bias, dropout, y)
    elif lora_linear_described.takes(x, weight, rows, tile):
        lora_linear_described.multiply(x, weight, sums, thin, bias, dropout, rows, tile)
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
        BLOCK_R=rank_block(sums.rank, TILE_RANK_BLOCK[x.element_size()]),
        **tile.constants,
        **tile.options,
    )


def variants(arch: str) -> Iterator[Variant]:
    """Every tile in fp32 and one 16-bit type, forward (bias, contiguous depths) and backward (mask, contiguous
    columns); rank blocks and the promise on K are spread over them."""
    index = 0
    for itemsize, table in ((2, HALF_GEMM), (4, FULL_GEMM)):
        ranks = [rank for rank in (16, 32, 64) if rank <= TILE_RANK_BLOCK[itemsize]]
        for tile in table[arch]:
            for back in (False, True):
                yield multiply_variant(
                    tile, ranks[index % len(ranks)], pointer_of(itemsize, index), back, index % 4 < 2
                )
                index += 1


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
