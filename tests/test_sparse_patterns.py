"""Block patterns of every kind: the format is exact both ways, and the op is the dense layer on integers, exactly."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from burnish import ops
from burnish.block_format import BLOCKS, check_index
from burnish.ops.bsr_linear import compress, expand, transpose_index
from hypothesis import given, settings
from hypothesis import strategies as st

PATTERNS = ("random", "empty", "full", "single", "some_rows_empty", "one_row_full", "one_column_full")


def masked(N: int, K: int, block: tuple[int, int], pattern: str, generator: torch.Generator) -> torch.Tensor:
    """bool [N, K] by whole blocks."""
    down, across = -(-N // block[0]), -(-K // block[1])
    grid = torch.rand(down, across, generator=generator) < 0.5
    if pattern in ("empty", "full"):
        grid[:] = pattern == "full"
    elif pattern == "single":
        grid[:] = False
        grid[down // 2, across // 2] = True
    elif pattern == "some_rows_empty":
        grid[::2] = False
    elif pattern == "one_row_full":
        grid[down // 2] = True
    elif pattern == "one_column_full":
        grid[:, across // 2] = True
    return grid.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)[:N, :K]


sizes = st.tuples(st.integers(1, 20), st.integers(1, 150), st.integers(1, 150))


@settings(max_examples=150, derandomize=True, database=None, deadline=None)
@given(sizes, st.sampled_from(BLOCKS), st.sampled_from(PATTERNS), st.integers(0, 2**16))
def test_any_pattern_of_blocks(size: tuple[int, int, int], block: tuple[int, int], pattern: str, seed: int) -> None:
    M, N, K = size
    generator = torch.Generator().manual_seed(seed)
    keep = masked(N, K, block, pattern, generator)
    weight = torch.randint(-8, 9, (N, K), generator=generator) * keep
    x, dy = (torch.randint(-8, 9, (M, width), generator=generator).bfloat16() for width in (K, N))
    for dtype in (torch.float32, torch.bfloat16):
        dense = weight.to(dtype)
        values, crow, col = compress(dense, block, keep)
        transposed = transpose_index(crow, col, -(-K // block[1]))
        check_index("a layer", crow, col, -(-K // block[1]))
        assert len(values) == len(col) == int(crow[-1])
        assert torch.equal(expand(values, crow, col, N, K), dense)
        wide, values = x.to(dtype).requires_grad_(), values.requires_grad_()
        y = ops.bsr_linear(wide, values, crow, col, transposed, None, None, N)
        assert torch.equal(y, F.linear(x.double(), dense.double()).to(dtype))
        y.backward(dy.to(dtype))
        assert torch.equal(wide.grad, (dy.double() @ dense.double()).to(dtype))
        full = (dy.double().T @ x.double() * keep).to(dtype)
        assert torch.equal(expand(values.grad, crow, col, N, K), full)


def test_every_bit_of_a_kept_block_comes_back() -> None:
    weight = torch.zeros(40, 50, dtype=torch.int32)
    weight[3, 7], weight[20, 40], weight[20, 41] = 0x7FC01234, -0x80000000, 0x00000001  # a NaN, -0 and a subnormal
    weight = weight.view(torch.float32)
    back = expand(*compress(weight, (16, 16)), 40, 50)
    assert torch.equal(back.view(torch.int32), weight.view(torch.int32))


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("M", [1, 3, 18])
def test_int8_values_give_the_bits_of_int8_linear(block: tuple[int, int], M: int) -> None:
    generator = torch.Generator().manual_seed(M)
    keep = masked(70, 150, block, "random", generator)
    weight = (torch.randint(-128, 128, (70, 150), generator=generator) * keep).to(torch.int8)
    scale, bias = torch.rand(70, generator=generator), torch.randn(70, generator=generator)
    values, crow, col = compress(weight, block, keep)
    index = transpose_index(crow, col, -(-150 // block[1]))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = torch.randn(M, 150, generator=generator).to(dtype)
        expected = ops.int8_linear(x, ops.int8_linear_pack(weight), scale, bias)
        assert torch.equal(ops.bsr_linear(x, values, crow, col, index, scale, bias, 70), expected)


def small() -> tuple[torch.Tensor, ...]:
    values, crow, col = compress(torch.ones(32, 48), (16, 16))
    return values, crow, col, transpose_index(crow, col, 3)


@pytest.mark.parametrize(
    ("which", "place", "index", "match"),
    [
        (1, 1, 9, "crow_indices does not run from 0 to 6"),
        (1, 2, 5, "crow_indices does not run from 0 to 6"),
        (2, 4, 3, "col_indices has an index out of range, expected 0 to 2"),
        (2, 0, -1, "col_indices has an index out of range"),
    ],
)
def test_an_index_out_of_range_is_refused_before_memory_is_read(which: int, place: int, index: int, match: str) -> None:
    weight = list(small())
    weight[which][place] = index
    with pytest.raises(RuntimeError, match=f"bsr_linear: {match}"):
        ops.bsr_linear(torch.ones(2, 48), *weight, None, None, 32)


@pytest.mark.parametrize(("place", "index"), [(1, 100), (3, 7), (4, 2), (5, -1), (10, 6), (15, -3)])
def test_a_transposed_index_out_of_range_is_refused_in_backward(place: int, index: int) -> None:
    values, crow, col, transposed = small()
    transposed[place] = index
    x = torch.ones(2, 48, requires_grad=True)
    y = ops.bsr_linear(x, values, crow, col, transposed, None, None, 32)
    with pytest.raises(RuntimeError, match="bsr_linear_backward: transposed"):
        y.sum().backward()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda w: compress(w, (8, 8)), r"block is \(8, 8\), expected one of"),
        (lambda w: compress(w[0], (16, 16)), "weight has shape"),
        (lambda w: compress(w, (16, 16), torch.ones(32, 48)), "keep is torch.float32"),
        (lambda w: compress(w, (16, 16), torch.zeros(32, 48, dtype=torch.bool)), "not zero in block .*6 of 6 blocks"),
    ],
)
def test_what_has_no_such_form_is_refused(change, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        change(torch.ones(32, 48))
