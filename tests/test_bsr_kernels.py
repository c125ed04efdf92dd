"""bsr_linear in CUDA C++, on the CPU: what the shapes of the conformance kit are too small for.

``BURNISH_EMULATE_CUDA=1 pytest tests/test_bsr_kernels.py``
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from burnish import dispatch, native, registry
from burnish.bench import counters
from burnish.block_format import compress, transpose_index
from burnish.ops.bsr_linear import NATIVE_ROWS, case_of

pytestmark = pytest.mark.skipif(not native.emulating(), reason="needs BURNISH_EMULATE_CUDA=1")

SPEC = registry.get("bsr_linear")
NATIVE = next(impl for impl in SPEC.impls if impl.backend == "native")
BF16, FP16 = torch.bfloat16, torch.float16
HALVES = [BF16, FP16]
SORTED = 256  # stripes, in csrc/cuda/bsr_wide.cuh
MULTIPROCESSORS = 132  # that the emulated device has


@dataclass
class Call:
    """Integers, so that sums are exact: x and a weight with so many blocks in each of its stripes."""

    x: torch.Tensor
    weight: torch.Tensor  # dense, zeros where nothing is kept
    rest: tuple[Any, ...]  # of the arguments: values, the index, scale, bias, N

    @property
    def bias(self) -> torch.Tensor | None:
        return self.rest[5]

    def expected(self, x: torch.Tensor | None = None) -> torch.Tensor:
        x = self.x if x is None else x
        y = x.double() @ self.weight.double().T
        return (y if self.bias is None else y + self.bias.double()).to(x.dtype)

    def result(self, seed: int = 0, x: torch.Tensor | None = None) -> torch.Tensor:
        args = (self.x if x is None else x, *self.rest)
        assert dispatch.objection(NATIVE, args) is None
        torch.ops.burnish.emulation_seed(seed)
        return SPEC.overload("native")(*args)

    def check(self, seeds: int) -> None:
        expected = self.expected()
        for seed in range(seeds):
            assert torch.equal(self.result(seed), expected), seed


def made(
    m: int, n: int, k: int, counts: Sequence[int], dtype: torch.dtype = BF16, bias: torch.dtype | None = None
) -> Call:
    generator = torch.Generator().manual_seed(m + n + k)
    across = math.ceil(k / 128)
    kept = torch.zeros(math.ceil(n / 128), across, dtype=torch.bool)
    for row, count in zip(kept, counts, strict=True):
        row[torch.randperm(across, generator=generator)[:count]] = True
    keep = kept.repeat_interleave(128, 0).repeat_interleave(128, 1)[:n, :k]

    def integers(most: int, *size: int) -> torch.Tensor:
        return torch.randint(-most, most + 1, size, generator=generator)

    weight = (integers(4, n, k) * keep).to(dtype)
    values, crow, col = compress(weight, (128, 128), keep=keep)
    offset = None if bias is None else integers(9, n).to(bias)
    rest = (values, crow, col, transpose_index(crow, col, across), None, offset, n)
    return Call(integers(8, m, k).to(dtype), weight, rest)


def drawn(n: int, k: int, seed: int = 0) -> list[int]:
    """Of each stripe the number of its blocks, from none to all."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, math.ceil(k / 128) + 1, (math.ceil(n / 128),), generator=generator).tolist()


@pytest.mark.parametrize("bias", [None, torch.float32, BF16])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("shape", [(65, 8, 8), (65, 136, 64), (129, 256, 200), (200, 392, 1032), (300, 264, 384)])
def test_shapes(shape: tuple[int, int, int], dtype: torch.dtype, bias: torch.dtype | None) -> None:
    """Rows, channels and columns that are no whole tiles."""
    made(*shape, [max(1, count) for count in drawn(*shape[1:])], dtype, bias).check(seeds=4)


@pytest.mark.parametrize(
    ("m", "n", "rows"), [(256 * 11 + 3, 128 * 12 - 40, 256), (128 * 8 + 5, 128 * 17 - 8, 128)], ids=["256", "128"]
)
def test_a_block_takes_tile_after_tile(m: int, n: int, rows: int) -> None:
    """More tiles than blocks, of stripes of any length, between which the rings run on."""
    assert math.ceil(m / rows) * math.ceil(n / 128) > MULTIPROCESSORS
    assert (math.ceil(m / 256) * math.ceil(n / 128) >= MULTIPROCESSORS) == (rows == 256)
    made(m, n, 384, drawn(n, 384), bias=torch.float32).check(seeds=3)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(
    "counts", [(0, 16, 1, 0, 5, 16, 2), (16, 8, 4, 2, 1, 0, 0), (0, 0, 1, 2, 4, 8, 16), (3, 3, 3, 0, 3, 3, 3)]
)
def test_stripes_of_very_different_length(counts: tuple[int, ...], dtype: torch.dtype) -> None:
    made(70, 128 * len(counts), 2048, counts, dtype, bias=dtype).check(seeds=4)


@pytest.mark.parametrize("bias", [None, torch.float32])
@pytest.mark.parametrize("shape", [(130, 264, 200), (70, 128 * 140, 136)])
def test_a_weight_without_blocks(shape: tuple[int, int, int], bias: torch.dtype | None) -> None:
    """y is the bias, or zeros."""
    made(*shape, [0] * math.ceil(shape[1] / 128), bias=bias).check(seeds=3)


@pytest.mark.parametrize("stripe", [0, 2])
def test_a_weight_of_one_block(stripe: int) -> None:
    made(130, 264, 520, [int(i == stripe) for i in range(3)], bias=torch.float32).check(seeds=4)


@pytest.mark.parametrize("stripes", [SORTED, SORTED + 30])
def test_stripes_are_sorted_in_part(stripes: int) -> None:
    n = 128 * stripes - 8
    made(66, n, 264, drawn(n, 264), bias=BF16).check(seeds=1)


def test_calls_follow_one_another() -> None:
    """Each leaves the tickets as it found them, whether its blocks drew any or only asked in vain."""
    calls = [made(m, n, 264, drawn(n, 264)) for m, n in ((66, 128 * 140), (70, 264), (700, 128 * 45), (65, 128))]
    for seed, call in enumerate(calls):
        assert torch.equal(call.result(seed), call.expected())


@pytest.mark.parametrize("special", [math.inf, math.nan])
def test_what_is_not_kept_does_not_exist(special: float) -> None:
    """An infinity or a NaN of x reaches the channels that have a block in its column, and no others: none of those of
    a stripe without blocks, and of the last column what pads a block."""
    call = made(140, 128 * 5, 392, [0, 1, 2, 4, 3])
    for column in (0, 127, 128, 300, 391):
        x = call.x.clone()
        x[17, column] = x[139, column] = special
        y = call.result(column, x)
        expected = call.expected()
        reached = (call.weight != 0).reshape(5, 128, -1).any(1)[:, column // 128 * 128 : column // 128 * 128 + 128]
        touched = reached.any(1).repeat_interleave(128)
        for row in range(140):
            clean = ~touched if row in (17, 139) else slice(None)
            assert torch.equal(y[row, clean], expected[row, clean])
        assert not torch.isfinite(y[17, touched & (call.weight[:, column] != 0)]).any()
        assert touched.any()


def test_rows_of_x_lie_anywhere() -> None:
    """What copies of tiles cannot take is copied first."""
    call = made(66, 136, 264, [3, 2])
    wide = torch.zeros(66, 272, dtype=BF16)
    aligned, apart, shifted = wide[:, :264], torch.zeros(66, 265, dtype=BF16)[:, :264], wide[:, 1:265]
    for x in (aligned, apart, shifted, torch.zeros(264, 66, dtype=BF16).T):
        assert torch.equal(call.result(x=x.copy_(call.x)), call.expected())
    repeated = call.x[:1].expand(66, -1)
    assert torch.equal(call.result(x=repeated), call.expected(repeated))
    stacked = call.x.reshape(3, 22, 264)
    assert torch.equal(call.result(x=stacked).reshape(66, -1), call.expected())


def test_which_calls_it_takes() -> None:
    def objection(m: int, n: int, k: int, block: int | str = 128, dtype: torch.dtype = BF16, **more: Any) -> str | None:
        return dispatch.objection(NATIVE, SPEC.make(case_of(m, n, k, block, 0.5, dtype, **more), "native", 0))

    assert objection(65, 136, 264) is None
    assert objection(65, 136, 264, dtype=FP16) is None
    assert objection(64, 136, 264) == f"M is 64, the kernel takes more than {NATIVE_ROWS}"
    assert objection(65, 132, 264) == "K is 264 and N 132, the kernel takes multiples of 8"
    assert objection(65, 136, 260) == "K is 260 and N 136, the kernel takes multiples of 8"
    assert objection(65, 136, 0) == "K is 0 and N 136, the kernel takes multiples of 8"
    assert objection(65, 136, 264, 64) == "blocks are 64x64, the kernel takes 128x128"
    assert objection(65, 136, 264, "4x16") == "blocks are 4x16, the kernel takes 128x128"
    assert objection(65, 136, 264, dtype=torch.float32) == "values are fp32, the kernel takes bf16 and fp16"
    assert objection(65, 136, 264, weight="int8") == "values are int8, the kernel takes bf16 and fp16"


@pytest.mark.parametrize(
    ("m", "n", "rows", "pairs", "blocks"),
    [
        (66, 264, 128, False, 3),
        (130, 264, 128, True, 6),
        (257, 264, 128, False, 9),
        (385, 264, 128, True, 12),
        (513, 264, 128, True, 18),
        (66, 128 * 132, 256, False, 132),
        (257, 128 * 67, 256, True, 132),
        (513, 128 * 45, 256, False, 132),
    ],
)
def test_tiles_are_as_large_as_there_are_many(m: int, n: int, rows: int, pairs: bool, blocks: int) -> None:
    """Blocks are pairs but where an odd one of few tiles of rows would have none beside it."""
    (row,) = counters.count([(SPEC, case_of(m, n, 128, 128, 0.5))])
    (launch,) = row.launches
    assert launch.kernel.endswith(f"wide<WideBsr<bf16, {rows}, {1 + pairs}> >"), launch.kernel
    assert launch.grid == (blocks, 1, 1)


@pytest.mark.parametrize(("m", "times"), [(384, 3), (512, 2), (640, 3)])
def test_a_pair_fetches_a_block_once(m: int, times: int) -> None:
    """For twice 128 rows, the last of which may not exist; x comes once for each block."""
    (row,) = counters.count([(SPEC, case_of(m, 512, 512, 128, 0.5))])
    kept = 8
    assert row.launches[0].count("tile_load_bytes") == kept * 128 * 2 * (times * 128 + m)
