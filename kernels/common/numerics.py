"""Device helpers on fp32 blocks: the Triton twins of ``csrc/math`` (``int8.h``, ``activation.h``, ``optimizer.h``), by
the same names.

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
# the same, 128 higher: else an int8 code would be the low byte of the sum as it stands, and what ptxas 12.8 stores as
# the low byte of a float is the float, converted
_CODE_ROUNDER = tl.constexpr(12583040.0)
_CODE_ROUNDER_BITS = tl.constexpr(0x4B400080)

_LOG2E = tl.constexpr(1.44269504088896341)
_HALF_LOG2E = tl.constexpr(0.5 * 1.44269504088896341)
_INV_SQRT_2PI = tl.constexpr(0.39894228040143267794)
_TWO_SQRT_2_OVER_PI = tl.constexpr(1.59576912160573071176)
# products of fp32 constants, rounded as activation.h's are
_TANH_SLOPE = tl.constexpr(-2.302208185195923)  # -2 * sqrt(2 / pi) * log2(e)
_TANH_CUBIC = tl.constexpr(-0.10294323414564133)  # the same by 0.044715
_GELU_CUBIC_SLOPE = tl.constexpr(0.13414499163627625)  # 3 * 0.044715


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
    return ((scaled + _CODE_ROUNDER).to(tl.int32, bitcast=True) - _CODE_ROUNDER_BITS).to(tl.int8)


@triton.jit
def at_most(a, limit: tl.constexpr):
    return tl.where(limit < a, limit, a)


@triton.jit
def at_least(a, limit: tl.constexpr):
    return tl.where(a < limit, limit, a)


@triton.jit
def maximum(a, b):
    """The greater one; NaN where one is."""
    return tl.where((a != a) | (a > b), a, b)


@triton.jit
def exp2_held(x):
    """2**x within 1 ulp, with x held in [-126, 128]: infinity from 127.5 on."""
    held = at_least(at_most(x, 128.0), -126.0)
    shifted = held + _ROUNDER
    r = held - (shifted - _ROUNDER)
    p = tl.fma(r, 1.5353361959569156e-4, 1.3398875016719103e-3)
    p = tl.fma(p, r, 9.61843691766262e-3)
    p = tl.fma(p, r, 5.5503323674201965e-2)
    p = tl.fma(p, r, 0.24022647738456726)
    p = tl.fma(p, r, 0.6931471824645996)
    p = tl.fma(p, r, 1.0)
    return p * ((shifted.to(tl.int32, bitcast=True) - _ROUNDER_BITS + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def gated(z, t):
    """z * sigmoid(x) from t = -x * log2(e). A GPU divides within 2 ulp here: the exact division's slow path is a call,
    which spilled the accumulators around it."""
    return z / (1.0 + exp2_held(t))


@triton.jit
def sigmoid_pair(t):
    """sigmoid(x) and sigmoid(-x) from t = -x * log2(e), each without cancellation."""
    small = 1.0 / (1.0 + exp2_held(tl.abs(t)))
    large = 1.0 - small
    return tl.where(t < 0, large, small), tl.where(t < 0, small, large)


@triton.jit
def relu(z):
    return tl.where(z < 0, 0.0, z)


@triton.jit
def relu_slope(z):
    return tl.where(z <= 0, 0.0, 1.0)


@triton.jit
def normal_exponent(z):
    """t with Phi(z) = 1 / (1 + 2**t), the normal distribution function; see ``activation.h``."""
    s = at_most(z * z, 42.25)
    p = tl.fma(s, 5.4001459554031683e-11, -8.07762301491266e-9)
    p = tl.fma(p, s, 4.431100819601852e-7)
    p = tl.fma(p, s, -1.2024563147861045e-5)
    p = tl.fma(p, s, 1.6229276661761105e-4)
    p = tl.fma(p, s, 8.820953371468931e-5)
    p = tl.fma(p, s, -0.10483019798994064)
    p = tl.fma(p, s, -2.3022103309631348)
    return z * p


@triton.jit
def gelu(z):
    return gated(z, normal_exponent(z))


@triton.jit
def gelu_slope(z):
    density = _INV_SQRT_2PI / exp2_held(z * z * _HALF_LOG2E)
    return tl.fma(z, density, 1.0 / (1.0 + exp2_held(normal_exponent(z))))


@triton.jit
def tanh_exponent(z):
    """t with z * (1 + tanh(u)) / 2 = z / (1 + 2**t), for gelu_tanh's u."""
    return z * tl.fma(z * z, _TANH_CUBIC, _TANH_SLOPE)


@triton.jit
def gelu_tanh(z):
    return gated(z, tanh_exponent(z))


@triton.jit
def gelu_tanh_slope(z):
    h = at_least(at_most(z, 64.0), -64.0)
    s, rest = sigmoid_pair(tanh_exponent(h))
    slope = tl.fma(h * h, _GELU_CUBIC_SLOPE, 1.0) * _TWO_SQRT_2_OVER_PI
    return tl.fma(z, s * rest * slope, s)


@triton.jit
def silu(z):
    return gated(z, z * -_LOG2E)


@triton.jit
def silu_slope(z):
    s, rest = sigmoid_pair(z * -_LOG2E)
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
def finite(x):
    return magnitude_bits(x) < _INF_BITS


@triton.jit
def split_bf16(v):
    """v as a bf16 and the exact fp32 rest; the rest of a non-finite v is 0, so that infinities stay infinite."""
    high = v.to(tl.bfloat16)
    return high, tl.where(finite(high.to(tl.float32)), v - high.to(tl.float32), 0.0)
