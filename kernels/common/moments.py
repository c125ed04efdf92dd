"""The codes of 8-bit moments in blocks of 256: the Triton twins of ``csrc/math/moments.h``. Tiles are fp32 [ROWS, 256],
a block a row; ``burnish.moments`` says what a code is.
"""

import triton
import triton.language as tl
from burnish.kernels.common.numerics import magnitude_bits

STATE_BLOCK = tl.constexpr(256)

_INFINITY = tl.constexpr(0x7F800000)
_FLOOR_BITS = tl.constexpr((127 - 100) << 23)  # 2**-100 keeps limit / largest finite
_ROUNDER = tl.constexpr(12582912.0)  # 1.5 * 2**23 leaves a small integer in the low bits, half to even
_ROUNDER_BITS = tl.constexpr(0x4B400000)


@triton.jit
def encode_moment(moment, inside, SIGNED: tl.constexpr):
    """Codes, int8 [ROWS, 256] (a second moment's are the bits of uint8), and scales [ROWS]."""
    if SIGNED:
        root = tl.sqrt_rn(tl.abs(moment))
        limit = tl.full([moment.shape[0]], 127.0, tl.float32)
    else:
        root = tl.sqrt_rn(tl.sqrt_rn(moment))
        limit = tl.full([moment.shape[0]], 255.0, tl.float32)
    largest_bits = tl.max(tl.where(inside, magnitude_bits(root), 0), axis=1)
    good = largest_bits < _INFINITY
    largest = tl.maximum(largest_bits, _FLOOR_BITS).to(tl.float32, bitcast=True)
    inverse = tl.div_rn(limit, largest)[:, None]
    scale = tl.where(good, tl.div_rn(largest, limit), float("nan"))
    # what is not finite rounds to any integer, and is of no block that is good
    code = (root * inverse + _ROUNDER).to(tl.int32, bitcast=True) - _ROUNDER_BITS
    if SIGNED:
        code = tl.where(moment.to(tl.int32, bitcast=True) < 0, -code, code)
    else:
        code = tl.where((root > 0) & (code < 1), 1, code)
    return tl.where(good[:, None], code, 0).to(tl.int8), scale


@triton.jit
def decode_moment(code, scale, SIGNED: tl.constexpr):
    """fp32 [ROWS, 256] of codes as :func:`encode_moment` gives them and scales [ROWS]."""
    if SIGNED:
        root = code.to(tl.float32) * scale[:, None]
        return root * tl.abs(root)
    else:
        root = (code.to(tl.int32) & 0xFF).to(tl.float32) * scale[:, None]
        square = root * root
        return square * square
