"""grad_norm in Triton: sums of squares in fp64 of chunks of all tensors together, then one program adds them.

A chunk has a fixed number of elements, and sums are taken in a fixed order: the same bits on every launch, whatever the
device does meanwhile. What is not contiguous is copied first.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from burnish.kernels.common import lists, target
from burnish.kernels.common.lists import ADDRESSES, COUNT, entry, item_of, pointer
from burnish.kernels.common.variants import Variant

#: elements of a chunk and of a step through it, warps; and of the sum of the chunks' sums
CHUNK, BLOCK, WARPS = 16384, 2048, 4
SUM_BLOCK, SUM_WARPS = 4096, 8


@triton.jit(do_not_specialize=["items", "first", "count", "chunks_before"])
def grad_norm_fwd_kernel(
    table_ptr,
    sums_ptr,  # fp64, one a chunk
    items,
    first,
    count,
    chunks_before,
    GRAD: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    item, chunk = item_of(table_ptr, first, count, program)
    where = (table_ptr, items, item)
    grad_ptr = pointer(where, ADDRESSES, GRAD, ALIGNED)
    begin = chunk.to(tl.int64) * CHUNK
    left = tl.minimum(entry(where, COUNT) - begin, CHUNK).to(tl.int32)
    if ALIGNED:
        left = tl.multiple_of(left, 16)
    at = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float64)
    for start in range(0, left, BLOCK):
        g = tl.load(grad_ptr + begin + start + at, mask=start + at < left, other=0.0).to(tl.float64)
        total += g * g
    tl.store(sums_ptr + chunks_before + program, tl.sum(total, axis=0))


@triton.jit(do_not_specialize=["chunks"])
def grad_norm_fwd_kernel_sum(
    sums_ptr, scale_ptr, norm_ptr, found_ptr, chunks, HAS_SCALE: tl.constexpr, BLOCK: tl.constexpr
):
    at = tl.arange(0, BLOCK)
    sums = tl.zeros([BLOCK], tl.float64)
    for start in range(0, chunks, BLOCK):
        sums += tl.load(sums_ptr + start + at, mask=at < chunks - start, other=0.0)
    total = tl.sum(sums, axis=0)
    norm = tl.sqrt(total)
    if HAS_SCALE:
        norm = norm / tl.load(scale_ptr).to(tl.float64)
    tl.store(norm_ptr, norm.to(tl.float32))
    tl.store(found_ptr, tl.where(total < float("inf"), 0.0, 1.0))


def supports(grads: list[torch.Tensor], grad_scale: torch.Tensor | None) -> str | None:
    if grad_scale is not None and grad_scale.device != grads[0].device:
        return f"grad_scale is on {grad_scale.device}, expected {grads[0].device}, where grads[0] is"
    return target.objection(grads[0])


def grad_norm(grads: list[torch.Tensor], grad_scale: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    flat = [grad.contiguous() for grad in grads]
    norm, found = (torch.empty((), dtype=torch.float32, device=flat[0].device) for _ in range(2))
    table = lists.table(CHUNK, (flat,))
    sums = torch.empty(max(table.blocks, 1), dtype=torch.float64, device=norm.device)
    with target.on_device(norm):
        before = 0
        for one in table.launches:
            if one.blocks:
                grad_norm_fwd_kernel[(one.blocks,)](
                    *(table.rows, sums, table.items, one.first, one.count, before, one.types[0], one.aligned),
                    CHUNK=CHUNK,
                    BLOCK=BLOCK,
                    num_warps=WARPS,
                    enable_fp_fusion=False,
                )
            before += one.blocks
        grad_norm_fwd_kernel_sum[(1,)](
            *(sums, norm if grad_scale is None else grad_scale, norm, found, before, grad_scale is not None),
            BLOCK=SUM_BLOCK,
            num_warps=SUM_WARPS,
            enable_fp_fusion=False,
        )
    return norm, found


def variants(arch: str) -> Iterator[Variant]:
    types = {"table_ptr": "*i64", "sums_ptr": "*fp64", "items": "i32", "first": "i32", "count": "i32"}
    types["chunks_before"] = "i32"
    constants = {"CHUNK": CHUNK, "BLOCK": BLOCK}
    for grad, aligned in ((tl.float32, True), (tl.bfloat16, True), (tl.float16, True), (tl.bfloat16, False)):
        label = f"{grad}{'' if aligned else '-ragged'}"
        own = constants | {"GRAD": grad, "ALIGNED": aligned}
        yield Variant(label, grad_norm_fwd_kernel, types, own, WARPS, narrow=not aligned)
    types = {"sums_ptr": "*fp64", "scale_ptr": "*fp32", "norm_ptr": "*fp32", "found_ptr": "*fp32", "chunks": "i32"}
    yield Variant("", grad_norm_fwd_kernel_sum, types, {"HAS_SCALE": True, "BLOCK": SUM_BLOCK}, SUM_WARPS)
