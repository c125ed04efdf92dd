"""What the generated tests of the sparse Triton kernels do not reach: the tiles of every architecture, exactly."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import triton_interpreter

triton_interpreter.require()

import pytest  # noqa: E402
import torch  # noqa: E402
from burnish import block_format, sparse24_format  # noqa: E402
from burnish.kernels.common import target, tiles  # noqa: E402
from burnish.kernels.quant import int8_linear  # noqa: E402
from burnish.kernels.sparse import bsr_linear, bsr_linear_narrow, sparse24_linear, sparse_linear  # noqa: E402
from burnish.ops.sparse_linear import compress as compress_bitmap  # noqa: E402

DTYPES = (torch.bfloat16, torch.float32, torch.int8)
#: how many parts a long sum of gradients of int8 values takes
PARTS = {d: int8_linear.gradient_parts(d, int8_linear.TWO_PARTS_MIN_N) for d in (*DTYPES[:2], torch.float16)}
#: rows and columns of blocks whose depth takes several steps, and of which a step takes several
DEEP, SHALLOW = (128, 128), (16, 16)

Table = Callable[[str, torch.dtype], tuple[tiles.Tile, ...]]
#: likewise of gradients, by their type and the number of parts
PullTable = Callable[[str, torch.dtype, int], tuple[tiles.Tile, ...]]


def every(table: Table, dtypes: tuple[torch.dtype, ...] = DTYPES) -> list[Any]:
    """Each shape of tile in a table on any architecture, with its type of values."""
    found = {}
    for dtype in dtypes:
        for tile in (tile for arch in target.ARCHITECTURES for tile in table(arch, dtype)):
            label = f"{tile.block_m}x{tile.block_n}x{tile.block_k}-{str(dtype)[6:]}"
            found[label] = pytest.param(tile, dtype, id=label)
    return list(found.values())


def every_pull(table: PullTable) -> list[Any]:
    """Each shape of tile of gradients, with the types of values and of gradients."""
    floats = every(lambda arch, dtype: table(arch, dtype, 0), DTYPES[:2])
    found = [pytest.param(*param.values, param.values[1], id=param.id) for param in floats]
    for dtype, parts in PARTS.items():
        for param in every(lambda arch, dtype, parts=parts: table(arch, dtype, parts), (dtype,)):
            found.append(pytest.param(param.values[0], torch.int8, dtype, id=f"int8-{param.id}"))
    return found


def integers(seed: int, *shape: int) -> torch.Tensor:
    return torch.randint(-8, 9, shape, generator=torch.Generator().manual_seed(seed)).float()


def operands(m: int, n: int, k: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x [M, K], its row scales (ones) and a bias; an int8 x for an int8 weight."""
    return integers(1, m, k).to(dtype), torch.ones(m), integers(2, n)


def kept_blocks(n: int, k: int, block: tuple[int, int], dtype: torch.dtype) -> tuple[tuple[torch.Tensor, ...], Any]:
    """Two of three blocks of an integer weight: values, crow_indices, col_indices; and the weight, dense."""
    weight = integers(3, n, k)
    down, across = (block_format.blocks_along(size, width) for size, width in zip((n, k), block, strict=True))
    there = (torch.arange(down)[:, None] + torch.arange(across)) % 3 != 0
    there = there.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)[:n, :k]
    weight = torch.where(there, weight, 0.0)
    return block_format.compress(weight.to(dtype), block, there), weight


def check(y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    expected = x.double() @ weight.double()
    assert torch.equal(y, (expected if bias is None else expected + bias).to(y.dtype))


def result(m: int, n: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.full((m, n), math.nan, dtype=torch.bfloat16 if dtype == torch.int8 else dtype)


def block_tiles(out: int) -> Table:
    return lambda arch, dtype: bsr_linear.tiles(arch, dtype, out)


def block_gradient_tiles(out: int) -> PullTable:
    return lambda arch, dtype, parts: bsr_linear.gradient_tiles(arch, dtype, out, out, parts)


def blocks_forward(tile: tiles.Tile, dtype: torch.dtype, block: tuple[int, int]) -> None:
    m, n, k = tile.block_m + 3, block[0] + 5, 3 * block[1] + 7
    values, weight = kept_blocks(n, k, block, dtype)
    x, row_scales, bias = operands(m, n, block_format.blocks_along(k, block[1]) * block[1], dtype)
    x = x if dtype == torch.int8 else x[:, :k].contiguous()
    y = result(m, n, dtype)
    bsr_linear.forward(x, row_scales, *values, torch.ones(n), bias.to(y.dtype), y, tile)
    check(y, x[:, :k], weight.T, bias)


def blocks_pull(tile: tiles.Tile, dtype: torch.dtype, gradient: torch.dtype, block: tuple[int, int]) -> None:
    m, n, k = tile.block_m + 3, 3 * block[0] + 7, block[1] + 5
    (values, *index), weight = kept_blocks(n, k, block, dtype)
    transposed = block_format.transpose_index(*index, block_format.blocks_along(k, block[1]))
    dx = result(m, k, gradient)
    dy = integers(4, m, n).to(gradient)
    scale = torch.ones(n) if dtype == torch.int8 else None
    bsr_linear.input_gradient(dy, values, transposed, scale, dx, tile)
    check(dx, dy, weight, None)


@pytest.mark.parametrize(("tile", "dtype"), every(block_tiles(128)))
def test_every_forward_tile_of_deep_blocks_is_exact(tile: tiles.Tile, dtype: torch.dtype) -> None:
    blocks_forward(tile, dtype, DEEP)


@pytest.mark.parametrize(("tile", "dtype"), every(block_tiles(16)))
def test_every_forward_tile_of_shallow_blocks_is_exact(tile: tiles.Tile, dtype: torch.dtype) -> None:
    blocks_forward(tile, dtype, SHALLOW)


@pytest.mark.parametrize(("tile", "dtype", "gradient"), every_pull(block_gradient_tiles(128)))
def test_every_backward_tile_of_deep_blocks_is_exact(
    tile: tiles.Tile, dtype: torch.dtype, gradient: torch.dtype
) -> None:
    blocks_pull(tile, dtype, gradient, DEEP)


@pytest.mark.parametrize(("tile", "dtype", "gradient"), every_pull(block_gradient_tiles(16)))
@pytest.mark.parametrize("block", [SHALLOW, *bsr_linear_narrow.BLOCKS], ids=lambda block: f"{block[0]}x{block[1]}")
def test_every_backward_tile_of_shallow_blocks_is_exact(
    tile: tiles.Tile, dtype: torch.dtype, gradient: torch.dtype, block: tuple[int, int]
) -> None:
    blocks_pull(tile, dtype, gradient, block)


def two_of_four(n: int, k: int, dtype: torch.dtype) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
    weight = integers(5, n, k)
    order = torch.rand(n, -(-k // 4), 4, generator=torch.Generator().manual_seed(6)).argsort(-1)
    there = (order < 2).flatten(1)[:, :k]
    return sparse24_format.compress(weight.to(dtype), there), torch.where(there, weight, 0.0)


@pytest.mark.parametrize(("tile", "dtype"), every(sparse24_linear.tiles))
def test_every_forward_tile_of_two_of_four_is_exact(tile: tiles.Tile, dtype: torch.dtype) -> None:
    m, n, k = tile.block_m + 3, tile.block_n + 5, tile.block_k + 13
    packed, weight = two_of_four(n, k, dtype)
    (x, row_scales, bias), y = operands(m, n, k, dtype), result(m, n, dtype)
    sparse24_linear.forward(x, row_scales, *packed, torch.ones(n), bias.to(y.dtype), y, tile)
    check(y, x, weight.T, bias)


@pytest.mark.parametrize(("tile", "dtype", "gradient"), every_pull(sparse24_linear.gradient_tiles))
def test_every_backward_tile_of_two_of_four_is_exact(
    tile: tiles.Tile, dtype: torch.dtype, gradient: torch.dtype
) -> None:
    m, n, k = tile.block_m + 3, tile.block_k + 5, tile.block_n + 13
    packed, weight = two_of_four(n, k, dtype)
    dx = result(m, k, gradient)
    dy = integers(4, m, n).to(gradient)
    sparse24_linear.input_gradient(dy, *packed, torch.ones(n) if dtype == torch.int8 else None, dx, tile)
    check(dx, dy, weight, None)


@pytest.mark.parametrize(("tile", "dtype"), every(sparse_linear.tiles, DTYPES[:2]))
def test_every_tile_of_a_bitmap_is_exact(tile: tiles.Tile, dtype: torch.dtype) -> None:
    """More rows of the bitmap than *starts* has bytes for at a time, and tiles that begin within a byte's row."""
    m, n, k = tile.block_m + 3, tile.block_n + 5, 8 * sparse_linear.START_BYTES + 13
    there = torch.rand(n, k, generator=torch.Generator().manual_seed(7)) < 0.3
    there[3] = False
    weight = torch.where(there, integers(8, n, k), 0.0)
    packed = compress_bitmap(weight.to(dtype), there)
    (x, _, bias), y = operands(m, n, k, dtype), result(m, n, dtype)
    sparse_linear.forward(x, *packed, bias.to(dtype), y, tile)
    check(y, x, weight.T, bias)
    dx, dy = result(m, k, dtype), integers(4, m, n).to(dtype)
    sparse_linear.input_gradient(dy, *packed, dx, tile)
    check(dx, dy, weight, None)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("arch", target.ARCHITECTURES)
def test_every_gradient_of_values_is_exact(arch: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the tiles of each architecture, in parts of M."""
    monkeypatch.setattr(target, "arch", lambda device: arch)
    monkeypatch.setattr(target, "sm_count", lambda device: 64)
    m, n, k = 150, 70, 150
    x, dy = integers(1, m, k).to(dtype), integers(4, m, n).to(dtype)
    dense = (dy.double().T @ x.double()).to(dtype)
    for block in block_format.BLOCKS:
        (values, *index), _ = kept_blocks(n, k, block, dtype)
        inside = block_format.expand(torch.ones_like(values), *index, n, k) != 0
        wanted = block_format.compress(torch.where(inside, dense, 0), block, inside)[0]
        got = torch.full_like(values, math.nan)
        (bsr_linear_narrow if block in bsr_linear_narrow.BLOCKS else bsr_linear).values_gradient(dy, x, *index, got)
        assert torch.equal(got, wanted), block
    (values, metadata), weight = two_of_four(n, k, dtype)
    got = torch.full_like(values, math.nan)
    sparse24_linear.values_gradient(dy, x, metadata, got)
    picked = sparse24_format.expand(got, metadata, n, k)
    assert torch.equal(picked[weight != 0], dense[weight != 0])
    there = weight != 0
    values, *bits = compress_bitmap(weight.to(dtype), there)
    got = torch.full_like(values, math.nan)
    sparse_linear.values_gradient(dy, x, *bits, got)
    assert torch.equal(got, dense[there])
