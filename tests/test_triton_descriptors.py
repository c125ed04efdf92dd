"""The Triton kernels whose operands come by descriptors, which the interpreter's own architecture never picks.

Every tile and every kind of edge, exactly; when they are picked; the order in which stripes are taken. On a GPU that
has the accelerator the same tests run there, where no other test reaches these kernels with ragged shapes.
"""

from __future__ import annotations

import math

import pytest
import torch
import triton_interpreter
from burnish import testing

#: a GPU with the accelerator where there is one and this process interprets nothing, else the interpreter's
ON_GPU = torch.cuda.is_available() and not testing.interpreting() and torch.cuda.get_device_capability()[0] in (9, 10)
if not ON_GPU:
    triton_interpreter.require()

import triton  # noqa: E402
import triton.language as tl  # noqa: E402
from burnish import block_format, dropout  # noqa: E402
from burnish.kernels.common import descriptors, target, tiles  # noqa: E402
from burnish.kernels.lowrank import lora_linear, lora_linear_described  # noqa: E402
from burnish.kernels.lowrank.lowrank_linear_sums import Dropout, Sums  # noqa: E402
from burnish.kernels.sparse import bsr_linear, bsr_linear_described  # noqa: E402

TILES = {
    tile for arch in descriptors.ARCHITECTURES for tile in tiles.HALF_GEMM[arch] if tile.block_m >= descriptors.MIN_ROWS
}
BLOCK_TILES = {
    (tile, block)
    for arch in descriptors.ARCHITECTURES
    for block in bsr_linear_described.BLOCKS
    for tile in bsr_linear.tiles(arch, torch.bfloat16, block[0])
    if tile.block_m >= descriptors.MIN_ROWS
}
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
pytestmark = [pytest.mark.gpu] * ON_GPU
by_tile = pytest.mark.parametrize("tile", sorted(TILES, key=str), ids=lambda tile: tile.name)
by_block_tile = pytest.mark.parametrize(
    ("tile", "block"), sorted(BLOCK_TILES, key=str), ids=lambda value: getattr(value, "name", str(value))
)


@pytest.fixture(autouse=True)
def accelerated(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device is taken for one of three multiprocessors, so that a program makes several tiles; the interpreter's
    for an sm_90."""
    if not ON_GPU:
        monkeypatch.setattr(target, "arch", lambda device: "sm_90")
    monkeypatch.setattr(target, "sm_count", lambda device: 3)


def integers(seed: int, *shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randint(-8, 9, shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def unwritten(m: int, n: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.full((m, n), math.nan, dtype=dtype, device=DEVICE)


def adapter(m: int, n: int, rank: int, dtype: torch.dtype) -> tuple[Sums, torch.Tensor, torch.Tensor]:
    """Integer sums in two splits whose total is halved, the other factor [N, R], and their product."""
    data = integers(1, 2, m, -(-rank // 16) * 16, dtype=torch.float32) * 2
    B = integers(2, n, rank, dtype=dtype)
    return Sums(data, rank, 0.5), B, data.sum(0)[:, :rank].double() / 2 @ B.double().T


def padded(rows: torch.Tensor) -> torch.Tensor:
    """The same values in rows that lie further apart, with NaN between."""
    apart = unwritten(rows.shape[0], rows.shape[1] + 24, rows.dtype)
    apart[:, : rows.shape[1]] = rows
    return apart[:, : rows.shape[1]]


@pytest.mark.parametrize("rank", [5, 32, 40, 70])
@by_tile
def test_every_tile_of_a_forward_is_exact(tile: tiles.Tile, rank: int) -> None:
    """Tiles of three rows and two columns, ragged in every dimension, over three programs."""
    dtype = torch.float16 if rank == 32 else torch.bfloat16
    m, n, k = 2 * tile.block_m + 3, tile.block_n + 24, tile.block_k + 40
    x, weight, bias = (
        padded(integers(3, m, k, dtype=dtype)),
        integers(4, n, k, dtype=dtype),
        integers(5, n, dtype=dtype),
    )
    sums, B, low = adapter(m, n, rank, dtype)
    expected = x.double() @ weight.double().T + low
    for offset in (None, bias):
        y = unwritten(m, n, dtype)
        lora_linear_described.multiply(x, weight.T, sums, B.T, offset, None, y, tile)
        assert torch.equal(y, (expected if offset is None else expected + bias.double()).to(dtype))


@pytest.mark.parametrize("dropped", [False, True])
@by_tile
def test_every_tile_of_a_gradient_is_exact(tile: tiles.Tile, dropped: bool) -> None:
    m, n, k = tile.block_m + 3, tile.block_n + 24, tile.block_k + 40
    dy, weight = padded(integers(6, m, k)), padded(integers(7, k, n))
    sums, A, low = adapter(m, n, 20, torch.bfloat16)
    mask = Dropout(torch.tensor([5], device=DEVICE), 30000) if dropped else None
    dx = unwritten(m, n)
    lora_linear_described.multiply(dy, weight, sums, A.T.contiguous(), None, mask, dx, tile)
    kept = torch.where(dropout.keep(mask.seed, m, n, 30000 / 65536), low, 0.0) if mask else low
    assert torch.equal(dx, (dy.double() @ weight.double() + kept).to(torch.bfloat16))


def test_every_tile_is_made_once_where_rows_are_more_than_a_group() -> None:
    """17 rows of tiles, and three columns; y is large enough for what is between to be seen."""
    tile = tiles.Tile(128, 128, 64, 8, 4)
    m, n, k = descriptors.GROUP_ROWS + 8, 2 * tile.block_n + 8, 64
    x, weight = integers(8, m, k), integers(9, n, k)
    sums, B, low = adapter(m, n, 16, torch.bfloat16)
    y = unwritten(m + 2, n)
    lora_linear_described.multiply(x, weight.T, sums, B.T, None, None, y[1:-1], tile)
    assert torch.equal(y[1:-1], (x.double() @ weight.double().T + low).to(torch.bfloat16))
    assert y[0].isnan().all()
    assert y[-1].isnan().all()


def sparse_weight(n: int, k: int, block: tuple[int, int]) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
    """Lists of blocks of unequal lengths, one empty: values, crow_indices, col_indices; and the weight, dense."""
    down, across = (block_format.blocks_along(size, width) for size, width in zip((n, k), block, strict=True))
    there = torch.arange(across)[None, :] * 5 % across < (torch.arange(down) * 3 % (across + 1))[:, None]
    there = there.to(DEVICE)
    assert not there[0].any()
    assert len(set(there.sum(1).tolist())) > 2
    there = there.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)[:n, :k]
    weight = torch.where(there, integers(10, n, k), 0.0)
    return block_format.compress(weight.to(torch.bfloat16), block, there), weight


@pytest.mark.parametrize("most", [bsr_linear_described.MAX_SORTED, 2])
@by_block_tile
def test_every_tile_of_blocks_is_exact(
    tile: tiles.Tile, block: tuple[int, int], most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks that N and K cut, lists sorted all together and in twos."""
    monkeypatch.setattr(bsr_linear_described, "MAX_SORTED", most)
    m, n, k = tile.block_m + 3, 4 * block[0] + 8, 3 * block[1] + 8
    packed, weight = sparse_weight(n, k, block)
    x = padded(integers(11, m, k))
    for bias in (None, integers(12, n, dtype=torch.float32)):
        y = unwritten(m, n)
        assert bsr_linear_described.takes(x, packed[0], y, tile)
        bsr_linear.forward(x, x, *packed, x, bias, y, tile)
        expected = x.double() @ weight.double().T + (0.0 if bias is None else bias.double())
        assert torch.equal(y, expected.to(torch.bfloat16))


@triton.jit
def order_kernel(crow_ptr, order_ptr, stripes, SORTED: tl.constexpr):
    place = tl.program_id(0)
    tl.store(order_ptr + place, bsr_linear_described.longest(crow_ptr, place, stripes, SORTED))


@pytest.mark.parametrize("stripes", [1, 2, 31, 32, 100, 128, 129, 300])
def test_stripes_are_taken_from_the_longest_to_the_shortest(stripes: int) -> None:
    counts = torch.randint(0, 9, (stripes,), generator=torch.Generator().manual_seed(stripes), dtype=torch.int32)
    crow = torch.cat([torch.zeros(1, dtype=torch.int32), counts.cumsum(0, dtype=torch.int32)]).to(DEVICE)
    order = torch.full((stripes,), -1, dtype=torch.int32, device=DEVICE)
    order_kernel[(stripes,)](crow, order, stripes, SORTED=bsr_linear_described.sorted_stripes(stripes))
    most = bsr_linear_described.MAX_SORTED
    expected = sorted(range(stripes), key=lambda stripe: (stripe // most, -counts[stripe].item()))
    assert order.tolist() == expected


def test_what_is_described() -> None:
    rows = torch.zeros(130, 64, dtype=torch.bfloat16, device=DEVICE)
    wide = torch.zeros(130 * 64 + 8, dtype=torch.bfloat16, device=DEVICE)
    assert descriptors.describable(128, rows, wide[8:].view(130, 64), rows[:, :40], rows[:1])
    assert not descriptors.describable(64, rows)
    odd = torch.zeros(130, 65, dtype=torch.bfloat16, device=DEVICE)
    moved, repeated = wide[1:-7].view(130, 64), rows[:1].expand(130, 64)
    for other in (odd, moved, repeated, rows[:, 4:], rows[:, ::2], rows[:0], rows.float()):
        assert not descriptors.describable(128, rows, other)


@pytest.mark.parametrize("arch", target.ARCHITECTURES)
def test_which_architectures_describe(arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target, "arch", lambda device: arch)
    assert descriptors.describable(128, torch.zeros(8, 8, dtype=torch.float16)) == (arch in ("sm_90", "sm_100"))


@pytest.mark.parametrize(("columns", "calls"), [(256, 1), (250, 0)])
def test_lora_linear_describes_what_is_aligned(columns: int, calls: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both directions of the op, which choose by the shape; either way the result is exact."""
    seen, multiply = [], lora_linear_described.multiply
    monkeypatch.setattr(lora_linear_described, "multiply", lambda *args: seen.append(multiply(*args)))
    monkeypatch.setattr(target, "sm_count", lambda device: 1)
    m, k = 128, 64
    x, weight, dy = integers(13, m, k), integers(14, columns, k), integers(15, m, columns)
    A, B = torch.zeros(4, k, dtype=torch.bfloat16, device=DEVICE), integers(16, columns, 4)
    A[:, :4] = torch.eye(4)
    y = lora_linear.lora_linear(x, weight, None, None, A, B, None, 1.0, 0.0, 0)
    low = x.double() @ A.double().T
    assert torch.equal(y, (x.double() @ weight.double().T + low @ B.double().T).to(y.dtype))
    assert len(seen) == calls
    dx, *_ = lora_linear.lora_linear_backward(
        dy, x, weight, None, A, B, None, 1.0, 0.0, 0, True, False, False
    )  # fmt: skip
    t = (dy.double() @ B.double()).to(torch.bfloat16).double()
    assert torch.equal(dx, (dy.double() @ weight.double() + t @ A.double()).to(dx.dtype))
    assert len(seen) == 2 * calls
