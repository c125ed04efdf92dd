"""lora_linear in CUDA C++ for many rows, on the CPU: what the shapes of the conformance kit are too small for.

``BURNISH_EMULATE_CUDA=1 pytest tests/test_lora_kernels.py``
"""

from __future__ import annotations

import math

import pytest
import torch
from burnish import dropout
from burnish.ops.lora_linear import NATIVE_WIDE_RANK
from burnish.registry import Case
from many_rows import HALVES, SPECIAL, ManyRows, only_emulated

pytestmark = only_emulated

OP = ManyRows("lora_linear")


@pytest.mark.parametrize("p", [False, True])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(
    "shape", [(65, 8, 8, 8), (65, 136, 64, 16), (129, 256, 72, 24), (200, 392, 200, 40), (300, 264, 328, 64)]
)
def test_shapes(shape: tuple[int, ...], dtype: torch.dtype, p: bool) -> None:
    """Rows, channels, columns and ranks that are no whole tiles, a part of the cluster's channels, or of s's rings."""
    args = OP.made(*shape, dtype, p=p)
    expected = OP.exactly(args)
    for seed in range(3):
        assert torch.equal(OP.result(args, seed), expected)


@pytest.mark.parametrize("dtype", HALVES)
def test_sums_are_fp32(dtype: torch.dtype) -> None:
    """Of Gaussian values: s is rounded, the sum of base and adapter once."""
    case = Case({"M": 70, "N": 136, "K": 512, "R": 16}, dtype, "normal", options={"p": True})
    x, weight, _, bias, A, B, seed, scale, p, _ = args = OP.spec.make(case, "native", 0)
    h = torch.where(dropout.keep(seed, 70, 512, p), x, 0.0).double()
    s = (scale * dropout.factor(p) * (h @ A.double().T)).to(dtype).double()
    expected = x.double() @ weight.double().T + bias.double() + s @ B.double().T
    half_a_place = expected.abs() * torch.finfo(dtype).eps / 2
    flipped = (s @ B.double().T).abs().max() * torch.finfo(dtype).eps / 4  # where a sum of s rounds the other way
    assert ((OP.result(args).double() - expected).abs() <= 1.01 * half_a_place + flipped).all()


def test_a_block_takes_tile_after_tile_and_chunk_after_chunk() -> None:
    """35 pairs of tiles, and 140 chunks of s, for 64 blocks; the rings run on between them."""
    args = OP.made(128 * 35 - 11, 136, 64, 16, p=True)
    expected = OP.exactly(args)
    for seed in range(2):
        assert torch.equal(OP.result(args, seed), expected)


def test_tiles_of_256_rows() -> None:
    """Where there are enough of them."""
    m, n = 1500, 128 * 23 - 8
    args = OP.made(m, n, 72, 16)
    name, grid = OP.kernels(m, n, 72, 16)[0]
    assert name.startswith("wide<WideLora<bf16, 256>")
    assert grid[0] == 64
    assert torch.equal(OP.result(args), OP.exactly(args))


def test_tiles_of_128_rows() -> None:
    name, grid = OP.kernels(130, 136, 64, 8)[0]
    assert name.startswith("wide<WideLora<bf16, 128>")
    assert grid[0] == 2 * math.ceil(130 / 128)


@pytest.mark.parametrize("special", SPECIAL)
def test_special_values_stay_in_their_rows(special: float) -> None:
    OP.check_special(OP.made(150, 136, 128, 8), special)


def test_what_is_dropped_is_gone() -> None:
    """A NaN that no adapter sees is in the base's sums alone; where the base's column is zero too, nothing of p = 1
    is left of A."""
    x, weight, scale, bias, A, B, _, c, _, format = OP.made(70, 16, 64, 8)
    seed = torch.tensor([7])
    A = torch.full_like(A, math.nan)
    y = OP.result((x, weight, scale, bias, A, B, seed, c, 1.0, format))
    # 0 * NaN: the reference multiplies what is dropped as zeros
    assert torch.equal(torch.isnan(y), torch.isnan(OP.exactly((x, weight, scale, bias, A, B, seed, c, 1.0, format))))


@pytest.mark.parametrize("place", [0, 1, 4, 5], ids=["x", "weight", "A", "B"])
def test_operands_that_are_not_aligned(place: int) -> None:
    OP.check_unaligned(OP.made(70, 136, 64, 16, p=True), place)


def test_x_of_any_strides() -> None:
    x, *rest = OP.made(96, 136, 64, 16)
    expected = OP.exactly((x, *rest)).reshape(4, 24, 136)
    assert torch.equal(OP.result((x.reshape(4, 24, 64), *rest)), expected)
    one = x[:1].expand(96, 64)  # rows that lie over each other
    assert torch.equal(OP.result((one, *rest[:5], None, *rest[6:])), OP.exactly((one, *rest[:5], None, *rest[6:])))
    turned = x.reshape(4, 24, 64).transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(OP.result((turned, *rest)), expected)


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
    OP.check_taken(OP.made(*shape, **options), reason)


def test_fp32_is_left_to_others() -> None:
    OP.check_taken(OP.made(65, 16, 64, 8, torch.float32), "fp32")
