"""int8_linear and its backward in Triton: int8 tensor-core product with the whole epilogue fused.

Two forward paths, the same bits from both:

- *split*: :mod:`int8_quantize_rows` writes q [M, round_up(K, 16)] once, then a pipelined GEMM reads it.
- *fused*: every program finds the row scales of its panel of x and quantises it on the way into the product. No q, one
  launch; but each of the ``N / block_n`` column programs reads its panel of x twice.

:func:`fuses` decides by bytes: the fused path's repeated reads of x come from L2, and win where they are fewer than the
split path's bytes plus what L2 delivers during one launch. That is small M, and a small K as far as N is narrow.

Weights are the ``rows`` layout: K padded to 16 bytes with zeros, so every load of weights and q is a 16-byte one.

Backward: ``dx = (dz * scale) @ w`` on bf16 tensor cores. An int8 weight is exact in bf16, and ``v = dz * scale``, which
is fp32, is split into parts of 8 bits each (:func:`products.split_dot`). A bf16 gradient rounds v to bf16: one part.
fp16 and fp32 gradients keep v. Three parts hold all 24 bits. Two leave at most 2**-16 |v|, which the element-wise bound
2 (N + 2) 2**-23 sum |v||w| covers, with the fp32 summation, from N = 83 on: two parts serve fp16 gradients with
N >= 128, three the rest. An fp32 ("ieee") product would be 15 times the tensor-core work of one part on an H100.
With an activation, z is recomputed by the forward's GEMM, which then writes dz in fp32 instead of y. dbias sums dz in a
fixed order, in fp32.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from burnish.kernels.common import target
from burnish.kernels.common.epilogues import preactivation
from burnish.kernels.common.numerics import activate, activation_slope, magnitude_bits, quantize_int8, row_scale
from burnish.kernels.common.products import column_slices, int8_product, scaled_product
from burnish.kernels.common.tiles import INT8_GEMM, LAUNCH_BYTES, Tile, pick, split_tiles, swizzle
from burnish.kernels.common.variants import Variant, of_tile
from burnish.kernels.quant.int8_quantize_rows import POINTERS, quantize

#: the fused path keeps a block of x and its running maxima in registers, so its tiles have few rows
FUSED_MAX_ROWS = 32
#: from this N on two bf16 parts are enough for an fp16 gradient; see above
TWO_PARTS_MIN_N = 128
#: a gradient of each number of parts, in Triton's notation
GRADIENTS = {1: "*bf16", 2: "*fp16", 3: "*fp32"}
#: the widest tile whose accumulators leave registers for an activation's slope
SLOPE_MAX_COLUMNS = 128
#: rows and columns a program of the column sum covers, and rows it loads at once
SUM_ROWS, SUM_COLUMNS, SUM_STEP = 256, 128, 32


@triton.jit
def int8_linear_fwd_kernel(
    q_ptr,  # [M, width]
    row_scale_ptr,  # [M]
    weight_ptr,  # [N, width]
    scale_ptr,  # [N]
    bias_ptr,  # [N]; not read unless HAS_BIAS
    dy_ptr,  # [M, N]; not read unless SLOPE
    y_ptr,  # [M, N]
    M,
    N,
    width,
    stride_dym,
    stride_dyn,
    ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SLOPE: tl.constexpr,  # for the backward: y = dy * act'(z) instead of act(z)
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    tile_m, tile_n = swizzle(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP)
    first_m = tile_m.to(tl.int64) * BLOCK_M
    first_n = tile_n.to(tl.int64) * BLOCK_N
    q_ptr += first_m * width
    weight_ptr += first_n * width
    product = int8_product(q_ptr, weight_ptr, M - first_m, N - first_n, width, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K)
    m = first_m + tl.arange(0, BLOCK_M)
    row_scales = tl.load(row_scale_ptr + m, mask=m < M, other=0.0)
    slices = column_slices(product, BLOCK_M, BLOCK_N)
    WIDTH: tl.constexpr = slices[0].shape[1]
    for part in tl.static_range(BLOCK_N // WIDTH):
        n = first_n + part * WIDTH + tl.arange(0, WIDTH)
        inside = (m < M)[:, None] & (n < N)[None, :]
        z = preactivation(slices[part], row_scales, scale_ptr, bias_ptr, n, N, HAS_BIAS)
        if SLOPE:
            dy = tl.load(dy_ptr + m[:, None] * stride_dym + n[None, :] * stride_dyn, mask=inside, other=0.0)
            y = dy.to(tl.float32) * activation_slope(z, ACTIVATION)
        else:
            y = activate(z, ACTIVATION).to(y_ptr.dtype.element_ty)
        tl.store(y_ptr + m[:, None] * N + n[None, :], y, mask=inside)


@triton.jit
def int8_linear_fwd_kernel_fused(
    x_ptr,  # [M, K]
    weight_ptr,  # [N, width]
    scale_ptr,  # [N]
    bias_ptr,  # [N]; not read unless HAS_BIAS
    y_ptr,  # [M, N]
    M,
    N,
    K,
    width,
    stride_xm,
    stride_xk,
    ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    tile_m, tile_n = swizzle(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP)
    m = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_rows = (m < M)[:, None]
    k = tl.arange(0, BLOCK_K)
    x_block = x_ptr + m[:, None] * stride_xm + k[None, :].to(tl.int64) * stride_xk
    step = stride_xk * tl.full([], BLOCK_K, tl.int64)

    largest = tl.zeros([BLOCK_M, BLOCK_K], tl.int32)
    x_pass = x_block
    for start in range(0, K, BLOCK_K):
        x = tl.load(x_pass, mask=in_rows & (k < K - start)[None, :], other=0.0)
        largest = tl.maximum(largest, magnitude_bits(x.to(tl.float32)))
        x_pass += step
    amax, inverse, row_scales = row_scale(tl.max(largest, axis=1))

    weight_ptr += tile_n.to(tl.int64) * BLOCK_N * width
    weight_offsets = tl.minimum(tl.arange(0, BLOCK_N), N - tile_n * BLOCK_N - 1)[None, :] * width + k[:, None]
    product = tl.zeros([BLOCK_M, BLOCK_N], tl.int32)
    for start in range(0, K, BLOCK_K):
        weight = tl.load(weight_ptr + start + weight_offsets, mask=(k < width - start)[:, None], other=0)
        x = tl.load(x_block, mask=in_rows & (k < K - start)[None, :], other=0.0)
        q = quantize_int8(x.to(tl.float32), amax[:, None], inverse[:, None])
        product = tl.dot(q, weight, product, out_dtype=tl.int32)
        x_block += step
    z = preactivation(product, row_scales, scale_ptr, bias_ptr, n, N, HAS_BIAS)
    y = activate(z, ACTIVATION).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + m[:, None] * N + n[None, :], y, mask=in_rows & (n < N)[None, :])


@triton.jit
def int8_linear_bwd_dx_kernel(
    dz_ptr,  # [M, N]
    weight_ptr,  # [N, width]
    scale_ptr,  # [N]
    dx_ptr,  # [M, K]
    M,
    N,
    K,
    width,
    stride_dzm,
    stride_dzn,
    PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,  # of K, the output's columns
    BLOCK_K: tl.constexpr,  # of N, which is summed
    GROUP: tl.constexpr,
):
    tile_m, tile_k = swizzle(tl.program_id(0), M, K, BLOCK_M, BLOCK_N, GROUP)
    rows = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tile_k * BLOCK_N + tl.arange(0, BLOCK_N)
    dx = scaled_product(
        tl.zeros([BLOCK_M, BLOCK_N], tl.float32), dz_ptr, weight_ptr, scale_ptr, rows, columns, M, N, width,
        stride_dzm, stride_dzn, PARTS, BLOCK_K,
    )  # fmt: skip
    dx_block = dx_ptr + rows[:, None] * K + columns[None, :]
    tl.store(dx_block, dx.to(dx_ptr.dtype.element_ty), mask=(rows < M)[:, None] & (columns < K)[None, :])


@triton.jit
def int8_linear_bwd_kernel_dbias(
    dz_ptr,  # [M, N]
    sums_ptr,  # [M / ROWS, N]
    M,
    N,
    stride_dzm,
    stride_dzn,
    ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    part = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float64)  # 256 additions, rounded once
    for start in range(0, ROWS, BLOCK_M):
        rows = part * ROWS + start + tl.arange(0, BLOCK_M)
        inside = (rows < M)[:, None] & (columns < N)[None, :]
        dz_block = dz_ptr + rows[:, None] * stride_dzm + columns[None, :] * stride_dzn
        total += tl.load(dz_block, mask=inside, other=0.0).to(tl.float64)
    tl.store(sums_ptr + part * N + columns, tl.sum(total, axis=0).to(tl.float32), mask=columns < N)


def supports(x: torch.Tensor, weight: torch.Tensor, *rest: Any) -> str | None:
    if weight.dtype != torch.int8:
        return "the weight is in the vnni layout, the kernel takes rows"
    return target.objection(x)


def supports_backward(dy: torch.Tensor, x: torch.Tensor | None, weight: torch.Tensor, *rest: Any) -> str | None:
    return supports(dy, weight)


def int8_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    activation: int,
    out_dtype: torch.dtype | None,
) -> torch.Tensor:
    rows = _matrix(x)
    m, n = rows.shape[0], scale.shape[0]
    y = torch.empty((*x.shape[:-1], n), dtype=out_dtype or x.dtype, device=x.device)
    if m:
        tile = pick(INT8_GEMM[target.arch(x.device)], m, n, target.sm_count(x.device))
        forward = forward_fused if fuses(m, n, x.shape[-1], x.element_size(), tile) else forward_split
        with target.on_device(x):
            forward(rows, weight, scale.contiguous(), bias, activation, y, tile)
    return y


def fuses(m: int, n: int, k: int, itemsize: int, tile: Tile) -> bool:
    """Whether the fused path moves fewer bytes than the split one, a launch counted as :data:`LAUNCH_BYTES`."""
    columns = triton.cdiv(n, tile.block_n)
    fused = 2 * itemsize * m * k * columns
    split = (itemsize + 1) * m * k + m * k * columns + LAUNCH_BYTES
    return tile.block_m <= FUSED_MAX_ROWS and fused <= split


def forward_fused(x, weight, scale, bias, activation, y, tile):  # type: ignore[no-untyped-def]
    """Write y [..., N] from x [M, K], M > 0, by one kernel."""
    (m, k), (n, width) = x.shape, weight.shape
    int8_linear_fwd_kernel_fused[tile.grid(m, n)](
        *(x, weight, scale, _or(bias, scale), y, m, n, k, width, *x.stride()),
        ACTIVATION=activation,
        HAS_BIAS=bias is not None,
        **tile.constants,
        **tile.options,
    )


def forward_split(x, weight, scale, bias, activation, y, tile, dy=None):  # type: ignore[no-untyped-def]
    """Write y [..., N] from x [M, K], M > 0, by two kernels; with ``dy``, write dy * act'(z)."""
    m, (n, width) = x.shape[0], weight.shape
    q = torch.empty((m, width), dtype=torch.int8, device=x.device)
    row_scales = torch.empty(m, dtype=torch.float32, device=x.device)
    quantize(x, q, row_scales, width)
    int8_linear_fwd_kernel[tile.grid(m, n)](
        *(q, row_scales, weight, scale, _or(bias, scale), y if dy is None else dy, y, m, n, width),
        *((n, 1) if dy is None else dy.stride()),
        ACTIVATION=activation,
        HAS_BIAS=bias is not None,
        SLOPE=dy is not None,
        EVEN_K=width % tile.block_k == 0,
        **tile.constants,
        **tile.options,
    )


def int8_linear_backward(
    dy: torch.Tensor,
    x: torch.Tensor | None,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    K: int,
    activation: int,
    bias_grad: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    dz = _matrix(dy)
    m, n = dz.shape
    dx = torch.empty((*dy.shape[:-1], K), dtype=dy.dtype, device=dy.device)
    arch, sm_count, scale = target.arch(dy.device), target.sm_count(dy.device), scale.contiguous()
    with target.on_device(dy):
        if activation and m:
            assert x is not None  # checked with the op's other arguments
            slopes = torch.empty((m, n), dtype=torch.float32, device=dy.device)
            tile = pick(slope_tiles(arch), m, n, sm_count)
            forward_split(_matrix(x), weight, scale, bias, activation, slopes, tile, dz)
            dz = slopes
        if m and K:
            tiles = split_tiles(arch, gradient_parts(dx.dtype, n))
            input_gradient(dz, weight, scale, dx, pick(tiles, m, K, sm_count))
        dbias = column_sums(dz) if bias_grad else torch.empty(0, dtype=torch.float32, device=dy.device)
    return dx, dbias


def slope_tiles(arch: str) -> tuple[Tile, ...]:
    return tuple(tile for tile in INT8_GEMM[arch] if tile.block_n <= SLOPE_MAX_COLUMNS)


def input_gradient(dz: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, dx: torch.Tensor, tile: Tile) -> None:
    """Write dx [..., K] = (dz * scale) @ weight, M and K > 0."""
    (m, n), k = dz.shape, dx.shape[-1]
    int8_linear_bwd_dx_kernel[tile.grid(m, k)](
        *(dz, weight, scale, dx, m, n, k, weight.shape[1], *dz.stride()),
        PARTS=gradient_parts(dx.dtype, n),
        **tile.constants,
        **tile.options,
    )


def gradient_parts(dtype: torch.dtype, n: int) -> int:
    """How many bf16 parts of dz * scale a gradient of this dtype needs, summed over n."""
    if dtype == torch.bfloat16:
        return 1
    return 2 if dtype == torch.float16 and n >= TWO_PARTS_MIN_N else 3


def column_sums(dz: torch.Tensor) -> torch.Tensor:
    """fp32 [N] sums over the rows of dz [M, N], in an order that depends on M alone."""
    n = dz.shape[1]
    if dz.shape[0] == 0:
        return torch.zeros(n, dtype=torch.float32, device=dz.device)
    while True:
        m = dz.shape[0]
        parts = triton.cdiv(m, SUM_ROWS)
        sums = torch.empty((parts, n) if parts > 1 else n, dtype=torch.float32, device=dz.device)
        int8_linear_bwd_kernel_dbias[(parts, triton.cdiv(n, SUM_COLUMNS))](
            *(dz, sums, m, n, *dz.stride()),
            ROWS=SUM_ROWS,
            BLOCK_M=SUM_STEP,
            BLOCK_N=SUM_COLUMNS,
            num_warps=4,
            enable_fp_fusion=False,
        )
        if parts == 1:
            return sums
        dz = sums


def _matrix(x: torch.Tensor) -> torch.Tensor:
    """x as [rows, last dimension], a view where strides allow; the last dimension may be 0, where -1 is ambiguous."""
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])


def _or(bias: torch.Tensor | None, scale: torch.Tensor) -> torch.Tensor:
    """A pointer for the bias argument, which the kernel does not read without a bias."""
    return scale if bias is None else bias.contiguous()


def variants(arch: str) -> Iterator[Variant]:
    """Every tile of this architecture, with data types, activations and depths spread over the tiles."""
    types = list(POINTERS.values())
    operands, sizes = "q_ptr:*i8 row_scale_ptr:*fp32 weight_ptr:*i8 scale_ptr:*fp32", "M:i32 N:i32 width:i32"
    forward = {"kernel": int8_linear_fwd_kernel, "unit": "int8", "stride_dyn": 1, "HAS_BIAS": True}
    for index, tile in enumerate(INT8_GEMM[arch]):
        for activation in range(5) if index == 0 else (1 + index % 4,):
            dtype, even = types[(index + activation) % 3], activation % 2 == 0
            pointers = f"{operands} bias_ptr:{dtype} dy_ptr:{dtype} y_ptr:{dtype} {sizes} stride_dym:i32"
            label = f"{dtype[1:]}-act{activation}"
            plain = {"ACTIVATION": activation, "SLOPE": False, "EVEN_K": even}
            yield of_tile(**forward, tile=tile, label=label, types=pointers, **plain)
            if activation and tile in slope_tiles(arch):
                pointers = f"{operands} bias_ptr:{dtype} dy_ptr:{dtype} y_ptr:*fp32 {sizes} stride_dym:i32"
                slope = {"ACTIVATION": activation, "SLOPE": True, "EVEN_K": not even}
                yield of_tile(**forward, tile=tile, label=f"{label}-slope", types=pointers, **slope)
    for index, tile in enumerate(tile for tile in INT8_GEMM[arch] if tile.block_m <= FUSED_MAX_ROWS):
        for dtype in types:
            pointers = f"x_ptr:{dtype} weight_ptr:*i8 scale_ptr:*fp32 bias_ptr:{dtype} y_ptr:{dtype} {sizes} K:i32"
            yield of_tile(
                int8_linear_fwd_kernel_fused, tile, f"{dtype[1:]}-act{index + 2}", f"{pointers} stride_xm:i32",
                "int8", stride_xk=1, ACTIVATION=index + 2, HAS_BIAS=True,
            )  # fmt: skip
    for parts, dx in GRADIENTS.items():
        dz = "*bf16" if parts == 1 else "*fp32"  # the latter of an activation
        for tile in split_tiles(arch, parts):
            pointers = f"dz_ptr:{dz} weight_ptr:*i8 scale_ptr:*fp32 dx_ptr:{dx} {sizes} K:i32 stride_dzm:i32"
            label = f"{dz[1:]}-{dx[1:]}-parts{parts}"
            yield of_tile(int8_linear_bwd_dx_kernel, tile, label, pointers, "bf16", stride_dzn=1, PARTS=parts)
    blocks = {"stride_dzn": 1, "ROWS": SUM_ROWS, "BLOCK_M": SUM_STEP, "BLOCK_N": SUM_COLUMNS}
    for dtype in types:
        pointers = {"dz_ptr": dtype, "sums_ptr": "*fp32", "M": "i32", "N": "i32", "stride_dzm": "i32"}
        yield Variant(dtype[1:], int8_linear_bwd_kernel_dbias, pointers, blocks, num_warps=4)
