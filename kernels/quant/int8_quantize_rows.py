"""int8_quantize_rows in Triton: amax and quantisation of a row block in one pass where a row fits a block.

Memory-bound: x is read once and q written once when K <= 8192; a longer row is read a second time, from L2. Blocks hold
about 4096 elements, 32 a thread, which keeps a row in registers between the maximum and the rounding.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from burnish.kernels.common import target
from burnish.kernels.common.numerics import magnitude_bits, quantize_int8, row_scale
from burnish.kernels.common.variants import Variant

#: (block_k, rows a program, warps): the first whose block_k holds the row; longer rows loop over the last
BLOCKS = ((128, 16, 4), (512, 8, 4), (1024, 4, 4), (2048, 2, 4), (4096, 1, 4), (8192, 1, 8))
POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}


@triton.jit
def int8_quantize_rows_fwd_kernel(
    x_ptr,  # [M, K]
    q_ptr,  # [M, stride_qm], columns K to stride_qm are zero-filled
    scale_ptr,  # [M]
    M,
    K,
    stride_xm,
    stride_xk,
    stride_qm,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    in_rows = rows < M
    columns = tl.arange(0, BLOCK_K)
    x_rows = x_ptr + rows[:, None] * stride_xm
    q_rows = q_ptr + rows[:, None] * stride_qm

    if ONE_BLOCK:
        inside = in_rows[:, None] & (columns < K)[None, :]
        x = tl.load(x_rows + columns[None, :].to(tl.int64) * stride_xk, mask=inside, other=0.0).to(tl.float32)
        amax, inverse, scale = row_scale(tl.max(magnitude_bits(x), axis=1))
        q = quantize_int8(x, amax[:, None], inverse[:, None])
        tl.store(q_rows + columns[None, :], q, mask=in_rows[:, None] & (columns < stride_qm)[None, :])
    else:
        largest = tl.zeros([BLOCK_M, BLOCK_K], tl.int32)
        for start in range(0, K, BLOCK_K):
            k = start + columns
            x = tl.load(
                x_rows + k[None, :].to(tl.int64) * stride_xk, mask=in_rows[:, None] & (k < K)[None, :], other=0.0
            )
            largest = tl.maximum(largest, magnitude_bits(x.to(tl.float32)))
        amax, inverse, scale = row_scale(tl.max(largest, axis=1))
        for start in range(0, stride_qm, BLOCK_K):
            k = start + columns
            x = tl.load(
                x_rows + k[None, :].to(tl.int64) * stride_xk, mask=in_rows[:, None] & (k < K)[None, :], other=0.0
            )
            q = quantize_int8(x.to(tl.float32), amax[:, None], inverse[:, None])
            tl.store(q_rows + k[None, :], q, mask=in_rows[:, None] & (k < stride_qm)[None, :])
    tl.store(scale_ptr + rows, scale, mask=in_rows)


def supports(x: torch.Tensor) -> str | None:
    return target.objection(x)


def int8_quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    width = x.shape[-1]
    q = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    scale = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    quantize(x.reshape(scale.numel(), width), q, scale, width)
    return q, scale


def quantize(x: torch.Tensor, q: torch.Tensor, scale: torch.Tensor, padded: int) -> None:
    """Write q, with ``padded`` columns that are zero beyond K, and scale, from a matrix x [M, K] of any strides."""
    m, width = x.shape
    if m == 0:
        return
    block_k, block_m, num_warps = block(width)
    with target.on_device(x):
        int8_quantize_rows_fwd_kernel[(triton.cdiv(m, block_m),)](
            *(x, q, scale, m, width, *x.stride(), padded),
            BLOCK_M=block_m,
            BLOCK_K=block_k,
            ONE_BLOCK=padded <= block_k,
            num_warps=num_warps,
            enable_fp_fusion=False,
        )


def block(width: int) -> tuple[int, int, int]:
    """The entry of :data:`BLOCKS` for rows of ``width`` elements."""
    return next((entry for entry in BLOCKS if width <= entry[0]), BLOCKS[-1])


def variants(arch: str) -> Iterator[Variant]:
    """Every block and the loop, with the data types spread over them."""
    dtypes = list(POINTERS.values())
    for index, (block_k, block_m, num_warps) in enumerate((*BLOCKS, BLOCKS[-1])):
        dtype, one_block = dtypes[index % 3], index < len(BLOCKS)
        types = {"x_ptr": dtype, "q_ptr": "*i8", "scale_ptr": "*fp32", "M": "i32", "K": "i32"}
        types |= {"stride_xm": "i32", "stride_qm": "i32"}
        constants = {"stride_xk": 1, "BLOCK_M": block_m, "BLOCK_K": block_k, "ONE_BLOCK": one_block}
        label = f"{block_m}x{block_k}-{dtype[1:]}{'' if one_block else '-loop'}"
        yield Variant(label, int8_quantize_rows_fwd_kernel, types, constants, num_warps)
