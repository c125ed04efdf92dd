"""sparse_linear: a linear layer whose weight keeps any elements: loaded sparse, computed dense.

    y = x W^T + bias          W = expand(values, bitmap)

==========  =============================  ==================================================================
x           [..., K]                       fp32, bf16, fp16; any strides
values      [nnz]                          x's dtype; the kept weights, row after row, by ascending k
bitmap      uint8 [N, 8 * ceil(K / 64)]    bit k % 8 of byte k / 8 is set where a weight is kept; zero beyond K
row_starts  int64 [N + 1]                  where the values of each row begin; the last is nnz
bias        [N] or None                    fp32, bf16, fp16
y           [..., N]                       x's dtype
==========  =============================  ==================================================================

What is stored is bit for bit what :func:`expand` gives back, and :func:`compress` is its inverse. Sums are fp32,
rounded once. Weights that are not stored count as zeros: a NaN or an infinity of x makes NaN of them as in a dense
layer. Deterministic, and independent of the number of threads. The CPU kernel raises where bitmap and row_starts
contradict each other or the number of values.

The weight takes one bit an element and the kept values: the less of it is kept, the less a product with few rows of x
has to read. With many rows the arithmetic decides: where little is kept the CPU kernel multiplies by the kept elements
alone, elsewhere it is that of a dense layer.

    dx = dy W          dvalues = dy^T x at the kept elements          dbias = sum_m dy

Saved for backward: x and the weight.

Method: load sparse, compute dense, Xia et al. 2023 (arXiv 2309.10285); a bitmap with packed values as in Macko and
Boza 2025 (arXiv 2511.13061).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from burnish import dispatch
from burnish.checks import FLOATING, check_devices, check_floating
from burnish.ops.int8_quantize_rows import supports_native as on_device
from burnish.ops.lowrank_linear import as_rows, check_bias, check_gradient
from burnish.registry import Autograd, Backend, Case, Cases, Cost, Impl, Invalid, OpSpec, dtype_name, register
from burnish.sparse_formats import dense_gradients, kept_weights

OptTensor = Tensor | None

__all__ = ["sparse_linear"]

#: elements of a row that the bitmap's rows are a multiple of, for which kernels read whole words
WORD = 64
#: what csrc/cuda/sparse_linear.cu takes: rows of x, and bytes of them in whole spans of columns
NATIVE_ROWS = 8
NATIVE_SPAN = 1024
NATIVE_X_BYTES = 64 << 10


def bitmap_bytes(K: int) -> int:
    """Bytes of a row of the bitmap."""
    return (K + WORD - 1) // WORD * WORD // 8


def compress(weight: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """``values``, ``bitmap`` and ``row_starts`` of a dense weight ``[N, K]``; ``mask``: what is kept, by default what
    is not zero.

    Raises:
        ValueError: the weight is no matrix, or the mask does not fit.
    """
    kept = kept_weights("sparse_linear", weight, mask)
    N, K = weight.shape
    bits = F.pad(kept, (0, 8 * bitmap_bytes(K) - K)).view(N, -1, 8)
    bitmap = (bits << torch.arange(8, device=weight.device)).sum(-1).to(torch.uint8)
    row_starts = torch.zeros(N + 1, dtype=torch.int64, device=weight.device)
    row_starts[1:] = kept.sum(1).cumsum(0)
    return weight[kept], bitmap, row_starts


def kept(bitmap: Tensor, K: int) -> Tensor:
    """Which elements are kept, bool ``[N, K]``."""
    bits = bitmap.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8, device=bitmap.device) & 1
    return bits.flatten(1)[:, :K].bool()


def expand(values: Tensor, bitmap: Tensor, N: int, K: int) -> Tensor:
    """The dense weight ``[N, K]``; the inverse of :func:`compress`."""
    return values.new_zeros(N, K).masked_scatter(kept(bitmap, K), values)


def reference(x: Tensor, values: Tensor, bitmap: Tensor, row_starts: Tensor, bias: OptTensor) -> Tensor:
    dense = expand(values, bitmap, bitmap.shape[0], x.shape[-1])
    return F.linear(x, dense, None if bias is None else bias.to(x.dtype))


def check_weight(op: str, x: Tensor, values: Tensor, bitmap: Tensor, row_starts: Tensor) -> None:
    """What forward and backward ask of x and of the weight."""
    check_floating(op, x=x)
    torch._check(x.dim() >= 1, lambda: f"{op}: x is a scalar, expected at least one dimension")
    check_devices(op, x, values=values, bitmap=bitmap, row_starts=row_starts)
    torch._check(
        values.dtype == x.dtype,
        lambda: f"{op}: values are {dtype_name(values.dtype)}, expected {dtype_name(x.dtype)} as x is",
    )
    torch._check(values.dim() == 1, lambda: f"{op}: values have shape {tuple(values.shape)}, expected [nnz]")
    torch._check(bitmap.dtype == torch.uint8, lambda: f"{op}: bitmap is {dtype_name(bitmap.dtype)}, expected uint8")
    width = bitmap_bytes(x.shape[-1])
    torch._check(
        bitmap.dim() == 2 and bitmap.shape[0] >= 1 and bitmap.shape[1] == width,
        lambda: f"{op}: bitmap has shape {tuple(bitmap.shape)}, expected [N, {width}] with N >= 1 for K={x.shape[-1]}",
    )
    torch._check(
        row_starts.dtype == torch.int64, lambda: f"{op}: row_starts is {dtype_name(row_starts.dtype)}, expected int64"
    )
    torch._check(
        row_starts.dim() == 1 and row_starts.shape[0] == bitmap.shape[0] + 1,
        lambda: f"{op}: row_starts has shape {tuple(row_starts.shape)}, expected [{bitmap.shape[0] + 1}]",
    )
    for name, tensor in (("values are", values), ("bitmap is", bitmap), ("row_starts is", row_starts)):
        torch._check(
            tensor.is_contiguous(), lambda name=name: f"{op}: {name} not contiguous, expected compress's result"
        )


def fake(x: Tensor, values: Tensor, bitmap: Tensor, row_starts: Tensor, bias: OptTensor) -> Tensor:
    check_weight("sparse_linear", x, values, bitmap, row_starts)
    check_bias("sparse_linear", x, bias, bitmap.shape[0])
    return x.new_empty((*x.shape[:-1], bitmap.shape[0]))


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, values, bitmap, row_starts, bias = inputs
    ctx.save_for_backward(x, values, bitmap, row_starts)
    ctx.bias_dtype = None if bias is None else bias.dtype


def backward(ctx: Any, dy: Tensor) -> tuple[OptTensor, ...]:
    if torch.is_grad_enabled():
        raise RuntimeError("sparse_linear has no double backward: differentiate it without create_graph=True")
    x_grad, values_grad = ctx.needs_input_grad[:2]
    bias_grad = ctx.bias_dtype is not None and ctx.needs_input_grad[4]
    dx, dvalues, dbias = sparse_linear_backward(dy, *ctx.saved_tensors, x_grad, values_grad, bias_grad)
    offset = dbias.to(ctx.bias_dtype) if bias_grad else None
    return dx if x_grad else None, dvalues if values_grad else None, None, None, offset


def make(case: Case, backend: Backend, seed: int) -> tuple[Any, ...]:
    """Half of the weights are kept, or as the option ``density`` says; the second row is empty and the third full."""
    m, n, k = (case.dims[name] for name in "MNK")
    generator = torch.Generator().manual_seed(seed)
    share = case.options.get("density", 0.5)
    there = torch.rand(n, k, generator=generator) < share
    there[1:2], there[2:3] = False, True
    if case.values == "integers":
        x, weight = (torch.randint(-8, 9, (rows, k), generator=generator).float() for rows in (m, n))
        offset = torch.randint(-8, 9, (n,), generator=generator).float()
    else:
        x = torch.randn(m, k, generator=generator)
        weight = torch.randn(n, k, generator=generator) / max(k * share, 1) ** 0.5
        offset = torch.randn(n, generator=generator)
    dtype = case.options.get("bias", case.dtype)  # a dtype, or False
    return x.to(case.dtype), *compress(weight.to(case.dtype), there), offset.to(dtype) if dtype else None


def kept_count(case: Case) -> float:
    """Weights that :func:`make` keeps, on average."""
    return case.dims["N"] * case.dims["K"] * case.options.get("density", 0.5)


def cost(case: Case) -> Cost:
    m, n, k = (case.dims[name] for name in "MNK")
    weight = kept_count(case) * case.dtype.itemsize + n * bitmap_bytes(k) + 8 * n
    unit = "bf16" if case.dtype == torch.bfloat16 else "fp32"
    return Cost(2.0 * m * kept_count(case), weight + (m * k + m * n) * case.dtype.itemsize, unit)  # type: ignore[arg-type]


def baseline(x: Tensor, values: Tensor, bitmap: Tensor, row_starts: Tensor, bias: OptTensor) -> Callable[[], Tensor]:
    """torch's own linear on the dense weight."""
    dense = expand(values, bitmap, bitmap.shape[0], x.shape[-1])
    offset = None if bias is None else bias.to(x.dtype)
    return lambda: F.linear(x, dense, offset)


def _case(m: int, n: int, k: int, dtype: torch.dtype = torch.bfloat16, values: str = "normal", **options: Any) -> Case:
    return Case({"M": m, "N": n, "K": k}, dtype, values, options)


_EDGES = (
    (3, 17, 33), (0, 16, 32), (1, 1, 1), (1, 64, 64), (2, 16, 0), (5, 63, 100), (6, 65, 136), (17, 100, 259),
    (33, 33, 96), (65, 49, 70),
)  # fmt: skip
_TEST_CASES = (
    *(_case(*edge, dtype) for dtype in FLOATING for edge in _EDGES),
    *(_case(*edge, dtype, "integers") for dtype in FLOATING for edge in _EDGES[3:] if edge[2]),
    *(_case(9, 40, 48, dtype, bias=torch.float32) for dtype in (torch.bfloat16, torch.float16)),
    *(_case(m, 33, 72, bias=False) for m in (2, 19)),
    *(_case(m, 70, 200, dtype, density=kept) for dtype in FLOATING for m, kept in ((2, 0.1), (20, 0.0))),
    # more rows by the kept elements alone, in one vector of them and in several passes
    *(_case(m, 50, 260, dtype, density=0.1) for dtype in FLOATING for m in (13, 79)),
    *(_case(37, 33, 130, dtype, "integers", density=0.06) for dtype in FLOATING),
    # a narrow weight that is packed a part of its depth at a time
    *(_case(18, 40, 1500, dtype) for dtype in FLOATING),
)
_BENCH_ROWS = (1, 4, 16, 128, 512)
_BENCH_CASES = (
    *(_case(m, 4096, 4096, bias=False, density=kept) for kept in (0.5, 0.3, 0.1) for m in _BENCH_ROWS),
    *(_case(m, 4096, 4096, torch.float32, bias=False, density=0.1) for m in (1, 16, 128)),
)

_INVALID = (
    Invalid("x int32", lambda x, *r: (x.to(torch.int32), *r), "x is int32, expected fp32, bf16 or fp16"),
    Invalid("x fp64", lambda x, *r: (x.double(), *r), "x is fp64, expected fp32, bf16 or fp16"),
    Invalid("x scalar", lambda x, *r: (x.new_zeros(()), *r), "x is a scalar, expected"),
    Invalid("x inner dim", lambda x, *r: (x.repeat(1, 2), *r), r"bitmap has shape .*, expected \[N, 16\]"),
    Invalid("values dtype", lambda x, v, *r: (x, v.half(), *r), "values are fp16, expected fp32 as x is"),
    Invalid("values int8", lambda x, v, *r: (x, v.to(torch.int8), *r), "values are int8, expected fp32 as x is"),
    Invalid("values 2-d", lambda x, v, *r: (x, v[None], *r), r"values have shape .*, expected \[nnz\]"),
    Invalid("bitmap dtype", lambda x, v, m, *r: (x, v, m.bool(), *r), "bitmap is bool, expected uint8"),
    Invalid("bitmap width", lambda x, v, m, *r: (x, v, m[:, :5], *r), "bitmap has shape .*, expected"),
    Invalid("bitmap 1-d", lambda x, v, m, *r: (x, v, m.flatten(), *r), "bitmap has shape .*, expected"),
    Invalid("bitmap strided", lambda x, v, m, *r: (x, v, m.T.contiguous().T, *r), "bitmap is not contiguous"),
    Invalid("no rows", lambda x, v, m, s, b: (x, v, m[:0], s[:1], b), "bitmap has shape .*N >= 1"),
    Invalid("starts dtype", lambda x, v, m, s, b: (x, v, m, s.int(), b), "row_starts is int32, expected int64"),
    Invalid("starts length", lambda x, v, m, s, b: (x, v, m, s[:-1], b), "row_starts has shape .*, expected"),
    Invalid("bias int", lambda *a: (*a[:4], a[4].int()), "bias is int32, expected"),
    Invalid("bias length", lambda *a: (*a[:4], a[4][:-1]), "bias has shape .*expected"),
)

_KERNELS = "burnish.kernels.sparse.sparse_linear"

SPEC = register(
    OpSpec(
        name="sparse_linear",
        schema="(Tensor x, Tensor values, Tensor bitmap, Tensor row_starts, Tensor? bias) -> Tensor",
        reference=reference,
        fake=fake,
        autograd=Autograd(setup_context, backward, reference),
        impls=(
            Impl("native", "torch.ops:burnish.sparse_linear.native", f"{__name__}:supports_native"),
            Impl("triton", f"{_KERNELS}:sparse_linear", f"{_KERNELS}:supports"),
        ),
        cases=Cases(test=_TEST_CASES, bench=_BENCH_CASES, invalid=_INVALID),
        make=make,
        cost=cost,
        baseline=baseline,
    )
)


def supports_native(x: Tensor, *_: Any) -> str | None:
    """The CUDA C++ kernel streams the weight once for a few rows, which it keeps in shared memory."""
    m, k = x.shape[:-1].numel(), x.shape[-1]
    if m > NATIVE_ROWS:
        return f"M is {m}, the small-M kernel takes at most {NATIVE_ROWS}"
    rows = 1 << max(m - 1, 0).bit_length()
    words = rows if x.dtype == torch.float32 else (rows + 1) // 2
    taken = (k + NATIVE_SPAN - 1) // NATIVE_SPAN * NATIVE_SPAN * 4 * words
    if taken > NATIVE_X_BYTES:
        return f"x takes {taken} bytes of shared memory, the small-M kernel keeps at most {NATIVE_X_BYTES}"
    return on_device(x)


def backward_reference(
    dy: Tensor,
    x: Tensor,
    values: Tensor,
    bitmap: Tensor,
    row_starts: Tensor,
    x_grad: bool,
    values_grad: bool,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    N, K = bitmap.shape[0], x.shape[-1]
    rows, wide = as_rows(dy), torch.promote_types(dy.dtype, torch.float32)
    dx = dvalues = x.new_empty(0)
    if x_grad:
        dx = (rows @ expand(values, bitmap, N, K)).reshape(x.shape)
    if values_grad:
        places = kept(bitmap, K).flatten().nonzero().squeeze(-1)
        dvalues = (rows.T @ as_rows(x)).reshape(-1).index_select(0, places)
    dbias = rows.to(wide).sum(0) if bias_grad else dy.new_empty(0, dtype=wide)
    return dx, dvalues, dbias


def backward_fake(
    dy: Tensor,
    x: Tensor,
    values: Tensor,
    bitmap: Tensor,
    row_starts: Tensor,
    x_grad: bool,
    values_grad: bool,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    op = "sparse_linear_backward"
    check_weight(op, x, values, bitmap, row_starts)
    check_gradient(op, dy, x, bitmap.shape[0])
    dx = x.new_empty(x.shape if x_grad else (0,))
    dvalues = x.new_empty(values.shape if values_grad else (0,))
    return dx, dvalues, x.new_empty(bitmap.shape[0] if bias_grad else 0, dtype=torch.float32)


def backward_make(case: Case, backend: Backend, seed: int) -> tuple[Any, ...]:
    x, values, bitmap, row_starts, bias = make(case, backend, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    shape = (x.shape[0], bitmap.shape[0])
    integers = case.values == "integers"
    dy = torch.randint(-8, 9, shape, generator=generator) if integers else torch.randn(shape, generator=generator)
    wanted = case.options.get("grads", "all")
    return dy.to(case.dtype), x, values, bitmap, row_starts, wanted != "values", wanted != "x", bias is not None


def backward_cost(case: Case) -> Cost:
    forward, m, k = cost(case), case.dims["M"], case.dims["K"]
    more = (kept_count(case) + m * k) * case.dtype.itemsize
    return Cost(2 * forward.ops, forward.bytes + more, forward.unit)


def backward_baseline(
    dy: Tensor, x: Tensor, values: Tensor, bitmap: Tensor, row_starts: Tensor, *wanted: bool
) -> Callable[[], Any]:
    """torch's own products for the dense layer."""
    return dense_gradients(dy, x, expand(values, bitmap, bitmap.shape[0], x.shape[-1]), *wanted)


BACKWARD = register(
    OpSpec(
        name="sparse_linear_backward",
        schema="(Tensor dy, Tensor x, Tensor values, Tensor bitmap, Tensor row_starts, bool x_grad, bool values_grad, "
        "bool bias_grad) -> (Tensor, Tensor, Tensor)",
        reference=backward_reference,
        fake=backward_fake,
        autograd=None,
        impls=(Impl("triton", f"{_KERNELS}:sparse_linear_backward", f"{_KERNELS}:supports_backward"),),
        cases=Cases(
            test=(
                *(case for case in _TEST_CASES if case.options.get("bias") in (None, False)),
                *(_case(11, 40, 48, grads=grads) for grads in ("x", "values")),
            ),
            bench=tuple(
                _case(m, 4096, 4096, bias=False, density=kept) for kept in (0.5, 0.1) for m in (1, 16, 128, 512)
            ),
            invalid=(
                Invalid("dy shape", lambda dy, *r: (dy[..., :-1], *r), "dy has shape .*, expected"),
                Invalid("dy rows", lambda dy, *r: (dy[:-1], *r), "dy has shape .*, expected"),
                Invalid("dy dtype", lambda dy, *r: (dy.half(), *r), "dy is fp16, expected fp32 as x is"),
                Invalid("x int", lambda dy, x, *r: (dy, x.int(), *r), "x is int32, expected"),
                Invalid("values", lambda dy, x, v, *r: (dy, x, v[None], *r), "values have shape .*, expected"),
                Invalid("bitmap", lambda dy, x, v, m, *r: (dy, x, v, m[:, :3], *r), "bitmap has shape .*, expected"),
            ),
        ),
        make=backward_make,
        cost=backward_cost,
        baseline=backward_baseline,
    )
)

_linear, _inference, _backward = SPEC.overload(), SPEC.entry, BACKWARD.entry


def sparse_linear_backward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients, as :func:`backward_reference` defines them; positional arguments as in the op's schema."""
    if dispatch.overrides:
        return dispatch.call(BACKWARD, args, needs_grad=False)
    return _backward(*args)


def sparse_linear(x: Tensor, values: Tensor, bitmap: Tensor, row_starts: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ W^T + bias`` for a weight that keeps any elements; see the module for the format of :func:`compress`.

    Args:
        x: ``[..., K]``, fp32, bf16 or fp16.
        values: ``[nnz]`` in x's dtype, on its device.
        bitmap: uint8 ``[N, 8 * ceil(K / 64)]``.
        row_starts: int64 ``[N + 1]``.
        bias: ``[N]`` fp32, bf16 or fp16, or None.

    Returns:
        ``[..., N]`` in x's dtype. Differentiable in x, values and bias.

    Raises:
        RuntimeError: a shape, dtype or device that does not fit; the message names the argument.
    """
    needs_grad = dispatch.differentiates("sparse_linear", x, values, bias)
    if dispatch.overrides:
        return dispatch.call(SPEC, (x, values, bitmap, row_starts, bias), needs_grad)
    return (_linear if needs_grad else _inference)(x, values, bitmap, row_starts, bias)
