"""What is done with the sums of an output tile: scales, bias, rounding, in slices that fit a thread's registers."""

import triton
import triton.language as tl
from burnish.kernels.common.products import column_slices


@triton.jit
def preactivation(product, row_scales, scale_ptr, bias_ptr, n, N, HAS_BIAS: tl.constexpr):
    """z = float(product) * (row_scale * channel_scale) + bias, rounded after each operation; any value where n >= N."""
    channel_scales = tl.load(scale_ptr + n, mask=n < N, other=0.0)
    z = product.to(tl.float32) * (row_scales[:, None] * channel_scales[None, :])
    if HAS_BIAS:
        z = z + tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    return z


@triton.jit
def store_rows(
    y,  # fp32 [ROWS, COLUMNS]
    bias_ptr,  # [N]; not read unless HAS_BIAS
    y_ptr,  # [M, N], from the tile's first row on
    rows_left,
    first_n,
    N,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Write a tile of y, plus its bias, rounded once."""
    m, n = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    in_columns = n < N - first_n
    if HAS_BIAS:
        y += tl.load(bias_ptr + first_n + n, mask=in_columns, other=0.0).to(tl.float32)[None, :]
    inside = (m < rows_left)[:, None] & in_columns[None, :]
    tl.store(y_ptr + first_n + m[:, None] * N + n[None, :], y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def store_linear(
    product,  # [BLOCK_M, BLOCK_N]: int32, of a quantised x, or fp32
    row_scale_ptr,  # [M], from the tile's first row on, as y_ptr; not read unless int32, as scale_ptr
    scale_ptr,  # [N]
    bias_ptr,  # [N]; not read unless HAS_BIAS
    y_ptr,  # [M, N]
    rows_left,
    first_n,
    last_n,  # of the columns to be written, at most N
    N,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Write a tile of a linear layer's y. An int32 product takes its scales, as int8_linear has them."""
    m = tl.arange(0, BLOCK_M)
    slices = column_slices(product, BLOCK_M, BLOCK_N)
    WIDTH: tl.constexpr = slices[0].shape[1]
    if product.dtype == tl.int32:
        row_scales = tl.load(row_scale_ptr + m, mask=m < rows_left, other=0.0)
    for part in tl.static_range(BLOCK_N // WIDTH):
        n = first_n + part * WIDTH + tl.arange(0, WIDTH)
        in_columns = n < last_n
        if product.dtype == tl.int32:
            y = preactivation(slices[part], row_scales, scale_ptr, bias_ptr, n, N, HAS_BIAS)
        elif HAS_BIAS:
            y = slices[part] + tl.load(bias_ptr + n, mask=in_columns, other=0.0).to(tl.float32)[None, :]
        else:
            y = slices[part]
        inside = (m < rows_left)[:, None] & in_columns[None, :]
        tl.store(y_ptr + m[:, None] * N + n[None, :], y.to(y_ptr.dtype.element_ty), mask=inside)
