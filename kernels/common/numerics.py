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
_INV_SQRT_2PI = tl.constexpr(0.39894228040143267794)
_TWO_SQRT_2_OVER_PI = tl.constexpr(1.59576912160573071176)
_GELU_CUBIC = tl.constexpr(0.044715)
_GELU_CUBIC_SLOPE = tl.constexpr(0.13414499163627625)  # 3 * _GELU_CUBIC rounded as fp32 does


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
def _quotient(numerator, divisor, reciprocal):
    """numerator / divisor, rounded as IEEE division rounds it where the quotient is normal, for a divisor in [1, 2].

    An approximate reciprocal and fma corrections (Markstein 1990) have no slow path; that of a general division is a
    call, which spilled the accumulators around it.
    """
    guess = numerator * reciprocal
    return tl.fma(tl.fma(-divisor, guess, numerator), reciprocal, guess)


@triton.jit
def _reciprocal(divisor):
    guess = 1.0 / divisor
    return tl.fma(tl.fma(-divisor, guess, 1.0), guess, guess)


@triton.jit
def sigmoid_pair(x):
    """sigmoid(x) and sigmoid(-x), each without cancellation."""
    e = exp_negative(-tl.abs(x))
    large = _reciprocal(1.0 + e)
    small = _quotient(e, 1.0 + e, large)
    return tl.where(x < 0, small, large), tl.where(x < 0, large, small)


@triton.jit
def sigmoid(x):
    e = exp_negative(-tl.abs(x))
    return _quotient(tl.where(x < 0, e, 1.0), 1.0 + e, _reciprocal(1.0 + e))


@triton.jit
def relu(z):
    return tl.where(z < 0, 0.0, z)


@triton.jit
def relu_slope(z):
    return tl.where(z <= 0, 0.0, 1.0)


@triton.jit
def normal_logit(z):
    """The logit of the normal distribution function, Phi(z) = sigmoid(normal_logit(z)); see ``activation.h``."""
    s = z * z
    p = tl.fma(s, -3.743029150515831e-11, 5.599023022995198e-09)
    p = tl.fma(p, s, -3.0714244303453597e-07)
    p = tl.fma(p, s, 8.334816811839119e-06)
    p = tl.fma(p, s, -0.0001124928894569166)
    p = tl.fma(p, s, -6.11419600318186e-05)
    p = tl.fma(p, s, 0.07266275584697723)
    p = tl.fma(p, s, 1.5957705974578857)
    return tl.where(tl.abs(z) > 6.5, z * 16.0, z * p)


@triton.jit
def gelu(z):
    return z * sigmoid(normal_logit(z))


@triton.jit
def gelu_slope(z):
    density = exp_negative(z * z * -0.5) * _INV_SQRT_2PI
    return tl.fma(z, density, sigmoid(normal_logit(z)))


@triton.jit
def _held(z):
    """z where its cube is finite, else a value whose sigmoid is 0 or 1; NaN stays."""
    low = tl.where(z < -64.0, -64.0, z)
    return tl.where(low > 64.0, 64.0, low)


@triton.jit
def _gelu_tanh_argument(h):
    """2 * sqrt(2 / pi) * (h + 0.044715 * h**3): gelu_tanh is z times the sigmoid of it."""
    return tl.fma(h * (h * h), _GELU_CUBIC, h) * _TWO_SQRT_2_OVER_PI


@triton.jit
def gelu_tanh(z):
    return z * sigmoid(_gelu_tanh_argument(_held(z)))


@triton.jit
def gelu_tanh_slope(z):
    h = _held(z)
    s, rest = sigmoid_pair(_gelu_tanh_argument(h))
    slope = tl.fma(h * h, _GELU_CUBIC_SLOPE, 1.0) * _TWO_SQRT_2_OVER_PI
    return tl.fma(z, s * rest * slope, s)


@triton.jit
def silu(z):
    return z * sigmoid(z)


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
