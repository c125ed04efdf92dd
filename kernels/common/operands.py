"""Operands of the products as the kernels take them, and how many parts a sum is cut into.

Matrices come with a last stride of 1 and rows at most :data:`MAX_WIDTH` elements apart (:func:`matrix` copies what is
not), so offsets within a tile fit 32 bits.
"""

from __future__ import annotations

import torch
import triton
from burnish.kernels.common import target
from burnish.kernels.common.variants import Unit

UNITS: dict[str, Unit] = {"*fp32": "bf16", "*bf16": "bf16", "*fp16": "fp16"}
#: the widest rows whose offsets in a tile of 256 fit 32 bits, with a bit to spare
MAX_WIDTH = 1 << 22
#: the most parts that anything is summed in
MAX_PARTS = 32


def objection(x: torch.Tensor, *widths: int) -> str | None:
    """Why kernels that index rows of :data:`MAX_WIDTH` cannot run on x's device or these widths."""
    if max(widths) > MAX_WIDTH:
        return f"a row has {max(widths)} elements, the kernels index {MAX_WIDTH}"
    return target.objection(x)


def matrix(x: torch.Tensor) -> torch.Tensor:
    """x [..., K] as [rows, K] with a last stride of 1 and rows within reach; a view where strides allow."""
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    return rows if rows.stride(1) == 1 and rows.stride(0) <= MAX_WIDTH else rows.contiguous()


def pointer_of(itemsize: int, index: int) -> str:
    """The operands' type in variant ``index``: the 16-bit types, whose code is alike, alternate."""
    return "*fp32" if itemsize == 4 else ("*bf16", "*fp16")[index % 2]


def parts_of(steps: int, programs: int, sm_count: int) -> int:
    """How many parts of a sum of ``steps`` steps fill the GPU, where one part makes ``programs`` programs."""
    if programs >= sm_count:
        return 1
    return max(1, min(triton.cdiv(2 * sm_count, programs), steps // 2, MAX_PARTS))


def row_parts(m: int, block: int, programs: int, sm_count: int) -> tuple[int, int]:
    """How many of ``m`` rows, a multiple of ``block``, a part of a sum over them has, and how many parts there are."""
    steps = max(triton.cdiv(m, block), 1)
    rows = triton.cdiv(steps, parts_of(steps, programs, sm_count)) * block
    return rows, max(triton.cdiv(m, rows), 1)


def parts_like(whole: torch.Tensor | None, parts: int) -> torch.Tensor | None:
    """fp32 [parts, *whole.shape]; one part is the result itself."""
    if whole is None or parts == 1:
        return whole
    return torch.empty((parts, *whole.shape), dtype=torch.float32, device=whole.device)
