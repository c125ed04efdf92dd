"""lora_linear in CUDA C++ for many rows, on the CPU: what the shapes of the conformance kit are too small for.

``BURNISH_EMULATE_CUDA=1 pytest tests/test_lora_kernels.py``
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from burnish import dispatch, dropout, native, registry
from burnish.bench import counters, select_cases
from burnish.ops.lora_linear import NATIVE_WIDE_RANK
from burnish.registry import Case

pytestmark = pytest.mark.skipif(not native.emulating(), reason="needs BURNISH_EMULATE_CUDA=1")

SPEC = registry.get("lora_linear")
NATIVE = next(impl for impl in SPEC.impls if impl.backend == "native")
HALVES = [torch.bfloat16, torch.float16]


def made(m: int, n: int, k: int, r: int, dtype: torch.dtype = torch.bfloat16, **options: object) -> tuple[Any, ...]:
    case = Case({"M": m, "N": n, "K": k, "R": r}, dtype, "integers", options=options)
    return SPEC.make(case, "native", 0)


def native_result(args: tuple[Any, ...], seed: int = 0) -> torch.Tensor:
    torch.ops.burnish.emulation_seed(seed)
    return SPEC.overload("native")(*args)


def exactly(args: tuple[Any, ...]) -> torch.Tensor:
    wide = [t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in args]
    return SPEC.reference(*wide).to(args[0].dtype)


def kernels(m: int, n: int, k: int, r: int) -> list[tuple[str, tuple[int, ...]]]:
    """The kernels that a call launches, and their grids."""
    (row,) = counters.count(select_cases(["lora_linear"], dtype=torch.bfloat16, shapes=[(m, n, k, r)]))
    return [(launch.kernel.split("_")[-1], launch.grid) for launch in row.launches]


@pytest.mark.parametrize("p", [False, True])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(
    "shape", [(65, 8, 8, 8), (65, 136, 64, 16), (129, 256, 72, 24), (200, 392, 200, 40), (300, 264, 328, 64)]
)
def test_shapes(shape: tuple[int, ...], dtype: torch.dtype, p: bool) -> None:
    """Rows, channels, columns and ranks that are no whole tiles, a part of the cluster's channels, or of s's rings."""
    args = made(*shape, dtype, p=p)
    expected = exactly(args)
    for seed in range(3):
        assert torch.equal(native_result(args, seed), expected)


@pytest.mark.parametrize("dtype", HALVES)
def test_sums_are_fp32(dtype: torch.dtype) -> None:
    """Of Gaussian values: s is rounded, the sum of base and adapter once."""
    case = Case({"M": 70, "N": 136, "K": 512, "R": 16}, dtype, "normal", options={"p": True})
    x, weight, _, bias, A, B, seed, scale, p, _ = args = SPEC.make(case, "native", 0)
    h = torch.where(dropout.keep(seed, 70, 512, p), x, 0.0).double()
    s = (scale * dropout.factor(p) * (h @ A.double().T)).to(dtype).double()
    expected = x.double() @ weight.double().T + bias.double() + s @ B.double().T
    half_a_place = expected.abs() * torch.finfo(dtype).eps / 2
    flipped = (s @ B.double().T).abs().max() * torch.finfo(dtype).eps / 4  # where a sum of s rounds the other way
    assert ((native_result(args).double() - expected).abs() <= 1.01 * half_a_place + flipped).all()


def test_a_block_takes_tile_after_tile_and_chunk_after_chunk() -> None:
    """35 pairs of tiles, and 140 chunks of s, for 64 blocks; the rings run on between them."""
    args = made(128 * 35 - 11, 136, 64, 16, p=True)
    expected = exactly(args)
    for seed in range(2):
        assert torch.equal(native_result(args, seed), expected)


def test_tiles_of_256_rows() -> None:
    """Where there are enough of them."""
    m, n = 1500, 128 * 23 - 8
    args = made(m, n, 72, 16)
    name, grid = kernels(m, n, 72, 16)[0]
    assert name.startswith("wide<WideLora<bf16, 256>")
    assert grid[0] == 64
    assert torch.equal(native_result(args), exactly(args))


def test_tiles_of_128_rows() -> None:
    name, grid = kernels(130, 136, 64, 8)[0]
    assert name.startswith("wide<WideLora<bf16, 128>")
    assert grid[0] == 2 * math.ceil(130 / 128)


@pytest.mark.parametrize("special", [math.inf, -math.inf, math.nan])
def test_special_values_stay_in_their_rows(special: float) -> None:
    args = made(150, 136, 128, 8)
    clean = native_result(args)
    x = args[0].clone()
    rows = [0, 77, 149]
    for row, column in zip(rows, (0, 64, 127), strict=True):
        x[row, column] = special
    y = native_result((x, *args[1:]))
    others = torch.ones(150, dtype=torch.bool)
    others[rows] = False
    assert torch.equal(y[others], clean[others])
    expected = exactly((x, *args[1:]))
    torch.testing.assert_close(y[rows], expected[rows], equal_nan=True, rtol=0.0, atol=0.0)


def test_what_is_dropped_is_gone() -> None:
    """A NaN that no adapter sees is in the base's sums alone; where the base's column is zero too, nothing of p = 1
    is left of A."""
    x, weight, scale, bias, A, B, _, c, _, format = made(70, 16, 64, 8)
    seed = torch.tensor([7])
    A = torch.full_like(A, math.nan)
    y = native_result((x, weight, scale, bias, A, B, seed, c, 1.0, format))
    # 0 * NaN: the reference multiplies what is dropped as zeros
    assert torch.equal(torch.isnan(y), torch.isnan(exactly((x, weight, scale, bias, A, B, seed, c, 1.0, format))))


@pytest.mark.parametrize("operand", ["x", "weight", "A", "B"])
def test_operands_that_are_not_aligned(operand: str) -> None:
    """By two bytes, and by rows that are apart."""
    args = list(made(70, 136, 64, 16, p=True))
    expected = exactly(tuple(args))
    place = {"x": 0, "weight": 1, "A": 4, "B": 5}[operand]
    plain = args[place]
    for apart in (plain.shape[1], plain.shape[1] + 1):
        memory = torch.zeros(plain.shape[0] * apart + 1, dtype=plain.dtype)
        args[place] = memory[1:].as_strided(plain.shape, (apart, 1)).copy_(plain)
        assert args[place].data_ptr() % 16
        assert torch.equal(native_result(tuple(args)), expected)


def test_x_of_any_strides() -> None:
    x, *rest = made(96, 136, 64, 16)
    expected = exactly((x, *rest)).reshape(4, 24, 136)
    assert torch.equal(native_result((x.reshape(4, 24, 64), *rest)), expected)
    one = x[:1].expand(96, 64)  # rows that lie over each other
    assert torch.equal(native_result((one, *rest[:5], None, *rest[6:])), exactly((one, *rest[:5], None, *rest[6:])))
    turned = x.reshape(4, 24, 64).transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(native_result((turned, *rest)), expected)


@pytest.mark.parametrize(
    ("shape", "options", "reason"),
    [
        ((65, 16, 64, 8), {}, None),
        ((65, 16, 64, NATIVE_WIDE_RANK), {}, None),
        ((65, 16, 64, NATIVE_WIDE_RANK + 8), {}, "ranks up to 64"),
        ((65, 12, 64, 8), {}, "multiples of 8"),
        ((65, 16, 60, 8), {}, "multiples of 8"),
        ((65, 16, 64, 4), {}, "multiples of 8"),
        ((65, 16, 0, 8), {}, "multiples of 8"),
        ((65, 16, 64, 8), {"base": "int8"}, "int8, the large-M kernel takes bf16 and fp16"),
    ],
)
def test_which_calls_it_takes(shape: tuple[int, ...], options: dict[str, object], reason: str | None) -> None:
    args = made(*shape, **options)
    said = dispatch.resolve(NATIVE.supports)(*args)
    assert said is None if reason is None else reason in said
    if reason is not None:
        with pytest.raises(RuntimeError, match=r"lora_linear\.native"):
            native_result(args)


def test_fp32_is_left_to_others() -> None:
    args = made(65, 16, 64, 8, torch.float32)
    assert "fp32" in dispatch.resolve(NATIVE.supports)(*args)
    with pytest.raises(RuntimeError, match=r"more than 64 rows take"):
        native_result(args)
