"""Matrix products of one output tile, for kernels of any family to build their epilogue on."""

import triton
import triton.language as tl

from burnish.kernels.common.numerics import split_bf16


@triton.jit
def int8_product(
    a_ptr,  # int8 [M, width]
    b_ptr,  # int8 [N, width]
    m,  # int64 [BLOCK_M] rows of a, all in range
    n,  # int64 [BLOCK_N] rows of b, all in range
    width,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
):
    """a[m, :] @ b[n, :]^T in int32; EVEN_K promises that BLOCK_K divides width."""
    k = tl.arange(0, BLOCK_K)
    a_block = a_ptr + m[:, None] * width + k[None, :]
    b_block = b_ptr + n[None, :] * width + k[:, None]
    product = tl.zeros([BLOCK_M, BLOCK_N], tl.int32)
    for start in range(0, width, BLOCK_K):
        if EVEN_K:
            a = tl.load(a_block)
            b = tl.load(b_block)
        else:
            a = tl.load(a_block, mask=(k < width - start)[None, :], other=0)
            b = tl.load(b_block, mask=(k < width - start)[:, None], other=0)
        product = tl.dot(a, b, product, out_dtype=tl.int32)
        a_block += BLOCK_K
        b_block += BLOCK_K
    return product


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
