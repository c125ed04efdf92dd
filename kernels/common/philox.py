"""Dropout without a stored mask: the Triton twin of ``csrc/math/philox.h``, by the same names.

``burnish.dropout`` says which bits decide which element. A call of the generator decides eight neighbours of a row, so
a tile's mask is made of one word of :func:`kept_bits` for each eight elements and spread only where it is applied.
"""

import triton
import triton.language as tl

#: elements of a row that one call of the generator decides
DROPOUT_GROUP = tl.constexpr(8)


@triton.jit
def philox(c0, c1, c2, c3, key, ROUNDS: tl.constexpr = 10):
    """Philox4x32 of four uint32 counters and an int64 key: four uint32 words."""
    return tl.philox(key, c0, c1, c2, c3, ROUNDS)


@triton.jit
def dropout_words(seed, row, group):
    """The words that decide elements [8 group, 8 group + 8) of a row; int64 rows [M, 1], int32 groups [1, G]."""
    zero = row * 0 + group * 0
    low = (row & 0xFFFFFFFF) + zero
    high = ((row >> 32) & 0xFFFFFFFF) + zero
    return philox((group + zero).to(tl.uint32), low.to(tl.uint32), high.to(tl.uint32), zero.to(tl.uint32), seed)


@triton.jit
def kept_half(half, threshold):
    """1 if 16 bits keep their element, else 0; without a predicate, of which a tile would need too many."""
    return ((half.to(tl.int32) - threshold) >> 31) + 1


@triton.jit
def kept_pair(word, threshold):
    """Bit i: whether half i of a word keeps its element."""
    return kept_half(word & 0xFFFF, threshold) | (kept_half(word >> 16, threshold) << 1)


@triton.jit
def kept_bits(w0, w1, w2, w3, threshold):
    """Bit i: whether element i of the group is kept. threshold in [0, 65536]: of 65536 values, how many drop one."""
    low = kept_pair(w0, threshold) | (kept_pair(w1, threshold) << 2)
    return low | (kept_pair(w2, threshold) << 4) | (kept_pair(w3, threshold) << 6)


@triton.jit
def keep(seed, row, first, threshold, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """int32 [ROWS, COLUMNS], 1 where an element is kept and else 0, of int64 rows ``row`` [ROWS] and the columns from
    ``first`` on, a multiple of 8."""
    GROUPS: tl.constexpr = COLUMNS // DROPOUT_GROUP
    group = first // DROPOUT_GROUP + tl.arange(0, GROUPS)
    w0, w1, w2, w3 = dropout_words(seed, row[:, None], group[None, :])
    bits = kept_bits(w0, w1, w2, w3, threshold)
    return tl.reshape((bits[:, :, None] >> tl.arange(0, DROPOUT_GROUP)[None, None, :]) & 1, (ROWS, COLUMNS))


@triton.jit
def kept(x, seed, row, first, threshold):
    """x [ROWS, COLUMNS], of fp32, bf16 or fp16, with the elements that :func:`keep` drops set to zero, NaN too."""
    bits: tl.constexpr = tl.int32 if x.dtype == tl.float32 else tl.int16
    mask = -keep(seed, row, first, threshold, x.shape[0], x.shape[1])
    return (x.to(bits, bitcast=True) & mask.to(bits)).to(x.dtype, bitcast=True)
