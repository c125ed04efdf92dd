"""Matrix products of one output tile, for kernels of any family to build their epilogue on."""

import triton
import triton.language as tl
from burnish.kernels.common.numerics import split_bf16


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
def split_dot(v, b, product, PARTS: tl.constexpr):
    """product + v @ b for fp32 v and bf16 b: v becomes a sum of PARTS bf16 values, each multiplied on the tensor cores.

    A product of two bf16 values is exact in fp32, so the error is v's alone: nothing for three parts (24 bits), at most
    2**-16 |v| for two.
    """
    high, rest = split_bf16(v)
    product = tl.dot(high, b, product)
    if PARTS == 3:
        middle, rest = split_bf16(rest)
        product = tl.dot(middle, b, product)
    return tl.dot(rest.to(tl.bfloat16), b, product)
