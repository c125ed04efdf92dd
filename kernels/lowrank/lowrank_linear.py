"""lowrank_linear and its backward in Triton.

Two forward paths:

- *fused*: a program owns BLOCK_M rows, keeps their s [BLOCK_M, R] on the chip, and goes over K, then over N. x is read
  once, y written once, and nothing else moves but the factors, from L2. It needs a block of rows for every
  multiprocessor.
- *split*, for fewer rows: *down* over splits of K (:mod:`lowrank_linear_products`), then *up*, the fused kernel's
  second half on a range of N. The fp32 sums in between are at most 2 R / (N + K) of the traffic a split, and stay in
  L2.

:func:`fused_tile` decides. The two add K up in other orders, so their bits differ; which one runs depends on the shapes
and the device alone.

What bounds it: an element of x or y costs 2 R operations and 2 bytes in bf16, R a byte, where an H100 can do 295 (989
TFLOP/s over 3.35 TB/s, its data sheet): up to R = 128 memory does. So tiles are made for bytes. A program's blocks of A
and B come from L2, R / BLOCK_M of what it reads of x and writes of y, hence BLOCK_M >= R / 2; what it keeps, BLOCK_M R,
bounds it from above; stages are deep enough for about 64 KiB in flight on a multiprocessor, A's blocks among them,
where 3.35 TB/s and a microsecond ask 25 KB of x of each of 132.

Backward: s again by *down* over x; t = dy B by *down* over dy, which also takes dB = dy^T s and dbias from the same
read where their partial sums, one for each block of rows, cost less than reading dy again (:func:`takes_outer`), else
by *dw*; dx = t A by *up*; dA = t^T x by *dw*. x is read twice, dy once; twice in fp32, and at large M from ranks of
about 32 on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from burnish.kernels.common import target
from burnish.kernels.common.epilogues import store_rows
from burnish.kernels.common.operands import UNITS, matrix, objection, pointer_of
from burnish.kernels.common.products import float_dot
from burnish.kernels.common.tiles import LAUNCH_BYTES, Tile
from burnish.kernels.common.variants import Variant
from burnish.kernels.lowrank.lowrank_linear_products import down, down_tile, dw
from burnish.kernels.lowrank.lowrank_linear_sums import (
    MAX_RANK_BLOCK,
    TILE_RANK_BLOCK,
    Dropout,
    Sums,
    add_lowrank,
    rank_block,
    stored,
)

#: ranks whose s a program keeps, beside a tile of x or of y, by the operands' bytes
MAX_FUSED_RANK = {2: 128, 4: 32}
#: elements of it, likewise: parts of fp32 take four times the registers
MAX_KEPT = {2: 8192, 4: 2048}
#: columns of y that a program makes at a time
COLUMNS = 64
#: bytes that a fused program of 16-bit operands asks for ahead on sm_90, where with a block of rows for each
#: multiprocessor it is alone: with 18 KiB an H200 reached 42 % of its bandwidth (M 4096, R 16); not measured since
AHEAD = 64 << 10


@triton.jit
def write_columns(
    s,  # [ROWS, RANKS]
    factor_ptr,  # [R, N] by its strides
    bias_ptr,  # [N]; not read unless HAS_BIAS
    y_ptr,  # [M, N], from the first row on
    rows_left,
    first,
    last,
    N,
    R,
    stride_fr,
    stride_fn,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    RANKS: tl.constexpr,  # at least R
    COLUMNS: tl.constexpr,
):
    """y = s F + bias of the columns from ``first``, int64, to ``last``."""
    r, n = tl.arange(0, RANKS), tl.arange(0, COLUMNS)
    factor_ptr += first * stride_fn
    offsets = r[:, None] * stride_fr + n[None, :] * stride_fn
    step = stride_fn * tl.full([], COLUMNS, tl.int64)
    for start in range(first, last, COLUMNS):
        thin = tl.load(factor_ptr + offsets, mask=(r < R)[:, None] & (n < N - start)[None, :], other=0.0)
        y = float_dot(s, thin, tl.zeros([ROWS, COLUMNS], tl.float32))
        store_rows(y, bias_ptr, y_ptr, rows_left, start, N, HAS_BIAS, ROWS, COLUMNS)
        factor_ptr += step


@triton.jit
def lowrank_linear_fwd_kernel(
    x_ptr,  # [M, K]
    a_ptr,  # [R, K]
    b_ptr,  # [N, R]
    bias_ptr,  # [N]; not read unless HAS_BIAS
    y_ptr,  # [M, N]
    M,
    N,
    K,
    R,
    stride_xm,
    stride_ar,
    stride_bn,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,  # at least R
    BLOCK_K: tl.constexpr,
):
    first_m = tl.program_id(0).to(tl.int64) * BLOCK_M
    m, r, k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_K)
    in_rows, in_rank = (m < M - first_m)[:, None], (r < R)[None, :]
    x_offsets = m[:, None] * stride_xm + k[None, :]
    a_offsets = r[None, :] * stride_ar + k[:, None]
    x_ptr += first_m * stride_xm
    s = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    for start in range(0, K, BLOCK_K):
        in_depth = k < K - start
        x = tl.load(x_ptr + start + x_offsets, mask=in_rows & in_depth[None, :], other=0.0)
        a = tl.load(a_ptr + start + a_offsets, mask=in_depth[:, None] & in_rank, other=0.0)
        s = float_dot(x, a, s)
    s = tl.where(in_rank, s, 0.0).to(x_ptr.dtype.element_ty)  # an infinity of x times no factor is NaN
    write_columns(
        s, b_ptr, bias_ptr, y_ptr + first_m * N, M - first_m, tl.full([], 0, tl.int64), N, N, R, 1, stride_bn,
        HAS_BIAS, BLOCK_M, BLOCK_R, BLOCK_N,
    )  # fmt: skip


@triton.jit
def lowrank_linear_fwd_kernel_up(
    sums_ptr,  # [splits, M, width]
    factor_ptr,  # [R, N] by its strides
    bias_ptr,  # [N]; not read unless HAS_BIAS
    y_ptr,  # [M, N]
    M,
    N,
    R,
    width,
    splits,
    columns,  # of y in a program's range: a multiple of BLOCK_N, and BLOCK_N unless WHOLE
    factor,
    stride_fr,
    stride_fn,
    HAS_BIAS: tl.constexpr,
    WHOLE: tl.constexpr,  # whether BLOCK_R is at least R, so that s is read once
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    first_m, first = tl.program_id(0).to(tl.int64) * BLOCK_M, tl.program_id(1).to(tl.int64) * columns
    y_ptr += first_m * N
    if WHOLE:
        sums_ptr += first_m * width
        s = stored(sums_ptr, M - first_m, R, M, width, splits, factor, factor_ptr.dtype.element_ty, BLOCK_M, BLOCK_R)
        write_columns(
            s, factor_ptr, bias_ptr, y_ptr, M - first_m, first, tl.minimum(first + columns, N), N, R, stride_fr,
            stride_fn, HAS_BIAS, BLOCK_M, BLOCK_R, BLOCK_N,
        )  # fmt: skip
    else:
        y = add_lowrank(
            tl.zeros([BLOCK_M, BLOCK_N], tl.float32), sums_ptr, factor_ptr, first_m, first, M, N, R, width, splits,
            factor, stride_fr, stride_fn, BLOCK_M, BLOCK_N, BLOCK_R,
        )  # fmt: skip
        store_rows(y, bias_ptr, y_ptr, M - first_m, first, N, HAS_BIAS, BLOCK_M, BLOCK_N)


def supports(x: torch.Tensor, A: torch.Tensor, B: torch.Tensor, bias: torch.Tensor | None) -> str | None:
    return objection(x, *A.shape, *B.shape)


def supports_backward(dy: torch.Tensor, x: torch.Tensor, A: torch.Tensor, B: torch.Tensor, *rest: Any) -> str | None:
    return objection(x, *A.shape, *B.shape)


def lowrank_linear(x: torch.Tensor, A: torch.Tensor, B: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    rows, A, B = matrix(x), matrix(A), matrix(B)
    m, (n, rank) = rows.shape[0], B.shape
    y = torch.empty((*x.shape[:-1], n), dtype=x.dtype, device=x.device)
    if m:
        tile = fused_tile(target.arch(x.device), m, rank, x.element_size(), target.sm_count(x.device))
        with target.on_device(x):
            if tile is None:
                forward_split(rows, A, B, bias, y)
            else:
                forward_fused(rows, A, B, bias, y, tile)
    return y


def fused_tiles(arch: str, rank: int, itemsize: int) -> tuple[Tile, ...]:
    """From many rows to few; ``block_n`` is of N. :func:`row_blocks` bounds the rows."""
    block_r = rank_block(rank, MAX_FUSED_RANK[itemsize])
    tiles = []
    for block_m in row_blocks(block_r, itemsize):
        like = down_tile(arch, block_m, block_r, itemsize, False)
        warps = 8 if itemsize == 4 or (block_m == 128 and arch != "sm_100") else 4
        block_k, stages = min(like.block_k, 64), like.num_stages
        if itemsize == 2 and arch == "sm_90":
            block_k = 128
            stages = 1 + triton.cdiv(AHEAD, (block_m + block_r) * block_k * itemsize)
        tiles.append(Tile(block_m, COLUMNS, block_k, warps, stages))
    return tuple(tiles)


def row_blocks(block_r: int, itemsize: int) -> list[int]:
    """How many rows a program that keeps s of ``block_r`` ranks may have, from many to few: see the module."""
    return [rows for rows in (128, 64, 32) if block_r <= 2 * rows and rows * block_r <= MAX_KEPT[itemsize]]


def fused_tile(arch: str, m: int, rank: int, itemsize: int, sm_count: int) -> Tile | None:
    """The largest tile with a block of rows for seven of eight multiprocessors, as powers of two have for 132; None:
    the split path."""
    if rank > MAX_FUSED_RANK[itemsize]:
        return None
    fitting = (t for t in fused_tiles(arch, rank, itemsize) if 8 * triton.cdiv(m, t.block_m) >= 7 * sm_count)
    return next(fitting, None)


def forward_fused(x, A, B, bias, y, tile):  # type: ignore[no-untyped-def]
    """Write y [..., N] from x [M, K], M > 0, by one kernel; R <= :data:`MAX_FUSED_RANK`."""
    (m, k), (n, rank) = x.shape, B.shape
    lowrank_linear_fwd_kernel[(triton.cdiv(m, tile.block_m),)](
        *(x, A, B, x if bias is None else bias.contiguous(), y, m, n, k, rank),
        *(x.stride(0), A.stride(0), B.stride(0)),
        HAS_BIAS=bias is not None,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_R=rank_block(rank, MAX_FUSED_RANK[x.element_size()]),
        BLOCK_K=tile.block_k,
        **tile.options,
    )


def forward_split(x, A, B, bias, y):  # type: ignore[no-untyped-def]
    """The same by two kernels, of any rank."""
    up(down(x, A.T), B.T, bias, y)


def up_tile(m: int, rank: int, itemsize: int) -> Tile:
    """``block_k`` is of the rank. Ranks that do not fit one block are read again for each tile, in small blocks; beside
    the sums of fp32 ones more than 64 rows would be on the stack."""
    whole = rank <= MAX_FUSED_RANK[itemsize]
    block_r = rank_block(rank, (MAX_FUSED_RANK if whole else TILE_RANK_BLOCK)[itemsize])
    block_m = 16 if m <= 32 else row_blocks(block_r, itemsize)[0]
    if itemsize == 4 and not whole:
        block_m = min(block_m, 64)
    return Tile(
        block_m, COLUMNS, block_r, 8 if block_m == 128 or (itemsize == 4 and block_m > 16) else 4, 2 if whole else 1
    )


def up(sums: Sums, thin: torch.Tensor, bias: torch.Tensor | None, y: torch.Tensor) -> None:
    """Write y [..., N], contiguous, = s @ thin [R, N] + bias; M and N > 0."""
    m, n = sums.data.shape[1], thin.shape[1]
    tile = up_tile(m, sums.rank, thin.element_size())
    blocks, steps = triton.cdiv(m, tile.block_m), triton.cdiv(n, tile.block_n)
    whole = sums.rank <= tile.block_k
    ranges = min(steps, triton.cdiv(2 * target.sm_count(y.device), blocks)) if whole else steps
    columns = triton.cdiv(steps, ranges) * tile.block_n
    sums = sums.read_by(ranges)
    data, width, splits, factor = sums.arguments
    lowrank_linear_fwd_kernel_up[(blocks, triton.cdiv(n, columns))](
        *(data, thin, data if bias is None else bias.contiguous(), y, m, n, sums.rank, width, splits, columns, factor),
        *thin.stride(),
        HAS_BIAS=bias is not None,
        WHOLE=whole,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_R=tile.block_k,
        **tile.options,
    )


def lowrank_linear_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    x_grad: bool,
    factor_grad: bool,
    bias_grad: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    return pull(dy, x, A, B, (x_grad, factor_grad, bias_grad), lambda dy, t, A, dx: up(t, A, None, dx))


def pull(
    dy: torch.Tensor,
    x: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    wanted: tuple[bool, bool, bool],
    input_gradient: Callable[[torch.Tensor, Sums, torch.Tensor, torch.Tensor], None],
    factor: float = 1.0,
    dropout: Dropout | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """dx, dA, dB and dbias of ``factor (dropout(x) A^T) B^T + bias`` and of what x goes into beside it; ``wanted`` says
    which of dx, the factors' and dbias. ``input_gradient(dy [M, N], t, A, dx)`` writes dx."""
    x_grad, factor_grad, bias_grad = wanted
    dx, dA, dB, dbias = gradients(x, A, B, x_grad, factor_grad, bias_grad)
    dy, x, A, B = matrix(dy), matrix(x), matrix(A), matrix(B)
    if dy.shape[0]:
        with target.on_device(x):
            s = down(x, A.T, factor, dropout) if factor_grad else None
            t = output_pass(dy, B, s, factor, x_grad or factor_grad, dB, dbias)
            if t is not None and x_grad and A.shape[1]:
                input_gradient(dy, t, A, dx)
            if t is not None and factor_grad and A.shape[1]:
                dw(x, t, dA, dropout, transposed=True)
    return dx, dA, dB, dbias


def gradients(
    x: torch.Tensor, A: torch.Tensor, B: torch.Tensor, x_grad: bool, factor_grad: bool, bias_grad: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """dx, dA, dB and dbias to be filled, empty where not asked for; zero where there are no rows to sum."""
    dx = torch.empty(x.shape if x_grad else (0,), dtype=x.dtype, device=x.device)
    new = torch.empty if x.shape[:-1].numel() else torch.zeros
    dA, dB = (new(w.shape if factor_grad else (0,), dtype=w.dtype, device=w.device) for w in (A, B))
    return dx, dA, dB, new(B.shape[0] if bias_grad else 0, dtype=torch.float32, device=x.device)


def output_pass(
    dy: torch.Tensor,
    B: torch.Tensor,
    s: Sums | None,
    factor: float,
    pull: bool,
    dB: torch.Tensor,
    dbias: torch.Tensor,
) -> Sums | None:
    """What is read from dy [M, N], M > 0: dB if there is s, dbias if it has room, and, returned, t if ``pull``."""
    totals = dbias if dbias.numel() else None
    outer = dB if s is not None else None
    if outer is not None and not takes_outer(dy, B.shape[1]):
        dw(dy, s, outer, totals=totals)
        return down(dy, B, factor)
    if pull:
        return down(dy, B, factor, other=s, outer=outer, totals=totals)
    if totals is not None:
        dw(dy, None, None, totals=totals)
    return None


def takes_outer(dy: torch.Tensor, rank: int) -> bool:
    """Whether dB's partial sums, written and read again, are fewer bytes than dy; a launch as :data:`LAUNCH_BYTES`.
    The parts of fp32 operands leave a program no registers for a second product."""
    m, n = dy.shape
    if dy.element_size() == 4 or rank > MAX_RANK_BLOCK[2]:
        return False
    tile = down_tile(target.arch(dy.device), m, rank, dy.element_size(), True)
    return 8 * rank * n * triton.cdiv(m, tile.block_m) <= dy.nbytes + LAUNCH_BYTES


def variants(arch: str) -> Iterator[Variant]:
    """Every rank block in fp32 and one 16-bit type: all fused tiles; of *up*, few rows and many, and ranks that take
    several blocks. The 16-bit types, the bias and the factor's strides alternate."""
    blocks = [(size, rank) for size in (2, 4) for rank in (16, 32, 64, 128, 256) if rank <= MAX_FUSED_RANK[size]]
    for index, (itemsize, rank) in enumerate((*blocks, (2, 256), (4, 256))):
        pointer = pointer_of(itemsize, index)
        if rank <= MAX_FUSED_RANK[itemsize]:
            for tile in fused_tiles(arch, rank, itemsize):
                sizes = dict.fromkeys(("M", "N", "K", "R", "stride_xm", "stride_ar", "stride_bn"), "i32")
                constants = {"HAS_BIAS": index % 2 == 0, "BLOCK_R": rank, "BLOCK_K": tile.block_k}
                yield variant(lowrank_linear_fwd_kernel, tile, f"r{rank}", pointer, "x a b bias y", sizes, constants)
        for m in (16, 1024):
            yield up_variant(m, rank, itemsize, pointer, index % 4 < 2, (m == 16) == (index % 2 == 0))


def variant(
    kernel: Any, tile: Tile, label: str, pointer: str, names: str, types: dict[str, str], constants: dict[str, Any]
) -> Variant:
    """A tile's variant, with operands of ``names`` in one type."""
    return Variant(
        f"{tile.name}-{label}-{pointer[1:]}", kernel, {f"{name}_ptr": pointer for name in names.split()} | types,
        {**constants, "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n}, tile.num_warps, tile.num_stages,
        UNITS[pointer],
    )  # fmt: skip


def up_variant(m: int, rank: int, itemsize: int, pointer: str, bias: bool, transposed: bool) -> Variant:
    """``transposed``: the factor is B^T, whose ranks are contiguous, as in the forward."""
    tile = up_tile(m, rank, itemsize)
    types = {"sums_ptr": "*fp32", "factor": "fp32", "stride_fn" if transposed else "stride_fr": "i32"}
    types |= dict.fromkeys(("M", "N", "R", "width", "splits", "columns"), "i32")
    constants = {"HAS_BIAS": bias, "WHOLE": rank <= tile.block_k, "BLOCK_R": tile.block_k}
    constants["stride_fr" if transposed else "stride_fn"] = 1
    label = f"r{rank}{'-transposed' if transposed else ''}"
    return variant(lowrank_linear_fwd_kernel_up, tile, label, pointer, "factor bias y", types, constants)
