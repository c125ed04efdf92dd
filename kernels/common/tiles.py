"""Tile tables, the choice of a tile, and the order in which programs walk the output.

A table belongs to a kind of matrix product, not to an op: per architecture, tiles from large to small. :func:`pick`
takes the largest that wastes less than half of its rows and still gives every multiprocessor a program; results of
integer kernels do not depend on it. Shared memory of a pipelined int8 tile is about ``num_stages * (block_m + block_n)
* block_k`` bytes; the ``sm_80`` column stays within 99 KiB because it also serves sm_86, sm_89 and sm_120.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import triton
import triton.language as tl


@dataclass(frozen=True)
class Tile:
    """An output tile ``block_m x block_n``, the depth ``block_k`` of one step, and how it is run."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int

    @property
    def name(self) -> str:
        return f"{self.block_m}x{self.block_n}x{self.block_k}w{self.num_warps}s{self.num_stages}"

    @property
    def constants(self) -> dict[str, int]:
        """The tile as compile-time constants of a kernel."""
        return {"BLOCK_M": self.block_m, "BLOCK_N": self.block_n, "BLOCK_K": self.block_k, "GROUP": GROUP_M}

    @property
    def options(self) -> dict[str, int | bool]:
        """Launch options; contraction is off because numerics spells every fma."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": False}

    def grid(self, m: int, n: int) -> tuple[int]:
        """One program for each tile of an ``m x n`` output."""
        return (triton.cdiv(m, self.block_m) * triton.cdiv(n, self.block_n),)


#: rows of tiles that share their columns' weights in L2 before the walk moves on
GROUP_M = 8

#: rows of the tallest tile, and elements of the largest that is cut to four warps: 32 sums a thread
MAX_ROWS, THIN = 256, 4096

#: bytes that L2 delivers while a kernel starts: 2 us at 4 TB/s, the order of an A100 or H100, not a measurement
LAUNCH_BYTES = 8 << 20

#: int8 x int8 -> int32, both operands with the depth contiguous
INT8_GEMM: dict[str, tuple[Tile, ...]] = {
    "sm_80": (
        Tile(128, 128, 128, 8, 3),
        Tile(64, 128, 128, 8, 4),
        Tile(64, 64, 128, 4, 4),
        Tile(32, 64, 128, 4, 4),
        Tile(16, 64, 256, 4, 3),
        Tile(16, 32, 128, 4, 5),
    ),
    "sm_90": (
        Tile(128, 256, 128, 8, 4),
        Tile(128, 128, 128, 8, 4),
        Tile(64, 128, 128, 4, 4),
        Tile(64, 64, 128, 4, 5),
        Tile(32, 64, 128, 4, 5),
        Tile(16, 64, 256, 8, 4),
        Tile(16, 32, 512, 4, 4),
    ),
    "sm_100": (
        Tile(128, 256, 128, 8, 4),
        Tile(128, 128, 128, 8, 4),
        Tile(64, 128, 128, 4, 4),
        Tile(64, 64, 128, 4, 4),
        Tile(32, 64, 128, 4, 5),
        Tile(16, 64, 256, 4, 5),
        Tile(16, 32, 512, 4, 4),
    ),
    "gfx942": (
        Tile(128, 128, 128, 8, 2),
        Tile(64, 128, 128, 4, 2),
        Tile(64, 64, 128, 4, 2),
        Tile(32, 64, 128, 4, 2),
        Tile(16, 64, 256, 4, 2),
        Tile(16, 32, 256, 4, 2),
    ),
}

#: fp32 x int8 -> fp32 on bf16 tensor cores, the fp32 operand split into bf16 parts
SPLIT_GEMM: dict[str, tuple[Tile, ...]] = {
    "sm_80": (Tile(128, 128, 32, 8, 3), Tile(64, 64, 32, 4, 3), Tile(16, 64, 64, 8, 3)),
    "sm_90": (Tile(128, 128, 64, 8, 3), Tile(64, 64, 64, 4, 3), Tile(16, 64, 64, 8, 3)),
    "sm_100": (Tile(128, 128, 64, 8, 3), Tile(64, 64, 64, 4, 4), Tile(16, 64, 64, 8, 3)),
    "gfx942": (Tile(128, 128, 32, 8, 2), Tile(64, 64, 32, 4, 2), Tile(16, 64, 64, 4, 2)),
}

#: bf16 x bf16 or fp16 x fp16 -> fp32
HALF_GEMM: dict[str, tuple[Tile, ...]] = {
    "sm_80": (Tile(128, 128, 32, 8, 4), Tile(64, 64, 64, 4, 4), Tile(32, 64, 64, 4, 4), Tile(16, 64, 128, 4, 4)),
    "sm_90": (
        Tile(128, 256, 64, 8, 4),
        Tile(128, 128, 64, 8, 4),
        Tile(64, 128, 64, 4, 4),
        Tile(64, 64, 64, 4, 5),
        Tile(16, 64, 128, 4, 5),
    ),
    "sm_100": (
        Tile(128, 256, 64, 8, 4),
        Tile(128, 128, 64, 8, 4),
        Tile(64, 128, 64, 4, 4),
        Tile(64, 64, 64, 4, 5),
        Tile(16, 64, 128, 4, 5),
    ),
    "gfx942": (Tile(128, 128, 64, 8, 2), Tile(64, 64, 64, 4, 2), Tile(16, 64, 128, 4, 2)),
}

#: fp32 x fp32 -> fp32 on bf16 tensor cores, both operands split into bf16 parts
FULL_GEMM: dict[str, tuple[Tile, ...]] = {
    "sm_80": (Tile(64, 64, 32, 8, 3), Tile(16, 64, 32, 4, 3)),
    "sm_90": (Tile(64, 128, 32, 8, 3), Tile(64, 64, 32, 8, 3), Tile(16, 64, 32, 4, 3)),
    "sm_100": (Tile(64, 128, 32, 8, 3), Tile(64, 64, 32, 8, 3), Tile(16, 64, 32, 4, 3)),
    "gfx942": (Tile(64, 64, 16, 8, 2), Tile(16, 64, 32, 4, 2)),
}


def pick(tiles: tuple[Tile, ...], m: int, n: int, sm_count: int) -> Tile:
    """The first tile with ``block_m < 2 * m`` that makes ``sm_count`` programs, else the one that makes most."""
    fitting = [tile for tile in tiles if tile.block_m < 2 * m] or [tiles[-1]]
    counts = [triton.cdiv(m, tile.block_m) * triton.cdiv(n, tile.block_n) for tile in fitting]
    for tile, count in zip(fitting, counts, strict=True):
        if count >= sm_count:
            return tile
    return fitting[max(range(len(counts)), key=counts.__getitem__)]


def split_tiles(arch: str, parts: int) -> tuple[Tile, ...]:
    """:data:`SPLIT_GEMM`'s; on sm_90 and sm_100 the largest leaves no registers for the sum that three parts have of
    their own."""
    if parts < 3 or arch not in ("sm_90", "sm_100"):
        return SPLIT_GEMM[arch]
    return tuple(replace(tile, block_n=64) for tile in SPLIT_GEMM[arch])


def narrowed(tiles: tuple[Tile, ...], columns: int) -> tuple[Tile, ...]:
    """The tiles of a product whose output comes in stripes of ``columns`` columns, a power of two: no tile is wider,
    and a large one that was takes more rows instead, up to :data:`MAX_ROWS`."""
    fitted = []
    for tile in tiles:
        block_n = min(tile.block_n, columns)
        tall = min(tile.block_m * tile.block_n // block_n, MAX_ROWS) if tile.block_m >= 128 else tile.block_m
        for rows in (tall, tile.block_m):
            cut = rows * block_n < tile.block_m * tile.block_n
            warps = 4 if cut and rows * block_n <= THIN else tile.num_warps
            fitted.append(replace(tile, block_m=rows, block_n=block_n, num_warps=warps))
    return tuple({(tile.block_m, tile.block_n): tile for tile in fitted}.values())


@triton.jit
def swizzle(pid, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    """Tile coordinates of program ``pid``: down GROUP rows of tiles, then one column on, so that a wave of programs
    touches a near-square patch of the output and both operands are re-read from L2."""
    rows = tl.cdiv(M, BLOCK_M)
    columns = tl.cdiv(N, BLOCK_N)
    group = pid // (GROUP * columns)
    first = group * GROUP
    height = tl.minimum(rows - first, GROUP)
    within = pid % (GROUP * columns)
    return first + within % height, within // height
