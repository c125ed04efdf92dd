"""Device helpers on fp32 blocks: the Triton twins of ``csrc/math`` (``int8.h``, ``activation.h``), by the same names.

Kernels that use them are launched with ``enable_fp_fusion=False``: a product and a sum that must round twice stay two
instructions, and every fused multiply-add is spelled ``tl.fma``. Only core operations appear here, no libdevice by
name, so that the interpreter runs everything.
"""

import triton
import triton.language as tl

#: activation codes of the schemas
NONE = tl.constexpr(0)
RELU = tl.constexpr(1)
GELU = tl.constexpr(2)
GELU_TANH = tl.constexpr(3)
SILU = tl.constexpr(4)

_ABS_MASK = tl.constexpr(0x7FFFFFFF)
_INF_BITS = tl.constexpr(0x7F800000)
_AMAX_FLOOR_BITS = tl.constexpr((127 - 100) << 23)  # 2**-100
_ROUNDER = tl.constexpr(12582912.0)  # 1.5 * 2**23: adding it leaves the nearest even integer in the low mantissa bits
_ROUNDER_BITS = tl.constexpr(0x4B400000)

_LOG2E = tl.constexpr(1.44269504088896341)
_LN2_HIGH = tl.constexpr(0.693145751953125)
_LN2_LOW = tl.constexpr(1.42860682030941723212e-6)
_SQRT_HALF = tl.constexpr(0.70710678118654752440)
_INV_SQRT_2PI = tl.constexpr(0.39894228040143267794)
_SQRT_2_OVER_PI = tl.constexpr(0.79788456080286535588)
_GELU_CUBIC = tl.constexpr(0.044715)


@triton.jit
def magnitude_bits(x):
    """|x| as its bit pattern: integers that order as the magnitudes do, with NaN above infinity, so that an integer
    maximum is an absolute maximum which keeps NaN."""
    return x.to(tl.int32, bitcast=True) & _ABS_MASK


@triton.jit
def row_scale(amax_bits):
    """(amax, 127 / amax, amax / 127) of rows, from the maximum of :func:`magnitude_bits`."""
    amax = tl.maximum(amax_bits, _AMAX_FLOOR_BITS).to(tl.float32, bitcast=True)
    limit = tl.full(amax.shape, 127.0, tl.float32)
    return amax, tl.div_rn(limit, amax), tl.div_rn(amax, limit)


@triton.jit
def quantize_int8(x, amax, inverse):
    """round_half_even(x * inverse) in int8; +-127 at infinities, 0 in a row whose amax is NaN."""
    scaled = tl.where(magnitude_bits(x) == _INF_BITS, tl.where(x > 0, 127.0, -127.0), x * inverse)
    scaled = tl.where(amax == amax, scaled, 0.0)
    return ((scaled + _ROUNDER).to(tl.int32, bitcast=True) - _ROUNDER_BITS).to(tl.int8)


@triton.jit
def exp_negative(x):
    """exp(x) for x <= 0, within 1 ulp; 0 below -87.3, where the result would be subnormal."""
    inside = tl.where(x < -87.3, 0.0, x)
    shifted = tl.fma(inside, _LOG2E, _ROUNDER)
    n = shifted - _ROUNDER
    r = tl.fma(n, -_LN2_HIGH, inside)
    r = tl.fma(n, -_LN2_LOW, r)
    p = tl.fma(r, 1.9875691500e-4, 1.3981999507e-3)  # Cephes expf
    p = tl.fma(p, r, 8.3334519073e-3)
    p = tl.fma(p, r, 4.1665795894e-2)
    p = tl.fma(p, r, 1.6666665459e-1)
    p = tl.fma(p, r, 5.0000001201e-1)
    p = tl.fma(p, r * r, r) + 1.0
    power = ((shifted.to(tl.int32, bitcast=True) - _ROUNDER_BITS + 127) << 23).to(tl.float32, bitcast=True)
    return tl.where(x < -87.3, 0.0, p * power)


@triton.jit
def sigmoid_pair(x):
    """sigmoid(x) and sigmoid(-x), each without cancellation.

    The divisor is in [1, 2]: an approximate reciprocal and fma corrections give the IEEE quotient (Markstein 1990)
    without the slow path of a general division, a call that spilled the accumulators around it.
    """
    e = exp_negative(-tl.abs(x))
    divisor = 1.0 + e
    reciprocal = 1.0 / divisor
    large = tl.fma(tl.fma(-divisor, reciprocal, 1.0), reciprocal, reciprocal)
    small = e * large
    small = tl.fma(tl.fma(-divisor, small, e), large, small)
    return tl.where(x < 0, small, large), tl.where(x < 0, large, small)


@triton.jit
def relu(z):
    return tl.where(z < 0, 0.0, z)


@triton.jit
def relu_slope(z):
    return tl.where(z <= 0, 0.0, 1.0)


@triton.jit
def gelu(z):
    return z * tl.fma(tl.erf(z * _SQRT_HALF), 0.5, 0.5)


@triton.jit
def gelu_slope(z):
    density = exp_negative(z * z * -0.5) * _INV_SQRT_2PI
    return tl.fma(z, density, tl.fma(tl.erf(z * _SQRT_HALF), 0.5, 0.5))


@triton.jit
def _gelu_tanh_argument(z):
    """2 * sqrt(2 / pi) * (z + 0.044715 * z**3) and its derivative, with z held where its cube is finite."""
    held = tl.minimum(tl.maximum(z, -64.0), 64.0)
    square = held * held
    twice = 2.0 * _SQRT_2_OVER_PI
    return twice * tl.fma(held * square, _GELU_CUBIC, held), twice * tl.fma(square, 3.0 * _GELU_CUBIC, 1.0)


@triton.jit
def gelu_tanh(z):
    u, _ = _gelu_tanh_argument(z)
    s, _ = sigmoid_pair(u)
    return z * s


@triton.jit
def gelu_tanh_slope(z):
    u, du = _gelu_tanh_argument(z)
    s, rest = sigmoid_pair(u)
    return tl.fma(z, s * rest * du, s)


@triton.jit
def silu(z):
    s, _ = sigmoid_pair(z)
    return z * s


@triton.jit
def silu_slope(z):
    s, rest = sigmoid_pair(z)
    return s * tl.fma(z, rest, 1.0)


@triton.jit
def activate(z, ACTIVATION: tl.constexpr):
    """The activation of that code; NaN in, NaN out."""
    if ACTIVATION == RELU:
        return relu(z)
    elif ACTIVATION == GELU:
        return gelu(z)
    elif ACTIVATION == GELU_TANH:
        return gelu_tanh(z)
    elif ACTIVATION == SILU:
        return silu(z)
    else:
        return z


@triton.jit
def activation_slope(z, ACTIVATION: tl.constexpr):
    """The derivative of :func:`activate`, for a code other than NONE."""
    if ACTIVATION == RELU:
        return relu_slope(z)
    elif ACTIVATION == GELU:
        return gelu_slope(z)
    elif ACTIVATION == GELU_TANH:
        return gelu_tanh_slope(z)
    else:
        return silu_slope(z)


@triton.jit
def split_bf16(v):
    """v as a bf16 and the exact fp32 rest; the rest of a non-finite v is 0, so that infinities stay infinite."""
    high = v.to(tl.bfloat16)
    finite = magnitude_bits(high.to(tl.float32)) < _INF_BITS
    return high, tl.where(finite, v - high.to(tl.float32), 0.0)
