"""sparse24_linear: a linear layer with at most two of each four weights along K, the pattern that tensor cores know.

    y = x W^T + bias          W = expand(values, metadata) [* scale]

==========  ====================  =====================================================================
x           [..., K]              fp32, bf16, fp16; any strides
values      [N, Kp / 2]           x's dtype, or int8; the two kept weights of each group of four, by position
metadata    uint8 [N, Kp / 8]     a group is 4 bits, first position in the low two; two groups a byte, first one low
scale       [N] or None           fp32, with int8 values: values * scale are the weights
bias        [N] or None           fp32, bf16, fp16
y           [..., N]              x's dtype
==========  ====================  =====================================================================

Kp is K rounded up to a multiple of 8. The first position of a group is below the second, always: a group with fewer
weights names its lowest free positions, with zeros. Read as little-endian words, metadata has the order of ``mma.sp``.
What is stored is bit for bit what :func:`expand` gives back, and :func:`compress` is its inverse.

Sums are fp32, rounded once. With int8 values x is quantised row by row, products are summed in int32, and the result is
bit-equal to int8_linear's on the dense int8 weight. Weights that are not stored count as zeros: a NaN or an infinity of
x makes NaN of them as in a dense layer. Deterministic, and independent of the number of threads.

    dx = dy W          dvalues = dy^T x at the stored positions          dbias = sum_m dy

int8 values have no gradient, and dx passes straight through the quantisation of x: dx = (dy * scale) values;
dy * scale is fp32, of a bf16 dy rounded to bf16. Saved for backward: values and metadata, and x where values are not
int8.

Method: 2:4 structured sparsity, Mishra et al. 2021 (arXiv 2104.08378).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from burnish import dispatch
from burnish.checks import FLOATING
from burnish.ops.int8_linear import MAX_K
from burnish.ops.int8_linear import reference as int8_product
from burnish.ops.int8_linear import surrogate as int8_smooth
from burnish.ops.int8_linear_pack import make_weight
from burnish.ops.int8_linear_pack import reference as pack_int8
from burnish.ops.int8_quantize_rows import make_rows
from burnish.ops.int8_quantize_rows import supports_native as on_device
from burnish.ops.lowrank_linear import as_rows, check_bias, check_gradient
from burnish.registry import Autograd, Backend, Case, Cases, Cost, Impl, Invalid, OpSpec, register
from burnish.sparse24_format import GROUP, KEPT, STEP, check_weight, compress, expand, padded, positions
from burnish.sparse_formats import dense_gradients, pick

OptTensor = Tensor | None

__all__ = ["sparse24_linear"]


def _packed(values: Tensor, metadata: Tensor, N: int, K: int) -> Tensor:
    return pack_int8(expand(values, metadata, N, K), "rows")


def reference(x: Tensor, values: Tensor, metadata: Tensor, scale: OptTensor, bias: OptTensor) -> Tensor:
    N, K = metadata.shape[0], x.shape[-1]
    if scale is not None:
        return int8_product(x, _packed(values, metadata, N, K), scale, bias, 0, None)
    return F.linear(x, expand(values, metadata, N, K), None if bias is None else bias.to(x.dtype))


def surrogate(x: Tensor, values: Tensor, metadata: Tensor, scale: OptTensor, bias: OptTensor) -> Tensor:
    N, K = metadata.shape[0], x.shape[-1]
    if scale is not None:
        return int8_smooth(x, _packed(values, metadata, N, K), scale, bias, 0, None)
    return reference(x, values, metadata, None, bias)


def check_operands(op: str, x: Tensor, values: Tensor, metadata: Tensor, scale: OptTensor) -> None:
    """What forward and backward ask of x and of the weight."""
    check_weight(op, x, values, metadata, scale)
    torch._check(
        scale is None or x.shape[-1] <= MAX_K,
        lambda: f"{op}: K is {x.shape[-1]}, expected at most {MAX_K}: int32 sums could overflow",
    )


def fake(x: Tensor, values: Tensor, metadata: Tensor, scale: OptTensor, bias: OptTensor) -> Tensor:
    check_operands("sparse24_linear", x, values, metadata, scale)
    check_bias("sparse24_linear", x, bias, metadata.shape[0])
    return x.new_empty((*x.shape[:-1], metadata.shape[0]))


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, values, metadata, scale, bias = inputs
    ctx.save_for_backward(x if scale is None else None, values, metadata, scale)
    ctx.x_shape, ctx.bias_dtype = x.shape, None if bias is None else bias.dtype


def backward(ctx: Any, dy: Tensor) -> tuple[OptTensor, ...]:
    if torch.is_grad_enabled():
        raise RuntimeError("sparse24_linear has no double backward: differentiate it without create_graph=True")
    x, values, metadata, scale = ctx.saved_tensors
    x_grad, values_grad = ctx.needs_input_grad[0], scale is None and ctx.needs_input_grad[1]
    bias_grad = ctx.bias_dtype is not None and ctx.needs_input_grad[4]
    if x is None:  # only its shape counts
        x = dy.new_empty(()).expand(ctx.x_shape)
    dx, dvalues, dbias = sparse24_linear_backward(dy, x, values, metadata, scale, x_grad, values_grad, bias_grad)
    offset = dbias.to(ctx.bias_dtype) if bias_grad else None
    return dx if x_grad else None, dvalues if values_grad else None, None, None, offset


def make(case: Case, backend: Backend, seed: int) -> tuple[Any, ...]:
    n, k = case.dims["N"], case.dims["K"]
    generator = torch.Generator().manual_seed(seed + 1)
    as_int8 = case.options.get("weight") == "int8"
    if as_int8:
        weight = make_weight(case, seed)
    elif case.values == "integers":
        weight = torch.randint(-8, 9, (n, k), generator=generator).to(case.dtype)
    else:
        weight = (torch.randn(n, k, generator=generator) / max(k / 2, 1) ** 0.5).to(case.dtype)
    order = torch.rand(n, padded(k) // GROUP, GROUP, generator=generator).argsort(-1).flatten(1)[:, :k]
    kept = (order < KEPT) & (torch.rand(n, k, generator=generator) < 0.95)  # and groups of fewer
    values, metadata = compress(weight, kept)
    scale = None
    if as_int8:
        exact = case.values == "integers"
        scale = torch.ones(n) if exact else (torch.rand(n, generator=generator) + 0.5) / 127 / max(k / 2, 1) ** 0.5
    offset = torch.randn(n, generator=generator)
    if case.values == "integers":
        offset = torch.randint(-8, 9, (n,), generator=generator).float()
    dtype = case.options.get("bias", case.dtype)  # a dtype, or False
    return make_rows(case, seed), values, metadata, scale, offset.to(dtype) if dtype else None


def _moved(case: Case) -> tuple[float, str]:
    """Bytes of x, of the weight and of y; what multiplies them."""
    m, n, k = (case.dims[name] for name in "MNK")
    as_int8 = case.options.get("weight") == "int8"
    size = 1 if as_int8 else case.dtype.itemsize
    weight = n * (padded(k) / KEPT * size + padded(k) / STEP + 4 * as_int8)
    unit = "int8" if as_int8 else "bf16" if case.dtype == torch.bfloat16 else "fp32"
    return weight + (m * k + m * n) * case.dtype.itemsize, unit


def cost(case: Case) -> Cost:
    moved, unit = _moved(case)
    return Cost(1.0 * case.dims["M"] * case.dims["N"] * case.dims["K"], moved, unit)  # type: ignore[arg-type]


def _dense(x: Tensor, values: Tensor, metadata: Tensor, scale: OptTensor) -> Tensor:
    weight = expand(values, metadata, metadata.shape[0], x.shape[-1])
    return weight if scale is None else (weight * scale.unsqueeze(-1)).to(x.dtype)


def baseline(x: Tensor, values: Tensor, metadata: Tensor, scale: OptTensor, bias: OptTensor) -> Callable[[], Tensor]:
    """torch's own linear on the dense weight, in x's dtype."""
    dense, offset = _dense(x, values, metadata, scale), None if bias is None else bias.to(x.dtype)
    return lambda: F.linear(x, dense, offset)


def _case(m: int, n: int, k: int, dtype: torch.dtype = torch.bfloat16, values: str = "normal", **options: Any) -> Case:
    return Case({"M": m, "N": n, "K": k}, dtype, values, options)


_EDGES = (
    (3, 17, 33), (0, 16, 32), (1, 1, 1), (1, 64, 64), (2, 16, 0), (5, 63, 100), (6, 65, 136), (17, 100, 259),
    (33, 33, 96), (65, 49, 70),
)  # fmt: skip
_INT8_EDGES = ((3, 17, 33), (2, 16, 0), (1, 65, 136), (7, 63, 100), (17, 100, 259), (33, 33, 96))
# many rows of whole lines, which warpgroups multiply
_WIDE_EDGES = ((70, 136, 128), (140, 72, 256))
_TEST_CASES = (
    *(_case(*edge, dtype) for dtype in FLOATING for edge in _EDGES),
    *(_case(*edge, dtype, "integers") for dtype in FLOATING for edge in _EDGES[3:] if edge[2]),
    *(_case(9, 40, 48, dtype, bias=torch.float32) for dtype in (torch.bfloat16, torch.float16)),
    *(_case(m, 33, 72, bias=False) for m in (2, 19)),
    # a narrow weight that is packed a part of its depth at a time
    *(_case(18, 40, 1500, dtype) for dtype in FLOATING),
    *(_case(*edge, dtype, weight="int8") for dtype in FLOATING for edge in _INT8_EDGES),
    *(_case(*edge, values=values, weight="int8") for values in ("integers", "extreme") for edge in _INT8_EDGES[2:5]),
    _case(66, 16, 0),
    *(_case(*_WIDE_EDGES[0], dtype) for dtype in (torch.bfloat16, torch.float16)),
    *(_case(*_WIDE_EDGES[1], dtype, "integers") for dtype in (torch.bfloat16, torch.float16)),
    *(_case(*edge, values="extreme", weight="int8") for edge in _WIDE_EDGES),
)
_BENCH_ROWS = (1, 4, 16, 128, 512)
_BENCH_CASES = (
    *(_case(m, 4096, 4096, bias=False, density=0.5) for m in _BENCH_ROWS),
    *(_case(m, 4096, 4096, bias=False, density=0.5, weight="int8") for m in _BENCH_ROWS),
    *(_case(m, 4096, 4096, torch.float32, bias=False, density=0.5) for m in (1, 16, 128)),
)
_WIDE_CASES = (
    _case(4096, 4096, 4096, bias=False, density=0.5),
    _case(4096, 4096, 4096, bias=False, density=0.5, weight="int8"),
)

_INVALID = (
    Invalid("x int32", lambda x, *r: (x.to(torch.int32), *r), "x is int32, expected fp32, bf16 or fp16"),
    Invalid("x fp64", lambda x, *r: (x.double(), *r), "x is fp64, expected fp32, bf16 or fp16"),
    Invalid("x scalar", lambda x, *r: (x.new_zeros(()), *r), "x is a scalar, expected"),
    Invalid("x inner dim", lambda x, *r: (x[:, :16], *r), r"metadata has shape .*, expected \[N, 2\]"),
    Invalid("values dtype", lambda x, v, *r: (x, v.half(), *r), "values are fp16, expected fp32 as x is"),
    Invalid("int8 without scale", lambda x, v, *r: (x, v.to(torch.int8), *r), "values are int8, expected fp32 as x is"),
    Invalid("scale", lambda x, v, m, s, b: (x, v, m, b, b), "values are fp32, expected int8 with a scale"),
    Invalid("scale dtype", lambda x, v, m, s, b: (x, v.to(torch.int8), m, b.half(), b), "scale is fp16, expected fp32"),
    Invalid("scale shape", lambda x, v, m, s, b: (x, v.to(torch.int8), m, b[:-1], b), "scale has shape .*, expected"),
    Invalid("values width", lambda x, v, *r: (x, v[:, :-1], *r), "values have shape .*, expected"),
    Invalid("values strided", lambda x, v, *r: (x, v.T.contiguous().T, *r), "values are not contiguous, expected"),
    Invalid("metadata dtype", lambda x, v, m, *r: (x, v, m.int(), *r), "metadata is int32, expected uint8"),
    Invalid("metadata strided", lambda x, v, m, *r: (x, v, m.T.contiguous().T, *r), "metadata is not contiguous"),
    Invalid("no rows", lambda x, v, m, *r: (x, v[:0], m[:0], *r), "metadata has shape .*N >= 1"),
    Invalid("bias int", lambda *a: (*a[:4], a[4].int()), "bias is int32, expected"),
    Invalid("bias length", lambda *a: (*a[:4], a[4][:-1]), "bias has shape .*expected"),
)

_KERNELS = "burnish.kernels.sparse.sparse24_linear"

SPEC = register(
    OpSpec(
        name="sparse24_linear",
        schema="(Tensor x, Tensor values, Tensor metadata, Tensor? scale, Tensor? bias) -> Tensor",
        reference=reference,
        fake=fake,
        autograd=Autograd(setup_context, backward, surrogate),
        impls=(
            Impl("native", "torch.ops:burnish.sparse24_linear.native", f"{__name__}:supports_native"),
            Impl("triton", f"{_KERNELS}:sparse24_linear", f"{_KERNELS}:supports"),
        ),
        cases=Cases(test=_TEST_CASES, bench=_BENCH_CASES, invalid=_INVALID, wide=_WIDE_CASES),
        make=make,
        cost=cost,
        baseline=baseline,
    )
)


def supports_native(x: Tensor, values: Tensor, *_: Any) -> str | None:
    """The CUDA C++ kernels multiply on the sparse tensor cores."""
    if values.dtype == torch.float32:
        return "values are fp32, sparse tensor cores take bf16, fp16 and int8"
    if x.shape[-1] > MAX_K:
        return f"K is {x.shape[-1]}, the kernel takes at most {MAX_K}"
    return on_device(x)


def backward_reference(
    dy: Tensor,
    x: Tensor,
    values: Tensor,
    metadata: Tensor,
    scale: OptTensor,
    x_grad: bool,
    values_grad: bool,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    N, K = metadata.shape[0], x.shape[-1]
    rows, wide = as_rows(dy), torch.promote_types(dy.dtype, torch.float32)
    dx = dvalues = x.new_empty(0)
    if x_grad:
        scaled = rows
        if scale is not None:  # a copy: stored in dy's dtype, in the kit's eyes
            scaled = (rows.to(wide) * scale.to(wide)).to(dy.dtype, copy=True).to(wide)
        dx = (scaled @ expand(values, metadata, N, K).to(scaled.dtype)).to(x.dtype).reshape(x.shape)
    if values_grad:
        dvalues = pick(rows.T @ as_rows(x), positions(metadata))
    dbias = rows.to(wide).sum(0) if bias_grad else dy.new_empty(0, dtype=wide)
    return dx, dvalues, dbias


def backward_fake(
    dy: Tensor,
    x: Tensor,
    values: Tensor,
    metadata: Tensor,
    scale: OptTensor,
    x_grad: bool,
    values_grad: bool,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    op = "sparse24_linear_backward"
    check_operands(op, x, values, metadata, scale)
    check_gradient(op, dy, x, metadata.shape[0])
    torch._check(
        not (values_grad and scale is not None), lambda: f"{op}: values_grad is True, but int8 values have no gradient"
    )
    dx = x.new_empty(x.shape if x_grad else (0,))
    dvalues = x.new_empty(values.shape if values_grad else (0,))
    return dx, dvalues, x.new_empty(metadata.shape[0] if bias_grad else 0, dtype=torch.float32)


def backward_make(case: Case, backend: Backend, seed: int) -> tuple[Any, ...]:
    x, values, metadata, scale, bias = make(case, backend, seed)
    generator = torch.Generator().manual_seed(seed + 2)
    shape = (x.shape[0], metadata.shape[0])
    integers = case.values == "integers"
    dy = torch.randint(-8, 9, shape, generator=generator) if integers else torch.randn(shape, generator=generator)
    wanted = case.options.get("grads", "all")
    values_grad = scale is None and wanted != "x"
    return dy.to(case.dtype), x, values, metadata, scale, wanted != "values", values_grad, bias is not None


def backward_cost(case: Case) -> Cost:
    m, n, k = (case.dims[name] for name in "MNK")
    moved, unit = _moved(case)
    products = 1 if unit == "int8" else 2
    moved += (products - 1) * (n * padded(k) / KEPT + m * k) * case.dtype.itemsize
    return Cost(1.0 * products * m * n * k, moved, "fp32" if unit == "int8" else unit)  # type: ignore[arg-type]


def backward_baseline(
    dy: Tensor, x: Tensor, values: Tensor, metadata: Tensor, scale: OptTensor, *wanted: bool
) -> Callable[[], Any]:
    """torch's own products for the dense layer."""
    return dense_gradients(dy, x, _dense(x, values, metadata, scale), *wanted)


BACKWARD = register(
    OpSpec(
        name="sparse24_linear_backward",
        schema="(Tensor dy, Tensor x, Tensor values, Tensor metadata, Tensor? scale, bool x_grad, bool values_grad, "
        "bool bias_grad) -> (Tensor, Tensor, Tensor)",
        reference=backward_reference,
        fake=backward_fake,
        autograd=None,
        impls=(Impl("triton", f"{_KERNELS}:sparse24_linear_backward", f"{_KERNELS}:supports_backward"),),
        cases=Cases(
            test=(
                *(
                    case
                    for case in _TEST_CASES
                    if case.values != "extreme" and case.options.get("bias") in (None, False)
                ),
                *(_case(11, 40, 48, grads=grads) for grads in ("x", "values")),
            ),
            bench=(
                *(_case(m, 4096, 4096, bias=False) for m in (1, 16, 128, 512)),
                *(_case(m, 4096, 4096, bias=False, weight="int8") for m in (16, 128)),
            ),
            invalid=(
                Invalid("dy shape", lambda dy, *r: (dy[..., :-1], *r), "dy has shape .*, expected"),
                Invalid("dy rows", lambda dy, *r: (dy[:-1], *r), "dy has shape .*, expected"),
                Invalid("dy dtype", lambda dy, *r: (dy.half(), *r), "dy is fp16, expected fp32 as x is"),
                Invalid("x int", lambda dy, x, *r: (dy, x.int(), *r), "x is int32, expected"),
                Invalid("values", lambda dy, x, v, *r: (dy, x, v[:, :-1], *r), "values have shape .*, expected"),
                Invalid(
                    "metadata", lambda dy, x, v, m, *r: (dy, x, v, m[:, :-1], *r), "metadata has shape .*, expected"
                ),
                Invalid(
                    "int8 gradient",
                    lambda dy, x, v, m, s, *r: (dy, x, v.to(torch.int8), m, dy[0].clone(), *r),
                    "values_grad is True, but int8 values have no gradient",
                ),
            ),
        ),
        make=backward_make,
        cost=backward_cost,
        baseline=backward_baseline,
    )
)

_linear, _inference, _backward = SPEC.overload(), SPEC.entry, BACKWARD.entry


def sparse24_linear_backward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients, as :func:`backward_reference` defines them; positional arguments as in the op's schema."""
    if dispatch.overrides:
        return dispatch.call(BACKWARD, args, needs_grad=False)
    return _backward(*args)


def sparse24_linear(
    x: Tensor, values: Tensor, metadata: Tensor, scale: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """``x @ W^T + bias`` for a weight in 2:4 form; see the module for the format, which :func:`compress` makes.

    Args:
        x: ``[..., K]``, fp32, bf16 or fp16.
        values: ``[N, Kp / 2]`` in x's dtype, or int8; on x's device.
        metadata: uint8 ``[N, Kp / 8]``.
        scale: fp32 ``[N]``, with int8 values.
        bias: ``[N]`` fp32, bf16 or fp16, or None.

    Returns:
        ``[..., N]`` in x's dtype. Differentiable in x, bias and float values.

    Raises:
        RuntimeError: a shape, dtype or device that does not fit; the message names the argument.
    """
    needs_grad = dispatch.differentiates("sparse24_linear", x, values, bias)
    if dispatch.overrides:
        return dispatch.call(SPEC, (x, values, metadata, scale, bias), needs_grad)
    return (_linear if needs_grad else _inference)(x, values, metadata, scale, bias)
