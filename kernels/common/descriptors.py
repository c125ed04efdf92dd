"""Products of 16-bit matrices that the tensor memory accelerator brings in and takes out, on sm_90 and sm_100.

One thread asks for a block of a matrix by its coordinates; the unit writes it to shared memory as the matrix unit
reads it, with zeros for what lies beyond the edges, and clips what is stored beyond them. No thread makes addresses or
masks: a step of a tile of 128 x 256 takes two requests, where :func:`common.products.float_product` takes twelve of
each thread.

A descriptor is made at each call, of the tensors as they lie: their first byte and their rows have to be at multiples
of 16 bytes (:func:`describable`). What is not takes the pointers' kernels, as do other types and architectures, and
tiles of fewer than 128 rows.

A tile is as large as its sums allow, 128 x 256 over eight warps, since without multicast each program brings its own
operands from L2. It is stored as a whole where shared memory has room for that: Triton has one buffer for all slices of
a tile, and waits until the one before has left it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from burnish.kernels.common import target
from triton.tools.tensor_descriptor import TensorDescriptor

#: architectures with the accelerator
ARCHITECTURES = ("sm_90", "sm_100")
#: rows of the smallest tile, and what a base and a row's stride must be a multiple of, in bytes
MIN_ROWS, ALIGNMENT = 128, 16
#: rows of the tiles that share their columns' weights in L2: 132 tiles of 128 x 256 are a square then
GROUP_ROWS = 2048


@triton.jit
def described_product(
    product,  # fp32 [BLOCK_M, BLOCK_N]: what the sum starts from
    a,  # of [rows, depth], in blocks [BLOCK_M, BLOCK_K]
    b,  # of [depth, columns], in blocks [BLOCK_K, BLOCK_N]; ROWS: of [columns, depth], in blocks [BLOCK_N, BLOCK_K]
    first_m,
    first_n,
    depth,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """product + a @ b of the tile that starts at (first_m, first_n)."""
    for start in range(0, depth, BLOCK_K):
        if ROWS:
            product = tl.dot(a.load([first_m, start]), b.load([first_n, start]).T, product)
        else:
            product = tl.dot(a.load([first_m, start]), b.load([start, first_n]), product)
    return product


@triton.jit
def described_blocks(
    product,  # fp32 [BLOCK_M, OUT]: what the sum starts from
    x,  # of [M, K], in blocks [BLOCK_M, BLOCK_K]
    values,  # of [blocks * OUT, DEPTH], in blocks [OUT, BLOCK_K]
    index_ptr,  # [blocks]: which columns of x a block takes
    first,  # of the blocks that are summed
    last,
    first_m,
    OUT: tl.constexpr,
    DEPTH: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """product + the sum over a list's blocks of x's columns times the block, transposed."""
    STEPS: tl.constexpr = DEPTH // BLOCK_K
    index = tl.load(index_ptr + first, mask=first < last, other=0)
    for step in range(first * STEPS, last * STEPS):
        within = step % STEPS * BLOCK_K
        rows = x.load([first_m, index * DEPTH + within])
        block = values.load([step // STEPS * OUT, within])
        following = (step + 1) // STEPS  # a step ahead, so that the request for x does not wait for it
        index = tl.load(index_ptr + following, mask=following < last, other=0)
        product = tl.dot(rows, block.T, product)
    return product


@triton.jit
def described_store(z, bias_ptr, y, first_m, first_n, N, HAS_BIAS: tl.constexpr):
    """Write a tile of y [M, N], plus its bias, rounded once; y's blocks are of z's shape."""
    if HAS_BIAS:
        n = first_n + tl.arange(0, z.shape[1])
        z += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    y.store([first_m, first_n], z.to(y.dtype))


def describable(tile_rows: int, *matrices: torch.Tensor) -> bool:
    """Whether a tile of so many rows takes its matrices by descriptors: their architecture has them, and each is of 16
    bits, not empty, and aligned."""
    return tile_rows >= MIN_ROWS and all(map(_aligned, matrices))


def _aligned(x: torch.Tensor) -> bool:
    size, (rows, columns), (step, one) = x.element_size(), x.shape, x.stride()
    return (
        target.arch(x.device) in ARCHITECTURES
        and size == 2
        and rows * columns > 0
        and one == 1
        and step >= columns
        and (step * size) % ALIGNMENT == 0
        and x.data_ptr() % ALIGNMENT == 0
    )


def describe(x: torch.Tensor, *block: int) -> TensorDescriptor:
    return TensorDescriptor.from_tensor(x, list(block))


def block_type(pointer: str, *block: int) -> str:
    """The type of a descriptor of such pointers, as a variant lists it."""
    return f"tensordesc<{pointer[1:]}[{','.join(map(str, block))}]>"
