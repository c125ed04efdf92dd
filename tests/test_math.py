"""The functors of csrc/math through ``burnish._math``: every 16-bit float, the quantisation rule, the packed layout,
curves against float64."""

from __future__ import annotations

import math

import pytest
import torch
from burnish import ops
from burnish.ops.int8_linear import ACTIVATIONS

_math = pytest.importorskip("burnish._math", reason="it is built where Python.h is installed")

SPECIAL = (0.0, -0.0, math.inf, -math.inf, 1e-45, -1e-45, 1.1754944e-38, 3.4028235e38, -3.4028235e38)
NAMES = {code: name for name, code in ACTIVATIONS.items()}
CURVES = {
    "none": lambda z: z,
    "relu": torch.relu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda z: torch.nn.functional.gelu(z, approximate="tanh"),
    "silu": torch.nn.functional.silu,
}
codes = pytest.mark.parametrize("code", NAMES, ids=NAMES.values())


def floats(count: int) -> torch.Tensor:
    """fp32 numbers of every exponent, the special ones first."""
    bits = torch.randint(-(2**31), 2**31, (count,), generator=torch.Generator().manual_seed(0))
    return torch.cat([torch.tensor(SPECIAL), bits.to(torch.int32).view(torch.float32)])


def halfway(dtype: torch.dtype) -> torch.Tensor:
    """Numbers in the middle between two neighbours of a 16-bit dtype, where rounding looks at the last bit."""
    values = torch.arange(0, 0x7000, 7, dtype=torch.int32).to(torch.int16).view(dtype).float()
    above = (torch.arange(0, 0x7000, 7, dtype=torch.int32) + 1).to(torch.int16).view(dtype).float()
    return (values + above) / 2


@pytest.mark.parametrize("name", ["bf16", "fp16"])
def test_every_value_of_a_16_bit_float_is_read_and_written_back(name: str) -> None:
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[name]
    value, bits = getattr(_math, f"{name}_value"), getattr(_math, f"{name}_bits")
    patterns = range(2**16)
    expected = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype).float()
    got = torch.tensor([value(pattern) for pattern in patterns])
    nan = expected.isnan()
    assert torch.equal(got.isnan(), nan)
    assert torch.equal(got[~nan].view(torch.int32), expected[~nan].view(torch.int32))
    for pattern in patterns:
        back = bits(value(pattern))
        if not nan[pattern]:
            assert back == pattern
        else:
            assert math.isnan(value(back))


@pytest.mark.parametrize("name", ["bf16", "fp16"])
def test_rounding_to_16_bits_is_torchs(name: str) -> None:
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[name]
    x = torch.cat([floats(50_000), halfway(dtype), -halfway(dtype), torch.tensor([65519.9, 65520.0, 2.0**-25])])
    x = x[~x.isnan()]
    bits = getattr(_math, f"{name}_bits")
    got = torch.tensor([bits(v) for v in x.tolist()], dtype=torch.int32).to(torch.int16)
    assert torch.equal(got, x.to(dtype).view(torch.int16))


def test_the_scale_of_a_row_and_its_floor() -> None:
    for amax in (127.0, 1.0, 0.3, 3e38, 2.0**-100, 2.0**-99):
        exact = torch.tensor(amax)
        held, inverse, scale = _math.row_scale(amax)
        assert held == exact.item()
        assert inverse == (torch.tensor(127.0) / exact).item()
        assert scale == (exact / torch.tensor(127.0)).item()
    assert _math.row_scale(0.0) == _math.row_scale(1e-45) == _math.row_scale(2.0**-100)
    assert _math.row_scale(math.inf) == (math.inf, 0.0, math.inf)
    assert all(math.isnan(part) for part in _math.row_scale(math.nan))


def test_quantisation_rounds_half_to_even_and_holds_special_values() -> None:
    amax, inverse, _ = _math.row_scale(127.0)
    halves = {0.5: 0, 1.5: 2, 2.5: 2, -0.5: 0, -1.5: -2, -2.5: -2, 126.5: 126, 125.5: 126, 127.0: 127, -127.0: -127}
    assert {value: _math.quantize(value, amax, inverse) for value in halves} == halves
    amax, inverse, _ = _math.row_scale(math.inf)
    assert [_math.quantize(v, amax, inverse) for v in (math.inf, -math.inf, 3e38)] == [127, -127, 0]
    amax, inverse, _ = _math.row_scale(math.nan)
    assert [_math.quantize(v, amax, inverse) for v in (math.nan, math.inf, 1.0)] == [0, 0, 0]


@pytest.mark.parametrize(("channels", "width"), [(1, 1), (16, 4), (64, 64), (65, 7), (130, 33), (200, 12)])
def test_packed_offsets_are_those_of_the_packing_op(channels: int, width: int) -> None:
    weight = torch.randint(-127, 128, (channels, width), generator=torch.Generator().manual_seed(1), dtype=torch.int8)
    packed = ops.int8_linear_pack(weight, "vnni").view(-1)
    offsets = [_math.vnni_offset(channels, width, n, k) for n in range(channels) for k in range(width)]
    assert len(set(offsets)) == channels * width
    assert torch.equal(packed[offsets].int() - 128, weight.flatten().int())


def test_exp2_held_is_within_an_ulp_and_ends_at_infinity() -> None:
    x = torch.cat([torch.linspace(-126, 127.49, 20_001), -torch.logspace(-30, 0, 2_001), torch.logspace(-30, 0, 2_001)])
    got = torch.tensor([_math.exp2_held(v) for v in x.tolist()])
    exact = x.double().exp2()
    ulp = torch.finfo(torch.float32).eps * torch.exp2(exact.log2().floor())
    assert ((got.double() - exact).abs() / ulp).max() <= 1
    assert [_math.exp2_held(v) for v in (0.0, -0.0, 1.0, -126.0, 127.0)] == [1, 1, 2, 2.0**-126, 2.0**127]
    assert [_math.exp2_held(v) for v in (127.5, 128.0, 1e30, math.inf)] == [math.inf] * 4
    assert [_math.exp2_held(v) for v in (-127.0, -1e30, -math.inf)] == [2.0**-126] * 3
    assert math.isnan(_math.exp2_held(math.nan))


def spread() -> torch.Tensor:
    """Both signs, dense where the curves bend, out to where they are straight."""
    near = torch.linspace(-12, 12, 24_001)
    far = torch.logspace(1, 38, 1_001)
    tiny = torch.logspace(-38, 0, 1_001)
    return torch.cat([near, far, -far, tiny, -tiny])


@codes
def test_activations_follow_float64(code: int) -> None:
    z = spread()
    got = torch.tensor([_math.activate(v, code) for v in z.tolist()]).double()
    exact = CURVES[NAMES[code]](z.double())
    assert ((got - exact).abs() / exact.abs().clamp_min(1)).max() <= 4e-7
    assert math.isnan(_math.activate(math.nan, code))
    assert _math.activate(math.inf, code) == math.inf
    if NAMES[code] != "none":  # the curve has long been flat there
        assert got[z < -100].abs().max() == 0


@codes
def test_slopes_follow_float64(code: int) -> None:
    z = spread()
    z = z[z != 0]
    wide = z.double().requires_grad_()
    (exact,) = torch.autograd.grad(CURVES[NAMES[code]](wide).sum(), wide)
    got = torch.tensor([_math.activation_slope(v, code) for v in z.tolist()]).double()
    assert (got - exact).abs().max() <= 1e-6


def test_slopes_at_the_kink_and_at_nan_are_torchs() -> None:
    for value in (0.0, -0.0, math.nan):
        z = torch.tensor(value, requires_grad=True)
        (expected,) = torch.autograd.grad(torch.relu(z), z)
        assert _math.activation_slope(value, ACTIVATIONS["relu"]) == expected.item()
