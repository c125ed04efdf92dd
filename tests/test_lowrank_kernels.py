"""lowrank_linear in CUDA C++ for many rows, on the CPU: what the shapes of the conformance kit are too small for.

``BURNISH_EMULATE_CUDA=1 pytest tests/test_lowrank_kernels.py``
"""

from __future__ import annotations

import math

import pytest
import torch
from burnish.ops.lowrank_linear import NATIVE_WIDE_RANK
from burnish.registry import Case
from many_rows import HALVES, SPECIAL, ManyRows, only_emulated

pytestmark = only_emulated

OP = ManyRows("lowrank_linear")


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(
    "shape",
    [
        (65, 8, 8, 8),  # one stage down, one up: of eight blocks seven have nothing
        (70, 136, 72, 16),  # parts of lines, of channels, of rows
        (129, 264, 64, 24),
        (128, 1032, 520, 64),  # more than a stage a block
        (100, 1160, 600, 72),
        (190, 128, 1032, 120),
        (65, 2056, 64, 128),
        (66, 8 * 128 * 6 + 8, 64, 128),  # more of B than the ring holds
        (66, 8, 64 * 8 * 6 + 8, 128),  # more of x
    ],
)
def test_shapes(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Rows, channels, columns and ranks that are no whole tiles or stages, and blocks that have none."""
    args = OP.made(*shape, dtype)
    expected = OP.exactly(args)
    for seed in range(3):
        assert torch.equal(OP.result(args, seed), expected)


@pytest.mark.parametrize("rank", range(8, NATIVE_WIDE_RANK + 1, 8))
def test_ranks(rank: int) -> None:
    args = OP.made(72, 136, 136, rank)
    assert torch.equal(OP.result(args, rank), OP.exactly(args))


@pytest.mark.parametrize(
    ("shape", "tile", "blocks"),
    [
        ((1000, 136, 72, 16), "64, 64, 8, 1", 128),
        ((1000, 136, 72, 72), "64, 128, 8, 1", 128),
        ((1100, 1160, 584, 16), "128, 64, 8, 1", 72),
        ((1100, 1160, 584, 72), "128, 128, 8, 1", 72),
        ((2250, 648, 328, 40), "128, 64, 4, 1", 72),
        ((2060, 648, 328, 104), "128, 128, 4, 1", 68),
        ((2250, 648, 328, 104), "128, 128, 4, 2", 72),
    ],
)
def test_tiles(shape: tuple[int, ...], tile: str, blocks: int) -> None:
    """Smaller ones and larger clusters where there are fewer rows; two tiles a cluster where their number is even."""
    ((name, grid),) = OP.kernels(*shape)
    assert name == f"wide<WideLowRank<bf16, {tile}> >"
    assert grid[0] == blocks
    args = OP.made(*shape)
    assert torch.equal(OP.result(args), OP.exactly(args))


@pytest.mark.parametrize(("tiles", "rank"), [(34, 24), (35, 72), (36, 120)])
def test_a_cluster_takes_tile_after_tile(tiles: int, rank: int) -> None:
    """There are 16 clusters, or 8 for two tiles each: the ring runs on from one to the next, and their parts of s come
    to the same place."""
    shape = (tiles * 128 - 9, 648, 72, rank)
    assert OP.kernels(*shape)[0][1][0] == 64
    args = OP.made(*shape)
    expected = OP.exactly(args)
    for seed in range(2):
        assert torch.equal(OP.result(args, seed), expected)


@pytest.mark.parametrize("bias", [False, torch.float32, torch.float16])
def test_bias(bias: torch.dtype | bool) -> None:
    args = OP.made(70, 264, 64, 16, bias=bias)
    assert torch.equal(OP.result(args), OP.exactly(args))


@pytest.mark.parametrize("dtype", HALVES)
def test_sums_are_fp32_and_s_is_rounded_once(dtype: torch.dtype) -> None:
    """Of Gaussian values, with s as one block after the other adds it up."""
    x, A, B, bias = args = OP.spec.make(Case({"M": 70, "N": 136, "K": 1032, "R": 16}, dtype, "normal"), "native", 0)
    s = (x.double() @ A.double().T).to(dtype).double()
    expected = s @ B.double().T + bias.double()
    half_a_place = expected.abs() * torch.finfo(dtype).eps / 2
    flipped = (s.abs() @ B.double().T.abs()).max() * torch.finfo(dtype).eps / 4  # where a sum rounds the other way
    assert ((OP.result(args).double() - expected).abs() <= 1.01 * half_a_place + flipped).all()


def test_the_schedule_changes_no_bit() -> None:
    args = OP.spec.make(Case({"M": 140, "N": 264, "K": 1032, "R": 40}, torch.bfloat16, "normal"), "native", 0)
    first = OP.result(args)
    for seed in range(1, 8):
        assert torch.equal(OP.result(args, seed), first)


@pytest.mark.parametrize("special", SPECIAL)
@pytest.mark.parametrize("rank", [8, 72])
def test_special_values_stay_in_their_rows(rank: int, special: float) -> None:
    """Also where a half of a step's ranks, or of the tile's, is there for no factor."""
    OP.check_special(OP.made(150, 136, 136, rank), special)


@pytest.mark.parametrize("place", [0, 1, 2], ids=["x", "A", "B"])
def test_operands_that_are_not_aligned(place: int) -> None:
    OP.check_unaligned(OP.made(70, 136, 64, 16), place)


@pytest.mark.parametrize("operand", ["x", "A", "B"])
def test_rows_that_are_apart(operand: str) -> None:
    """Whole units of 16 bytes apart they are not copied, and what lies between them is not read."""
    args = list(OP.made(70, 136, 64, 16))
    expected = OP.exactly(tuple(args))
    place = {"x": 0, "A": 1, "B": 2}[operand]
    plain = args[place]
    wide = torch.full((plain.shape[0], plain.shape[1] + 24), math.nan, dtype=plain.dtype)
    args[place] = wide[:, 8:-16].copy_(plain)
    assert torch.equal(OP.result(tuple(args)), expected)


def test_operands_of_any_strides() -> None:
    x, A, B, bias = args = OP.made(96, 136, 64, 16)
    expected = OP.exactly(args).reshape(4, 24, 136)
    assert torch.equal(OP.result((x.reshape(4, 24, 64), A, B, bias)), expected)
    turned = x.reshape(4, 24, 64).transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(OP.result((turned, A, B, bias)), expected)
    columns = (A.T.contiguous().T, B.T.contiguous().T)
    assert torch.equal(OP.result((x, *columns, bias)), expected.reshape(96, 136))
    for same in ((x[:1].expand(96, 64), A, B, bias), (x, A[:1].expand(16, 64), B, bias)):  # rows over each other
        assert torch.equal(OP.result(same), OP.exactly(same))


def test_no_rows_and_the_first_that_are_many() -> None:
    x, *rest = OP.made(65, 136, 64, 16)
    assert OP.result((x[:0], *rest)).shape == (0, 136)
    assert OP.result((x.reshape(5, 13, 64)[:, :0], *rest)).shape == (5, 0, 136)
    ((name, grid),) = OP.kernels(65, 136, 64, 16)
    assert (name, grid[0]) == ("wide<WideLowRank<bf16, 64, 64, 8, 1> >", 16)
    assert not OP.kernels(64, 136, 64, 16)[0][0].startswith("wide")


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        ((65, 16, 64, 8), None),
        ((65, 16, 64, NATIVE_WIDE_RANK), None),
        ((65, 16, 64, NATIVE_WIDE_RANK + 8), "ranks up to 128"),
        ((65, 12, 64, 8), "multiples of 8"),
        ((65, 16, 60, 8), "multiples of 8"),
        ((65, 16, 64, 4), "multiples of 8"),
        ((65, 16, 0, 8), "multiples of 8"),
    ],
)
def test_which_calls_it_takes(shape: tuple[int, ...], reason: str | None) -> None:
    OP.check_taken(OP.made(*shape), reason)


def test_fp32_is_left_to_others() -> None:
    OP.check_taken(OP.made(65, 16, 64, 8, torch.float32), "fp32")
