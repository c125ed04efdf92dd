"""The formats of 2:4 and of unstructured weights, over drawn patterns: exact inverses, and the ops on them."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from burnish import ops
from burnish.ops import sparse24_linear
from burnish.ops.sparse24_linear import compress as compress24
from burnish.ops.sparse24_linear import expand as expand24
from burnish.ops.sparse24_linear import sparse24_linear_backward
from burnish.ops.sparse_linear import compress, expand, sparse_linear, sparse_linear_backward
from burnish.sparse24_format import positions
from hypothesis import given, settings
from hypothesis import strategies as st

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WORDS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.int8: torch.int8}

sizes = st.tuples(st.integers(1, 21), st.one_of(st.integers(0, 9), st.integers(60, 70), st.integers(126, 140)))
patterns = st.sampled_from(("empty", "full", "even", "sparse", "rows"))


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(WORDS[tensor.dtype])


def drawn_mask(N: int, K: int, pattern: str, generator: torch.Generator) -> torch.Tensor:
    """Any elements: none, all, half, a tenth, or rows that are empty and full by turns."""
    share = {"empty": 0.0, "full": 1.0, "even": 0.5, "sparse": 0.1, "rows": 0.5}[pattern]
    mask = torch.rand(N, K, generator=generator) < share
    if pattern == "rows":
        mask[::3], mask[1::3] = False, True
    return mask


def two_of_four(mask: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """The mask without all but two, drawn ones, of each four."""
    N, K = mask.shape
    order = torch.rand(N, -(-K // 4), 4, generator=generator).argsort(-1).flatten(1)[:, :K]
    return mask & (order < 2)


def drawn_weight(N: int, K: int, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """Integers with negative zeros and NaN in between, of which a format must keep each bit."""
    weight = torch.randint(-8, 9, (N, K), generator=generator).to(dtype)
    if dtype.is_floating_point:
        odd = torch.rand(N, K, generator=generator)
        weight[odd < 0.2], weight[odd > 0.9] = -0.0, float("nan")
    return weight


@given(size=sizes, pattern=patterns, dtype=st.sampled_from((*DTYPES, torch.int8)), seed=st.integers(0, 2**20))
@settings(max_examples=300, deadline=None)
def test_2_of_4_round_trips_bit_for_bit(size: tuple[int, int], pattern: str, dtype: torch.dtype, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    mask = two_of_four(drawn_mask(*size, pattern, generator), generator)
    weight = drawn_weight(*size, dtype, generator)
    values, metadata = compress24(weight, mask)
    assert torch.equal(bits(expand24(values, metadata, *size)), bits(weight).where(mask, 0))
    first, second = positions(metadata).view(size[0], -1, 2).unbind(-1)
    assert bool((first < second).all())
    assert bool((first // 4 == second // 4).all())
    again = compress24(expand24(values, metadata, *size), mask)
    assert torch.equal(bits(again[0]), bits(values))
    assert torch.equal(again[1], metadata)


@given(size=sizes, pattern=patterns, dtype=st.sampled_from(DTYPES), seed=st.integers(0, 2**20))
@settings(max_examples=300, deadline=None)
def test_a_bitmap_round_trips_bit_for_bit(size: tuple[int, int], pattern: str, dtype: torch.dtype, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    mask, weight = drawn_mask(*size, pattern, generator), drawn_weight(*size, dtype, generator)
    values, bitmap, row_starts = compress(weight, mask)
    assert torch.equal(bits(expand(values, bitmap, *size)), bits(weight).where(mask, 0))
    assert values.numel() == int(mask.sum()) == int(row_starts[-1])
    again = compress(expand(values, bitmap, *size), mask)
    assert torch.equal(bits(again[0]), bits(values))
    assert torch.equal(again[1], bitmap)
    assert torch.equal(again[2], row_starts)


@given(rows=st.integers(0, 30), size=sizes, pattern=patterns, dtype=st.sampled_from(DTYPES), seed=st.integers(0, 2**20))
@settings(max_examples=300, deadline=None)
def test_the_ops_equal_a_dense_layer_on_integers(
    rows: int, size: tuple[int, int], pattern: str, dtype: torch.dtype, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    mask = drawn_mask(*size, pattern, generator)
    weight = torch.randint(-8, 9, size, generator=generator).to(dtype)
    x = torch.randint(-8, 9, (rows, size[1]), generator=generator).to(dtype)
    exact = F.linear(x.double(), weight.double().where(mask, 0)).to(dtype)
    assert torch.equal(sparse_linear(x, *compress(weight, mask)), exact)
    mask = two_of_four(mask, generator)
    exact = F.linear(x.double(), weight.double().where(mask, 0)).to(dtype)
    assert torch.equal(sparse24_linear(x, *compress24(weight, mask)), exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [3, 20])
def test_a_thread_begins_with_a_weight_of_no_columns(rows: int, dtype: torch.dtype) -> None:
    """Before any other call has left memory to the thread."""
    x, weight, dy = torch.ones(rows, 0, dtype=dtype), torch.ones(5, 0, dtype=dtype), torch.ones(rows, 5, dtype=dtype)
    kept = compress(weight, weight.bool())
    with ThreadPoolExecutor(1) as fresh:
        y = fresh.submit(sparse_linear, x, *kept).result()
    with ThreadPoolExecutor(1) as fresh:
        dx, dvalues, _ = fresh.submit(sparse_linear_backward, dy, x, *kept, True, True, False).result()
    assert torch.equal(y, torch.zeros_like(dy))
    assert dx.shape == x.shape
    assert dvalues.numel() == 0


@given(rows=st.integers(0, 20), size=sizes, dtype=st.sampled_from(DTYPES), seed=st.integers(0, 2**20))
@settings(max_examples=200, deadline=None)
def test_int8_values_give_the_bits_of_the_dense_int8_layer(
    rows: int, size: tuple[int, int], dtype: torch.dtype, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    mask = two_of_four(drawn_mask(*size, "full", generator), generator)
    weight = torch.randint(-128, 128, size, generator=generator).to(torch.int8).where(mask, 0)
    x = torch.randn(rows, size[1], generator=generator).to(dtype)
    scale, bias = torch.rand(size[0], generator=generator) + 0.5, torch.randn(size[0], generator=generator)
    dense = ops.int8_linear(x, ops.int8_linear_pack(weight), scale, bias)
    assert torch.equal(bits(sparse24_linear(x, *compress24(weight, mask), scale, bias)), bits(dense))


@given(size=sizes, seed=st.integers(0, 2**20))
@settings(max_examples=100, deadline=None)
def test_a_pattern_that_is_not_2_of_4_is_refused(size: tuple[int, int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    N, K = size[0], size[1] + 3
    mask = two_of_four(drawn_mask(N, K, "even", generator), generator)
    row, group = (int(torch.randint(0, limit, (1,), generator=generator)) for limit in (N, -(-K // 4)))
    columns = slice(group * 4, group * 4 + 4)
    if mask[row, columns].numel() < 3:
        columns = slice(0, 4)
    mask[row, columns] = True
    count = mask[row, columns].numel()
    message = (
        rf"sparse24_linear: weight keeps {count} of columns {columns.start} to .* in row {row}, expected at most 2"
    )
    with pytest.raises(ValueError, match=message):
        compress24(torch.ones(N, K), mask)


@pytest.mark.parametrize("make", [compress24, compress])
@pytest.mark.parametrize(
    ("weight", "mask", "message"),
    [
        (torch.ones(4), None, r"weight has shape \(4,\), expected \[N, K\]"),
        (torch.ones(0, 4), None, "weight has shape .*N >= 1"),
        (torch.ones(2, 4), torch.ones(2, 4), "mask is fp32 of shape .*, expected bool"),
        (torch.ones(2, 4), torch.ones(2, 8, dtype=torch.bool), r"mask is bool of shape \(2, 8\), expected bool of"),
    ],
    ids=["vector", "no_rows", "float_mask", "mask_shape"],
)
def test_what_is_no_weight_is_refused(make: Any, weight: torch.Tensor, mask: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(weight, mask)


def contradictions() -> dict[str, Any]:
    """Changes of a bitmap weight after which its parts contradict each other."""

    def starts(*changes: tuple[int, int]) -> Any:
        def change(values: torch.Tensor, bitmap: torch.Tensor, row_starts: torch.Tensor) -> tuple[torch.Tensor, ...]:
            row_starts = row_starts.clone()
            for row, step in changes:
                row_starts[row] += step
            return values, bitmap, row_starts

        return change

    def bitmap(row: int, byte: int, bit: int) -> Any:
        def change(values: torch.Tensor, bitmap: torch.Tensor, row_starts: torch.Tensor) -> tuple[torch.Tensor, ...]:
            bitmap = bitmap.clone()
            bitmap[row, byte] ^= 1 << bit
            return values, bitmap, row_starts

        return change

    return {
        "too_few_values": lambda v, b, r: (v[:-1].clone(), b, r),
        "too_many_values": lambda v, b, r: (torch.cat((v, v)), b, r),
        "no_values": lambda v, b, r: (v[:0], b, r),
        "full_bitmap": lambda v, b, r: (v, torch.full_like(b, 255), r),
        "bit_beyond_k": bitmap(3, 15, 7),
        "bit_more_or_less": bitmap(0, 2, 3),
        "bit_in_the_last_row": bitmap(-1, 2, 3),
        "negative_start": starts((0, -5)),
        "start_far_away": starts((2, 2**40)),
        "start_far_before": starts((2, -(2**40))),
        "starts_descend": starts((4, -50)),
        "shifted": starts((5, 1)),
    }


@pytest.mark.parametrize("name", contradictions())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 40])
def test_a_bitmap_that_contradicts_its_values_is_refused(name: str, dtype: torch.dtype, rows: int) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(21, 100, generator=generator).to(dtype)
    good = compress(weight, drawn_mask(21, 100, "even", generator))
    x = torch.randn(rows, 100, generator=generator).to(dtype)
    sparse_linear(x, *good)
    bad = contradictions()[name](*good)
    with pytest.raises(RuntimeError, match=r"sparse_linear: (row_starts begins with|row \d+ of bitmap keeps)"):
        sparse_linear(x, *bad)
    with pytest.raises(RuntimeError, match=r"sparse_linear_backward: (row_starts begins with|row \d+ of bitmap keeps)"):
        torch.ops.burnish.sparse_linear_backward(torch.ones(rows, 21, dtype=dtype), x, *bad, True, True, True)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.int8], ids=str)
def test_any_metadata_stays_in_bounds(dtype: torch.dtype) -> None:
    """Metadata that no compress makes gives some result, and reads nothing that is not there."""
    generator = torch.Generator().manual_seed(0)
    metadata = torch.randint(0, 256, (17, 13), generator=generator).to(torch.uint8)
    values = torch.ones(17, 52).to(dtype)
    scale = torch.ones(17) if dtype == torch.int8 else None
    for rows in (1, 40):
        x = torch.ones(rows, 100).to(torch.float32 if scale is not None else dtype)
        assert sparse24_linear(x, values, metadata, scale).shape == (rows, 17)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("density", [0.0, 0.03, 0.1, 0.5, 1.0])
def test_sparse_rows_of_any_number_are_exact_and_their_nans_stay_theirs(density: float, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    for M in (1, 4, 8, 16, 17, 64, 70):
        for N, K in ((1, 1), (33, 130), (40, 1500)):
            weight = torch.randint(-8, 9, (N, K), generator=generator).to(dtype)
            mask = torch.rand(N, K, generator=generator) < density
            x = torch.randint(-3, 4, (M, K), generator=generator).to(dtype)
            packed = compress(weight, mask)
            exact = (x.double() @ weight.where(mask, 0).double().T).to(dtype)
            assert torch.equal(sparse_linear(x, *packed), exact)
            x[M // 2, K // 2] = float("nan")
            y = sparse_linear(x, *packed)
            assert y[M // 2].isnan().all()
            y[M // 2] = exact[M // 2]
            assert torch.equal(y, exact)


@pytest.mark.parametrize("M", [2, 30])
@pytest.mark.parametrize("density", [0.05, 0.5])
def test_parts_of_a_sparse_weight_that_contradict_each_other_are_refused(M: int, density: float) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(40, 300, generator=generator)
    values, bitmap, starts = compress(weight, torch.rand(40, 300, generator=generator) < density)
    x = torch.randn(M, 300, generator=generator)
    more, beyond, moved = bitmap.clone(), bitmap.clone(), starts.clone()
    more[7, 3] ^= 16
    beyond[8, 39] |= 128
    moved[9] += 1
    for bits, where in ((more, starts), (beyond, starts), (bitmap, moved)):
        with pytest.raises(RuntimeError, match="of bitmap keeps other elements than row_starts counts"):
            sparse_linear(x, values, bits, where)
    with pytest.raises(RuntimeError, match="row_starts begins with 0 and ends with"):
        sparse_linear(x, values[:-1], bitmap, starts)


@pytest.mark.parametrize("M", [1, 65, 70, 130, 300])
@pytest.mark.parametrize("form", ["2:4", "2:4 of int8", "bitmap"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_of_wide_weights_are_exact_on_integers(M: int, form: str, dtype: torch.dtype) -> None:
    """Columns of a weight are expanded together, the more the fewer rows there are, and some of its rows at a time."""
    N, K = 75, 1083
    generator = torch.Generator().manual_seed(M)
    mask = torch.rand(N, K, generator=generator) < 0.5
    mask = mask if form == "bitmap" else two_of_four(mask, generator)
    weight = torch.randint(-4, 5, (N, K), generator=generator) * mask
    dy = torch.randint(-1, 2, (M, N), generator=generator)
    x = torch.randint(-1, 2, (M, K), generator=generator)
    if form == "bitmap":
        dx, dvalues, _ = sparse_linear_backward(
            dy.to(dtype), x.to(dtype), *compress(weight.to(dtype), mask), True, True, False
        )
        assert torch.equal(dvalues.long(), (dy.T @ x)[mask])
    else:
        as_int8 = form == "2:4 of int8"
        values, metadata = compress24(weight.to(torch.int8 if as_int8 else dtype), mask)
        scale = torch.ones(N) if as_int8 else None
        dx, dvalues, _ = sparse24_linear_backward(
            dy.to(dtype), x.to(dtype), values, metadata, scale, True, not as_int8, False
        )
        if not as_int8:
            padded = F.pad(dy.T @ x, (0, -K % 8))
            assert torch.equal(dvalues.long(), padded.gather(1, positions(metadata)))
    assert torch.equal(dx.long(), (dy @ weight).to(dtype).long())
