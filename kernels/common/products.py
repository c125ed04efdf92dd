"""Matrix products of one output tile, for kernels of any family to build their epilogue on."""

import triton
import triton.language as tl
from burnish.kernels.common.numerics import finite, split_bf16


@triton.jit
def int8_product(
    a_ptr,  # int8 [rows of a, width], from the tile's first row on
    b_ptr,  # int8 [rows of b, width], likewise
    a_rows,  # how many rows there are from the tile's first on, at least 1
    b_rows,
    width,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
):
    """a @ b^T of a tile in int32; EVEN_K promises that BLOCK_K divides width.

    Rows past the last repeat it, so that only the store needs a mask. Offsets within a tile fit 32 bits for widths up
    to 2**23, and only the two scalar bases move: 64-bit pointers by the block cost the registers that spill first.
    """
    k = tl.arange(0, BLOCK_K)
    a_offsets = tl.minimum(tl.arange(0, BLOCK_M), (a_rows - 1).to(tl.int32))[:, None] * width + k[None, :]
    b_offsets = tl.minimum(tl.arange(0, BLOCK_N), (b_rows - 1).to(tl.int32))[None, :] * width + k[:, None]
    product = tl.zeros([BLOCK_M, BLOCK_N], tl.int32)
    for start in range(0, width, BLOCK_K):
        if EVEN_K:
            a = tl.load(a_ptr + start + a_offsets)
            b = tl.load(b_ptr + start + b_offsets)
        else:
            a = tl.load(a_ptr + start + a_offsets, mask=(k < width - start)[None, :], other=0)
            b = tl.load(b_ptr + start + b_offsets, mask=(k < width - start)[:, None], other=0)
        product = tl.dot(a, b, product, out_dtype=tl.int32)
    return product


@triton.jit
def halves(block, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The left and right columns of a block."""
    return tl.split(tl.reshape(block, (BLOCK_M, 2, BLOCK_N // 2)).permute(0, 2, 1))


@triton.jit
def column_slices(block, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """A block in slices of columns, four of a wide one: an epilogue of all of a thread's accumulators would spill."""
    if BLOCK_N >= 128:
        left, right = halves(block, BLOCK_M, BLOCK_N)
        first, second = halves(left, BLOCK_M, BLOCK_N // 2)
        third, fourth = halves(right, BLOCK_M, BLOCK_N // 2)
        return first, second, third, fourth
    else:
        return (block,)


@triton.jit
def split_dot(v, b, product, PARTS: tl.constexpr):
    """product + v @ b for fp32 v and bf16 b: v becomes a sum of PARTS bf16 values, each multiplied on the tensor cores.

    A product of two bf16 values is exact in fp32, so the error is v's alone, nothing for three parts (24 bits), at most
    2**-16 |v| for two and one rounding to bf16 for one, and that of the sums. Tensor cores cut off what a sum has too
    much instead of rounding it: three parts, which stand for fp32, are summed as :func:`float_dot` sums, from small to
    large and apart from ``product``.
    """
    high, rest = split_bf16(v)
    if PARTS == 1:
        return tl.dot(high, b, product)
    elif PARTS == 2:
        product = tl.dot(high, b, product)
        return tl.dot(rest.to(tl.bfloat16), b, product)
    else:
        middle, rest = split_bf16(rest)
        block = tl.dot(rest.to(tl.bfloat16), b)
        block = tl.dot(middle, b, block)
        return product + (tl.dot(high, b) + block)


@triton.jit
def bf16_parts(v):
    """fp32 v as three bf16 values whose sum it is, and the first of them again, 0 where it is not finite."""
    high, rest = split_bf16(v)
    middle, rest = split_bf16(rest)
    return high, middle, rest.to(tl.bfloat16), tl.where(finite(high.to(tl.float32)), high, 0.0).to(tl.bfloat16)


@triton.jit
def float_dot(a, b, product):
    """product + a @ b in fp32, on the tensor cores: a and b are bf16, fp16 or fp32, of one type.

    Two fp32 operands multiply as three bf16 parts each. The three smallest of the nine products are left out: at most
    2**-23 |a| |b|, two fp32 roundings, and in the mean a tenth of one. The small ones of the others are summed from
    small to large; the largest starts from zero, because tensor cores would cut off what a sum of both has too much;
    and they are apart from ``product``, so that a long sum is one of blocks. An infinity multiplies only the other
    operand's first part, which has the sign of the whole.
    """
    if a.dtype == tl.float32:
        a0, a1, a2, a0_finite = bf16_parts(a)
        b0, b1, b2, b0_finite = bf16_parts(b)
        block = tl.dot(a2, b0_finite)
        block = tl.dot(a0_finite, b2, block)
        block = tl.dot(a1, b1, block)
        block = tl.dot(a1, b0_finite, block)
        block = tl.dot(a0_finite, b1, block)
        return product + (tl.dot(a0, b0) + block)
    else:
        return tl.dot(a, b, product)


@triton.jit
def float_product(
    product,  # fp32 [BLOCK_M, BLOCK_N]: what the sum starts from
    a_ptr,  # [a_rows, depth], from the tile's first row on
    b_ptr,  # [depth, b_columns] by its strides, from the tile's first column on
    a_rows,  # how many rows there are from the tile's first on, at least 1
    b_columns,
    depth,
    stride_am,
    stride_bk,
    stride_bn,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
):
    """product + a @ b of a tile; EVEN_K promises that BLOCK_K divides depth.

    Rows past the last repeat it; columns are masked, because one of the strides of b is 1 and either may be.
    """
    k, n = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_N)
    a_offsets = tl.minimum(tl.arange(0, BLOCK_M), (a_rows - 1).to(tl.int32))[:, None] * stride_am + k[None, :]
    b_offsets = k[:, None] * stride_bk + n[None, :] * stride_bn
    b_step = stride_bk * tl.full([], BLOCK_K, tl.int64)
    in_columns = (n < b_columns)[None, :]
    for start in range(0, depth, BLOCK_K):
        if EVEN_K:
            a = tl.load(a_ptr + start + a_offsets)
            b = tl.load(b_ptr + b_offsets, mask=in_columns, other=0.0)
        else:
            in_depth = k < depth - start
            a = tl.load(a_ptr + start + a_offsets, mask=in_depth[None, :], other=0.0)
            b = tl.load(b_ptr + b_offsets, mask=in_depth[:, None] & in_columns, other=0.0)
        product = float_dot(a, b, product)
        b_ptr += b_step
    return product


@triton.jit
def scaled_product(
    product,  # fp32 [BLOCK_M, BLOCK_N]: what the sum starts from
    dz_ptr,  # [M, N]
    weight_ptr,  # int8 [N, width]
    scale_ptr,  # [N]
    rows,  # the tile's: int64 [BLOCK_M]
    columns,  # the tile's: [BLOCK_N]
    M,
    N,
    width,
    stride_dzm,
    stride_dzn,
    PARTS: tl.constexpr,
    BLOCK_K: tl.constexpr,  # of N, which is summed
):
    """product + (dz * scale) @ weight of a tile, by :func:`split_dot`."""
    in_rows, in_width = (rows < M)[:, None], (columns < width)[None, :]
    n = tl.arange(0, BLOCK_K)
    dz_block = dz_ptr + rows[:, None] * stride_dzm + n[None, :].to(tl.int64) * stride_dzn
    dz_step = stride_dzn * tl.full([], BLOCK_K, tl.int64)
    weight_offsets = n[:, None] * width + columns[None, :]
    for start in range(0, N, BLOCK_K):
        left = n < N - start
        weight = tl.load(weight_ptr + weight_offsets, mask=left[:, None] & in_width, other=0).to(tl.bfloat16)
        dz = tl.load(dz_block, mask=in_rows & left[None, :], other=0.0).to(tl.float32)
        channel_scales = tl.load(scale_ptr + start + n, mask=left, other=0.0)
        product = split_dot(dz * channel_scales[None, :], weight, product, PARTS)
        dz_block += dz_step
        weight_ptr += width.to(tl.int64) * BLOCK_K
    return product


@triton.jit
def weight_dot(x, w, product, scale_ptr, columns, inside, PARTS: tl.constexpr):
    """product + x w: int8 by int8 in int32, floats in fp32, or, where the columns of a float x take the scales of an
    int8 w, PARTS bf16 parts of x * scale in fp32."""
    if PARTS > 0:
        scales = tl.load(scale_ptr + columns, mask=inside, other=0.0)
        return split_dot(x.to(tl.float32) * scales[None, :], w.to(tl.bfloat16), product, PARTS)
    elif w.dtype == tl.int8:
        return tl.dot(x, w, product, out_dtype=tl.int32)
    else:
        return float_dot(x, w, product)
