"""int8_linear_pack and int8_linear_unpack for the ``rows`` layout in Triton: one kernel copies rows and pads them with
zeros, or cuts the padding off. The ``vnni`` layout is the CPU's and is packed there.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from burnish.kernels.common import target
from burnish.kernels.common.variants import Variant

_BLOCK_ROWS, _BLOCK_COLUMNS = 4, 1024
_ALIGNMENT = 16


@triton.jit
def int8_linear_pack_fwd_kernel(
    source_ptr,  # [N, source_width]
    target_ptr,  # [N, width], columns source_width to width are zero-filled
    N,
    source_width,
    width,
    stride_n,
    stride_k,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    columns = tl.cdiv(width, BLOCK_K)
    pid = tl.program_id(0)
    n = (pid // columns).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = (pid % columns) * BLOCK_K + tl.arange(0, BLOCK_K)
    read = (n < N)[:, None] & (k < source_width)[None, :]
    values = tl.load(source_ptr + n[:, None] * stride_n + k[None, :].to(tl.int64) * stride_k, mask=read, other=0)
    tl.store(target_ptr + n[:, None] * width + k[None, :], values, mask=(n < N)[:, None] & (k < width)[None, :])


def supports_pack(weight: torch.Tensor, layout: str) -> str | None:
    if layout != "rows":
        return f"the {layout} layout is the CPU's, a GPU runs on 'rows'"
    return target.objection(weight)


def supports_unpack(packed: torch.Tensor, N: int, K: int) -> str | None:
    if packed.dtype != torch.int8:
        return "the weight is in the vnni layout, which is the CPU's"
    return target.objection(packed)


def int8_linear_pack(weight: torch.Tensor, layout: str) -> torch.Tensor:
    width = weight.shape[1]
    return _copy(weight, width, triton.cdiv(width, _ALIGNMENT) * _ALIGNMENT)


def int8_linear_unpack(packed: torch.Tensor, N: int, K: int) -> torch.Tensor:
    return _copy(packed, K, K)


def _copy(source: torch.Tensor, source_width: int, width: int) -> torch.Tensor:
    rows = source.shape[0]
    result = torch.empty((rows, width), dtype=torch.int8, device=source.device)
    if result.numel() == 0:
        return result
    grid = (triton.cdiv(rows, _BLOCK_ROWS) * triton.cdiv(width, _BLOCK_COLUMNS),)
    with target.on_device(source):
        int8_linear_pack_fwd_kernel[grid](
            source,
            result,
            rows,
            source_width,
            width,
            source.stride(0),
            source.stride(1),
            BLOCK_N=_BLOCK_ROWS,
            BLOCK_K=_BLOCK_COLUMNS,
            num_warps=4,
            enable_fp_fusion=False,
        )
    return result


def variants(arch: str) -> Iterator[Variant]:
    types = {"source_ptr": "*i8", "target_ptr": "*i8", "N": "i32", "source_width": "i32", "width": "i32"}
    constants = {"stride_k": 1, "BLOCK_N": _BLOCK_ROWS, "BLOCK_K": _BLOCK_COLUMNS}
    yield Variant("rows", int8_linear_pack_fwd_kernel, {**types, "stride_n": "i32"}, constants, num_warps=4)
