"""sparse24_linear in CUDA C++, on the CPU: what the shapes of the conformance kit are too small for.

``BURNISH_EMULATE_CUDA=1 pytest tests/test_sparse24_kernels.py``
"""

from __future__ import annotations

import json
import math

import pytest
import torch
from burnish import native, registry
from burnish.bench import counters, select_cases
from burnish.registry import Case
from burnish.sparse24_format import expand

pytestmark = pytest.mark.skipif(not native.emulating(), reason="needs BURNISH_EMULATE_CUDA=1")

SPEC = registry.get("sparse24_linear")
HALVES = [torch.bfloat16, torch.float16]


def made(m: int, n: int, k: int, dtype: torch.dtype = torch.bfloat16, **options: object) -> tuple[torch.Tensor, ...]:
    return SPEC.make(Case({"M": m, "N": n, "K": k}, dtype, "integers", options=options), "native", 0)


def native_result(args: tuple[torch.Tensor, ...], seed: int = 0) -> torch.Tensor:
    torch.ops.burnish.emulation_seed(seed)
    return SPEC.overload("native")(*args)


def kernels(m: int, n: int, k: int, dtype: torch.dtype = torch.bfloat16) -> list[tuple[str, tuple[int, ...]]]:
    """The kernels that a call launches, and their grids."""
    (row,) = counters.count(select_cases(["sparse24_linear"], dtype=dtype, shapes=[(m, n, k)]))
    return [(launch.kernel.split("_")[-1], launch.grid) for launch in row.launches]


#: tiles of the kernel of many rows: of a warpgroup's channels, rows, and blocks that share x
SMALL, LARGE, LARGEST = "1, 128, 1", "2, 128, 2", "2, 176, 2"


@pytest.mark.parametrize("weight", [None, "int8"])
@pytest.mark.parametrize(
    ("m", "n", "k", "tile"),
    [
        (128 * 33 + 3, 520, 128, SMALL),
        (128 * 15 + 3, 512 * 7 + 136, 128, LARGE),
        (176 * 15 + 3, 512 * 7 + 136, 128, LARGEST),
        (300, 128 * 66 + 8, 384, LARGE),
        (400, 128 * 66 + 8, 384, LARGEST),
    ],
)
def test_a_block_takes_tile_after_tile(m: int, n: int, k: int, tile: str, weight: str | None) -> None:
    """The last ones in part, 132 blocks or 66 pairs of them; the ring runs on between tiles, and goes round in a tile
    that is deep."""
    check_tiles(m, n, k, tile, weight)


def test_a_block_takes_many_tiles_of_one_stage() -> None:
    """Seven, more than the ring has places for their metadata."""
    check_tiles(128 * 132 * 6 + 3, 72, 128, SMALL, "int8")


def check_tiles(m: int, n: int, k: int, tile: str, weight: str | None) -> None:
    args = made(m, n, k, weight=weight)
    torch.ops.burnish.emulation_count(True)
    try:
        assert torch.equal(native_result(args, seed=k), SPEC.reference(*args))
        launches = [launch["kernel"] for launch in json.loads(torch.ops.burnish.emulation_counters())]
    finally:
        torch.ops.burnish.emulation_count(False)
    (wide,) = (kernel for kernel in launches if "_wide<" in kernel)
    assert wide.endswith(f", {tile}> >")


@pytest.mark.parametrize("weight", [None, "int8"])
@pytest.mark.parametrize(("m", "n", "k", "blocks"), [(65, 136, 1024, 4), (128, 128, 4096, 8), (200, 72, 2176, 8)])
def test_blocks_share_the_depth(m: int, n: int, k: int, blocks: int, weight: str | None) -> None:
    """Also where the last of them has less of it than the others."""
    args = made(m, n, k, weight=weight)
    expected = SPEC.reference(*args)
    for seed in range(4):
        assert torch.equal(native_result(args, seed), expected)
    if weight is None:
        name, grid = kernels(m, n, k)[0]
        assert name == "wide<Wide24<bf16, 1, 128, 1> >"
        assert grid[0] == blocks * math.ceil(m / 128) * math.ceil(n / 128)


def check_special(m: int, n: int, k: int, dtype: torch.dtype, special: float) -> None:
    x, values, metadata, _, bias = made(m, min(n, 264), k, dtype)
    if n > 264:  # the same channels again and again
        values, metadata, bias = (
            part.repeat(math.ceil(n / 264), *(1 for _ in part.shape[1:]))[:n] for part in (values, metadata, bias)
        )
    metadata = metadata.clone()
    metadata[:, k // 8 - 1] = 0x44  # places 0 and 1: the last column is kept by none
    clean = native_result((x, values, metadata, None, bias))
    x = x.clone()
    rows = [0, m // 2, m - 1]
    for row, column in zip(rows, (k - 1, 3, k // 2), strict=True):
        x[row, column] = special
    expected = (x[rows].double() @ expand(values, metadata, n, k).double().T + bias.double()).to(dtype)
    y = native_result((x, values, metadata, None, bias), seed=1)
    torch.testing.assert_close(y[rows], expected, equal_nan=True, rtol=0.0, atol=0.0)
    others = torch.ones(m, dtype=torch.bool)
    others[rows] = False
    assert torch.equal(y[others], clean[others])
    assert torch.isnan(y[0]).all()


@pytest.mark.parametrize("special", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("shape", [(70, 72, 1024), (18, 40, 512), (130, 300, 256)])
def test_infinities_and_nans_meet_the_zeros(shape: tuple[int, int, int], dtype: torch.dtype, special: float) -> None:
    """A dense layer multiplies them by what the weight does not keep too; rows without any are as ever. Of a column
    that no channel keeps, nothing but that is left. By tiles most of whose channels are not there as well."""
    check_special(*shape, dtype, special)


@pytest.mark.parametrize("shape", [(18, 40, 512), (66, 40, 512), (40, 300, 512), (66, 264, 512)])
def test_an_infinity_is_found_wherever_it_is(shape: tuple[int, int, int]) -> None:
    """One at a time, in every stage of the depth, where no channel keeps it."""
    x, values, metadata, _, bias = made(*shape)
    metadata = torch.full_like(metadata, 0x44)  # places 0 and 1
    clean = native_result((x, values, metadata, None, bias))
    for column in range(3, shape[2], 32):
        special = x.clone()
        special[17, column] = math.inf
        y = native_result((special, values, metadata, None, bias), seed=column)
        assert torch.isnan(y[17]).all(), column
        assert torch.equal(y[:17], clean[:17])
        assert torch.equal(y[18:], clean[18:])


@pytest.mark.parametrize("m", [300, 400])
def test_infinities_meet_the_zeros_of_many_tiles(m: int) -> None:
    """So many that pairs of blocks take them: of 128 rows, and of 176, which those that multiply again do not have."""
    check_special(m, 128 * 66 + 8, 128, torch.bfloat16, math.inf)


def test_an_infinity_is_found_by_whoever_watches_its_stage() -> None:
    """Of 18 stages, by 16 blocks of those that take the same rows; and by those that multiply the rows again, of which
    the first of their tile are in another tile that was watched."""
    m, n, k = 400, 128 * 66 + 8, 64 * 18
    x, values, metadata, _, bias = made(m, n, k)
    metadata = torch.full_like(metadata, 0x44)  # places 0 and 1
    places = [(200, 64 * 16 + 3), (399, 64 * 17 + 3)]
    for row, column in places:
        x[row, column] = math.inf
    y = native_result((x, values, metadata, None, bias))
    assert torch.isnan(y).all(1).nonzero().flatten().tolist() == [row for row, _ in places]


def test_which_calls_it_takes() -> None:
    def wide(*call: object) -> list[str]:
        return [name.partition("<")[0] for name, _ in kernels(*call)]  # type: ignore[arg-type]

    assert wide(65, 136, 128) == ["wide", "tiles"]  # the second for tiles with an infinity, of which there are none
    assert wide(65, 136, 128, torch.float16) == ["wide", "tiles"]
    assert wide(64, 136, 128) == ["tiles"]
    assert wide(65, 132, 128) == ["tiles"]  # rows of y that are no multiple of 16 bytes
    assert wide(65, 136, 136) == ["tiles"]  # nor rows of metadata
    x, *rest = made(65, 136, 128)
    apart = torch.zeros(65, 129, dtype=x.dtype)[:, :128].copy_(x)  # nor rows of x
    assert torch.equal(native_result((apart, *rest)), native_result((x, *rest)))
    repeated = x[:1].expand(65, -1)  # rows of x that lie over each other
    assert torch.equal(native_result((repeated, *rest)), native_result((repeated.contiguous(), *rest)))
