"""Stochastic rounding to 16-bit floats, and floats kept as 16 + 8 bits: the Triton twins of ``csrc/math/rounding.h``,
by the same names. Integer arithmetic on int32 blocks of bits; ``burnish.rounding`` says both in words.
"""

import triton
import triton.language as tl
from burnish.kernels.common.philox import philox

#: elements that one call of the generator decides
ROUNDING_GROUP = tl.constexpr(8)
#: of the generator
ROUNDING_ROUNDS = tl.constexpr(7)

_MAGNITUDE = tl.constexpr(0x7FFFFFFF)
_INFINITY = tl.constexpr(0x7F800000)
_SMALLEST = tl.constexpr(0x38800000)  # 2**-14, fp16's smallest normal
_LARGEST = tl.constexpr(0x47800000)  # 2**16, beyond fp16


@triton.jit
def rounding_halves(seed, tensor, STREAM: tl.constexpr, group):
    """Sixteen bits for each element of the groups [ROWS, GROUPS], int64: int32 [ROWS, 8 * GROUPS].

    All streams, 1 to 4, are turns of the same words.
    """
    zero = group * 0
    w0, w1, w2, w3 = philox(
        (group & 0xFFFFFFFF).to(tl.uint32),
        (group >> 32).to(tl.uint32),
        (zero + tensor).to(tl.uint32),
        (zero + 1).to(tl.uint32),
        seed,
        ROUNDING_ROUNDS,
    )
    if STREAM == 2:
        w0, w1, w2, w3 = w1, w2, w3, w0
    elif STREAM == 3:
        w0, w1, w2, w3 = w2, w3, w0, w1
    elif STREAM == 4:
        w0, w1, w2, w3 = w3, w0, w1, w2
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # [ROWS, GROUPS, word // 2, word % 2]
    halves = tl.join((words & 0xFFFF).to(tl.int32), (words >> 16).to(tl.int32))
    return tl.reshape(halves, (group.shape[0], group.shape[1] * ROUNDING_GROUP))


@triton.jit
def round_random(value, random, TYPE: tl.constexpr):
    """fp32 to bf16 or fp16: up with the probability of how far the value is from the neighbour below."""
    bits = value.to(tl.int32, bitcast=True)
    magnitude = bits & _MAGNITUDE
    if TYPE.is_bf16():
        rounded = tl.where(magnitude > _INFINITY, bits | 0x400000, bits + random) >> 16
    else:
        units = tl.minimum(magnitude, _SMALLEST).to(tl.float32, bitcast=True) * 16777216.0  # exact, at most 2**10
        whole = units.to(tl.int32)
        above = (units - whole.to(tl.float32)) * 65536.0 > random.to(tl.float32)
        normal = (magnitude - 0x38000000 + (random & 0x1FFF)) >> 13
        rounded = tl.where(magnitude < _SMALLEST, whole + above.to(tl.int32), normal)
        rounded = tl.where(magnitude >= _LARGEST, tl.where(magnitude > _INFINITY, 0x7E00, 0x7C00), rounded)
        rounded |= (bits >> 16) & 0x8000
    return rounded.to(tl.int16).to(TYPE, bitcast=True)


@triton.jit
def magnitude24(value, TYPE: tl.constexpr):
    magnitude = value.to(tl.int32, bitcast=True) & _MAGNITUDE
    if TYPE.is_bf16():
        whole = (tl.minimum(magnitude, _INFINITY) + 0x7F + ((magnitude >> 8) & 1)) >> 8
        whole = tl.where(magnitude > _INFINITY, 0x7FC000, whole)
    else:
        # adding 2**-9 shifts a subnormal's mantissa to where the hardware rounds it
        shifted = tl.minimum(magnitude, _SMALLEST).to(tl.float32, bitcast=True) + 0.001953125
        whole = (tl.minimum(magnitude, _LARGEST) - 0x38000000 + 0xF + ((magnitude >> 5) & 1)) >> 5
        whole = tl.where(magnitude < _SMALLEST, shifted.to(tl.int32, bitcast=True) - 0x3B000000, whole)
        whole = tl.where(magnitude >= _LARGEST, tl.where(magnitude > _INFINITY, 0x7E0000, 0x7C0000), whole)
    return whole


@triton.jit
def split(value, TYPE: tl.constexpr):
    """fp32 rounded to 24 bits: the nearest bf16 or fp16, and an int8 of 256ths of its last place."""
    whole = magnitude24(value, TYPE)
    high = (whole + 128) >> 8
    sign = (value.to(tl.int32, bitcast=True) >> 16) & 0x8000
    return (high | sign).to(tl.int16).to(TYPE, bitcast=True), (whole - (high << 8)).to(tl.int8)


@triton.jit
def join(high, low):
    """The fp32 value of what :func:`split` made."""
    bits = high.to(tl.int16, bitcast=True).to(tl.int32)
    whole = (((bits & 0x7FFF) << 8) + low.to(tl.int32)) & 0x7FFFFF
    sign = (bits & 0x8000) << 16
    if high.dtype == tl.bfloat16:
        magnitude = whole << 8
    else:
        shifted = whole << 5
        finite = shifted.to(tl.float32, bitcast=True) * 5192296858534827628530496329220096.0  # 2**112
        magnitude = tl.where(shifted >= 0x0F800000, shifted | 0x70000000, finite.to(tl.int32, bitcast=True))
    return (magnitude | sign).to(tl.float32, bitcast=True)
