"""bsr_linear: a linear layer that has only some blocks of its weight, y = x W^T + bias.

==============  ======================  =====================================================================
x               [..., K]                fp32, bf16, fp16; any strides
values          [nnzb, bn, bk]          the kept blocks of W [N, K], in x's dtype; or int8 with a scale
crow_indices    int32 [Nb + 1]          where each row of blocks begins in values; Nb = ceil(N / bn)
col_indices     int32 [nnzb]            the column of blocks of each, ascending in a row; Kb = ceil(K / bk)
transposed      int32 [Kb + 1 + 2 nnzb] transpose_index's result: the same blocks by columns, for backward
scale           fp32 [N] or None        values * scale is the weight; for int8 values, and only for them
bias            [N] or None             fp32, bf16, fp16
y               [..., N]                x's dtype
==============  ======================  =====================================================================

Blocks are 16, 32, 64 or 128 square, 1 x 16 or 4 x 16. ``burnish.block_format`` has the format: compress, expand,
transpose_index. Where a block passes N or K, x (or dy) counts as padded with zeros and the elements of values there are
zero. Rows of blocks may be empty, and so may the whole weight: y is then the bias. What is not kept does not exist: a
NaN of x reaches the outputs that have a block in its column, and no others.

Sums are fp32 and y is rounded once. With int8 values x is quantised row by row as int8_linear does it, and y is
bit-equal to int8_linear's of the dense weight (there a NaN fills its row). Deterministic, independent of the number of
threads.

Gradients, of kept blocks alone:

    dx = dy W        dvalues[block] = dy^T x        dbias = sum_m dy

dvalues is zero in the padding. int8 values and their scale are frozen: dx = (dy * scale) values, straight through the
quantisation of x; dy * scale is fp32, of a bf16 dy rounded to bf16. Saved for backward: x and the weight. CPU kernels
check the range of every index, other backends trust them: modules call ``check_index`` where they are made or loaded.

Method: block sparsity, Gray et al. 2017 (GPU Kernels for Block-Sparse Weights).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from burnish import dispatch
from burnish.block_format import block_outer, block_product, blocks_along, check_weight, draw
from burnish.block_format import compress as compress  # beside the op, as users look for them
from burnish.block_format import expand as expand
from burnish.block_format import transpose_index as transpose_index
from burnish.checks import FLOATING
from burnish.native import warpgroups
from burnish.ops.int8_linear import MAX_K
from burnish.ops.int8_linear import reference as int8_reference
from burnish.ops.int8_linear import surrogate as int8_surrogate
from burnish.ops.int8_linear_pack import reference as int8_pack
from burnish.ops.int8_quantize_rows import make_rows
from burnish.ops.int8_quantize_rows import supports_native as on_device
from burnish.ops.lowrank_linear import as_rows, check_bias, check_gradient
from burnish.registry import Autograd, Backend, Case, Cases, Cost, Impl, Invalid, OpSpec, dtype_name, register
from burnish.sparse_formats import dense_gradients

OptTensor = Tensor | None

__all__ = ["bsr_linear"]

_UNITS = {torch.bfloat16: "bf16"}  # what else is multiplied as fp32


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def reference(
    x: Tensor, values: Tensor, crow_indices: Tensor, col_indices: Tensor, transposed: Tensor, scale: OptTensor,
    bias: OptTensor, N: int,
) -> Tensor:  # fmt: skip
    if scale is not None:
        dense = int8_pack(expand(values, crow_indices, col_indices, N, x.shape[-1]), "rows")
        return int8_reference(x, dense, scale, bias, 0, None)
    wide = _wide(x)
    y = block_product(as_rows(x).to(wide), values.to(wide), crow_indices, col_indices, N)
    if bias is not None:
        y = y + bias.to(wide)
    return y.to(x.dtype).reshape(*x.shape[:-1], N)


def surrogate(
    x: Tensor, values: Tensor, crow_indices: Tensor, col_indices: Tensor, transposed: Tensor, scale: OptTensor,
    bias: OptTensor, N: int,
) -> Tensor:  # fmt: skip
    if scale is None:
        return reference(x, values, crow_indices, col_indices, transposed, scale, bias, N)
    dense = int8_pack(expand(values, crow_indices, col_indices, N, x.shape[-1]), "rows")
    return int8_surrogate(x, dense, scale, bias, 0, None)


def fake(
    x: Tensor, values: Tensor, crow_indices: Tensor, col_indices: Tensor, transposed: Tensor, scale: OptTensor,
    bias: OptTensor, N: int,
) -> Tensor:  # fmt: skip
    check_weight("bsr_linear", x, values, crow_indices, col_indices, transposed, scale, N)
    K = x.shape[-1]
    torch._check(
        scale is None or K <= MAX_K, lambda: f"bsr_linear: K is {K}, expected at most {MAX_K} with int8 values"
    )
    check_bias("bsr_linear", x, bias, N)
    return x.new_empty((*x.shape[:-1], N))


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, bias, _ = inputs
    ctx.save_for_backward(*tensors)
    ctx.bias_dtype = None if bias is None else bias.dtype


def backward(ctx: Any, dy: Tensor) -> tuple[OptTensor, ...]:
    if torch.is_grad_enabled():
        raise RuntimeError("bsr_linear has no double backward: differentiate it without create_graph=True")
    x_grad, values_grad = ctx.needs_input_grad[:2]
    bias_grad = ctx.bias_dtype is not None and ctx.needs_input_grad[6]
    dx, dvalues, dbias = bsr_linear_backward(dy, *ctx.saved_tensors, x_grad, values_grad, bias_grad)
    pulled = dbias.to(ctx.bias_dtype) if bias_grad else None
    return dx if x_grad else None, dvalues if values_grad else None, *(None,) * 4, pulled, None


def _block(case: Case) -> tuple[int, int]:
    bn, bk = case.options["block"].split("x")
    return int(bn), int(bk)


def _kept(case: Case) -> int:
    (bn, bk), n, k = _block(case), case.dims["N"], case.dims["K"]
    return round(case.options["density"] * blocks_along(n, bn) * blocks_along(k, bk))


def make(case: Case, backend: Backend, seed: int) -> tuple[Any, ...]:
    m, n, k = (case.dims[name] for name in "MNK")
    generator = torch.Generator().manual_seed(seed)
    (bn, bk), integers, int8 = _block(case), case.values == "integers", _is_int8(case)
    what = "extreme" if case.values == "extreme" else "int8" if int8 else "integers" if integers else "normal"
    values, crow, col = draw(n, k, (bn, bk), _kept(case), what, generator)
    kept = case.options.get("bias", case.dtype)  # a dtype, or False
    x, bias, scale = (torch.randn(size, generator=generator) for size in ((m, k), (n,), (n,)))
    scale = (scale.abs() + 0.5) / 127 / max(k, 1) ** 0.5
    if integers:
        x, bias, scale = (4 * x).round().clamp(-8, 8), (4 * bias).round(), torch.ones(n)
    x = make_rows(case, seed) if int8 else x.to(case.dtype)
    return (
        x, values.to(torch.int8 if int8 else case.dtype), crow, col, transpose_index(crow, col, blocks_along(k, bk)),
        scale if int8 else None, bias.to(kept) if kept else None, n,
    )  # fmt: skip


def _is_int8(case: Case) -> bool:
    return case.options.get("weight") == "int8"


def _weight_bytes(case: Case) -> float:
    bn, bk = _block(case)
    size = 1 if _is_int8(case) else case.dtype.itemsize
    return _kept(case) * (bn * bk * size + 4.0) + 4.0 * case.dims["N"] * (1 / bn + _is_int8(case))


def cost(case: Case) -> Cost:
    (m, n, k), (bn, bk) = (case.dims[name] for name in "MNK"), _block(case)
    moved = (m * k + m * n) * case.dtype.itemsize + _weight_bytes(case)
    unit = "int8" if _is_int8(case) else _UNITS.get(case.dtype, "fp32")
    return Cost(2.0 * m * bn * bk * _kept(case), moved, unit)  # type: ignore[arg-type]


def _dense(args: list[Any], dtype: torch.dtype, K: int, N: int) -> Tensor:
    values, crow_indices, col_indices, _, scale = args
    weight = expand(values, crow_indices, col_indices, N, K)
    return (weight if scale is None else weight * scale[:, None]).to(dtype)


def baseline(x: Tensor, *args: Any) -> Callable[[], Tensor]:
    """torch's linear of the dense weight, in x's dtype."""
    *weight, bias, N = args
    dense = _dense(weight, x.dtype, x.shape[-1], N)
    offset = None if bias is None else bias.to(x.dtype)
    return lambda: F.linear(x, dense, offset)


def case_of(
    m: int, n: int, k: int, block: int | str, density: float, dtype: torch.dtype = torch.bfloat16,
    values: str = "normal", **options: Any,
) -> Case:  # fmt: skip
    shape = block if isinstance(block, str) else f"{block}x{block}"
    return Case({"M": m, "N": n, "K": k}, dtype, values, {"block": shape, "density": density, **options})


_BF16, _FP32, _FP16 = torch.bfloat16, torch.float32, torch.float16
_EDGES = (
    (3, 49, 65), (5, 63, 100), (7, 65, 129), (0, 16, 32), (1, 1, 1), (1, 64, 64), (2, 16, 0), (17, 100, 96),
    (33, 130, 67),
)  # fmt: skip
_TEST_CASES = (
    *(case_of(*edge, 16, 0.5, dtype) for dtype in (_FP32, _BF16, _FP16) for edge in _EDGES),
    *(case_of(*edge, 16, 0.5, dtype, "integers") for dtype in FLOATING for edge in (_EDGES[2], _EDGES[7])),
    *(case_of(m, 70, 100, 32, 0.4, dtype) for dtype in FLOATING for m in (2, 19, 65)),
    *(case_of(m, 70, 100, 32, 0.4, dtype, "integers") for dtype in FLOATING for m in (1, 29)),
    *(case_of(13, 130, 200, 64, 0.5, dtype, "integers") for dtype in (_BF16, _FP32)),
    *(case_of(m, 140, 300, 128, 0.6, _BF16, "integers") for m in (6, 18)),
    *(case_of(m, 264, 200, 128, 0.6, dtype) for m, dtype in ((65, _BF16), (130, _FP16))),
    *(case_of(*edge, 128, 0.6, _BF16) for edge in ((66, 136, 136), (130, 136, 264))),
    *(case_of(m, 136, 264, 128, 0.6, dtype, "integers") for m, dtype in ((130, _BF16), (67, _FP16))),
    *(case_of(m, 33, 50, block, 0.5, _BF16) for block in ("1x16", "4x16") for m in (1, 3, 20)),
    *(case_of(m, 33, 50, "1x16", 0.5, _FP32, "integers") for m in (1, 3, 20)),
    *(case_of(m, 33, 50, "4x16", 0.5, _FP16, "integers") for m in (1, 4, 20)),
    *(case_of(*edge, 16, 0.5, dtype, weight="int8") for dtype in (_BF16, _FP32) for edge in (_EDGES[0], (19, 70, 65))),
    *(case_of(5, 70, 100, block, 0.4, _BF16, "integers", weight="int8") for block in (64, 128, "1x16", "4x16")),
    *(case_of(m, 70, 100, 32, 0.4, _BF16, of, weight="int8") for m in (2, 21) for of in ("integers", "extreme")),
    *(case_of(m, 40, 48, 16, 0.0, _BF16, "integers", **more) for m in (1, 11) for more in ({}, {"weight": "int8"})),
    case_of(11, 40, 48, 16, 1.0, _FP32, "integers"),
    *(case_of(m, 40, 48, 16, 0.5, _BF16, bias=bias) for m, bias in ((2, False), (12, _FP32))),
)  # fmt: skip
_SQUARE = (4096, 4096)
_BENCH_CASES = (
    *(case_of(m, *_SQUARE, 32, density, bias=False) for density in (0.1, 0.5) for m in (1, 16, 128, 512)),
    *(case_of(m, *_SQUARE, block, 0.1, bias=False) for block in (16, 64, 128) for m in (1, 128)),
    *(case_of(m, *_SQUARE, block, 0.1, bias=False) for block in ("1x16", "4x16") for m in (1, 16)),
    *(case_of(m, *_SQUARE, 32, 0.1, bias=False, weight="int8") for m in (1, 128)),
    case_of(128, *_SQUARE, 32, 0.1, _FP32, bias=False),
)
_WIDE_CASES = tuple(
    case_of(4096, *_SQUARE, block, density, bias=False) for block in (64, 128) for density in (0.1, 0.5)
)
_INVALID = (
    Invalid("x int32", lambda x, *r: (x.int(), *r), "x is int32, expected fp32, bf16 or fp16"),
    Invalid("x scalar", lambda x, *r: (x.new_zeros(()), *r), "x is a scalar, expected"),
    Invalid("x inner dim", lambda x, *r: (x[:, :16], *r), "transposed has shape .*, expected .* K=16"),
    Invalid("values dtype", lambda x, v, *r: (x, v.half(), *r), "values is fp16, expected fp32 as x is"),
    Invalid("values int8", lambda x, v, *r: (x, v.char(), *r), "values is int8, expected fp32 as x is, or int8 with"),
    Invalid("values 2-d", lambda x, v, *r: (x, v.flatten(1), *r), r"values has shape .*, expected \[nnzb, bn, bk\]"),
    Invalid("values block", lambda x, v, *r: (x, v[:, :8], *r), "values has shape .*, expected .* 16x16, 32x32"),
    Invalid("values count", lambda x, v, *r: (x, v[1:], *r), "col_indices has shape .*, expected"),
    Invalid("values strided", lambda x, v, *r: (x, v.mT, *r), "values is not contiguous"),
    Invalid("crow int", lambda x, v, c, *r: (x, v, c.long(), *r), "crow_indices is int64, expected int32"),
    Invalid("crow length", lambda x, v, c, *r: (x, v, c[1:], *r), "crow_indices has shape .*, expected .* N=49"),
    Invalid("col 2-d", lambda x, v, c, k, *r: (x, v, c, k[None], *r), "col_indices has shape .*, expected"),
    Invalid("transposed", lambda *a: (*a[:4], a[4][:-1], *a[5:]), "transposed has shape .*, expected"),
    Invalid("scale", lambda *a: (*a[:5], torch.ones(49), *a[6:]), "values is fp32, expected int8 as there is a scale"),
    Invalid(
        "scale fp64", lambda x, v, *r: (x, v.char(), *r[:3], x.double()[0], *r[4:]), "scale is fp64, expected fp32"
    ),
    Invalid("scale length", lambda x, v, *r: (x, v.char(), *r[:3], x[0], *r[4:]), r"scale has shape .* \[49\]"),
    Invalid("bias int", lambda *a: (*a[:6], a[6].int(), a[7]), "bias is int32, expected"),
    Invalid("bias length", lambda *a: (*a[:6], a[6][:-1], a[7]), r"bias has shape .*expected \[49\]"),
    Invalid("N", lambda *a: (*a[:7], 100), "crow_indices has shape .*, expected"),
    Invalid("N zero", lambda *a: (*a[:7], 0), "N is 0, expected at least 1"),
)


#: blocks and rows of x, more than so many, that the CUDA C++ kernel takes; csrc/cuda/bsr_linear.cu knows both too
NATIVE_BLOCK, NATIVE_ROWS = (128, 128), 64

_KERNELS = "burnish.kernels.sparse.bsr_linear"

SPEC = register(
    OpSpec(
        name="bsr_linear",
        schema="(Tensor x, Tensor values, Tensor crow_indices, Tensor col_indices, Tensor transposed, Tensor? scale, "
        "Tensor? bias, int N) -> Tensor",
        reference=reference,
        fake=fake,
        autograd=Autograd(setup_context, backward, surrogate),
        impls=(
            Impl("native", "torch.ops:burnish.bsr_linear.native", f"{__name__}:supports_native"),
            Impl("triton", f"{_KERNELS}:bsr_linear", f"{_KERNELS}:supports"),
        ),
        cases=Cases(test=_TEST_CASES, bench=_BENCH_CASES, invalid=_INVALID, wide=_WIDE_CASES),
        make=make,
        cost=cost,
        baseline=baseline,
    )
)


def supports_native(
    x: Tensor, values: Tensor, crow_indices: Tensor, col_indices: Tensor, transposed: Tensor, scale: OptTensor,
    bias: OptTensor, N: int,
) -> str | None:  # fmt: skip
    """The CUDA C++ kernel multiplies large blocks and many rows by warpgroups."""
    (m, k), (_, bn, bk) = (x.shape[:-1].numel(), x.shape[-1]), values.shape
    if values.element_size() != 2:
        return f"values are {dtype_name(values.dtype)}, the kernel takes bf16 and fp16"
    if (bn, bk) != NATIVE_BLOCK:
        return f"blocks are {bn}x{bk}, the kernel takes {NATIVE_BLOCK[0]}x{NATIVE_BLOCK[1]}"
    if m <= NATIVE_ROWS:
        return f"M is {m}, the kernel takes more than {NATIVE_ROWS}"
    if k == 0 or k % 8 or N % 8:
        return f"K is {k} and N {N}, the kernel takes multiples of 8"
    return on_device(x) or (None if warpgroups(x.device) else "the kernel needs sm_90")


def backward_reference(
    dy: Tensor, x: Tensor, values: Tensor, crow_indices: Tensor, col_indices: Tensor, transposed: Tensor,
    scale: OptTensor, x_grad: bool, values_grad: bool, bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    (nnzb, bn, bk), wide = values.shape, _wide(x)
    pulled = as_rows(dy).to(wide)
    dx, dvalues, dbias = x.new_empty(0), x.new_empty(0), pulled.new_empty(0)
    if x_grad:
        starts, row, order = transposed.long().split((len(transposed) - 2 * nnzb, nnzb, nnzb))
        scaled = pulled
        if scale is not None:  # a copy: stored in dy's dtype, in the kit's eyes
            scaled = (pulled * scale.to(wide)).to(dy.dtype, copy=True).to(wide)
        blocks = values.to(wide).index_select(0, order).transpose(1, 2)
        dx = block_product(scaled, blocks, starts, row, x.shape[-1]).to(x.dtype).reshape(x.shape)
    if values_grad:
        dvalues = block_outer(pulled, as_rows(x).to(wide), crow_indices, col_indices, (bn, bk)).to(x.dtype)
    if bias_grad:
        dbias = pulled.sum(0)
    return dx, dvalues, dbias


def backward_fake(
    dy: Tensor, x: Tensor, values: Tensor, crow_indices: Tensor, col_indices: Tensor, transposed: Tensor,
    scale: OptTensor, x_grad: bool, values_grad: bool, bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    op = "bsr_linear_backward"
    torch._check(dy.dim() >= 1, lambda: f"{op}: dy is a scalar, expected at least one dimension")
    N = dy.shape[-1]
    check_weight(op, x, values, crow_indices, col_indices, transposed, scale, N)
    check_gradient(op, dy, x, N)
    torch._check(
        scale is None or not values_grad, lambda: f"{op}: values_grad is True, expected False: int8 values are frozen"
    )
    dx, dvalues = x.new_empty(x.shape if x_grad else (0,)), x.new_empty(values.shape if values_grad else (0,))
    return dx, dvalues, x.new_empty(N if bias_grad else 0, dtype=torch.float32)


def backward_make(case: Case, backend: Backend, seed: int) -> tuple[Any, ...]:
    x, *weight, bias, n = make(case, backend, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    shape = (case.dims["M"], n)
    dy = torch.randn(shape, generator=generator)
    dy = (4 * dy).round().clamp(-8, 8) if case.values == "integers" else dy
    wanted = case.options.get("grads", "all")
    return (
        dy.to(case.dtype), x, *weight, wanted != "values", wanted != "x" and not _is_int8(case), bias is not None,
    )  # fmt: skip


def backward_cost(case: Case) -> Cost:
    (m, n, k), (bn, bk) = (case.dims[name] for name in "MNK"), _block(case)
    products = 1 if _is_int8(case) else 2
    moved = (m * n + (1 + products) * m * k) * case.dtype.itemsize + products * _weight_bytes(case)
    unit = "fp32" if _is_int8(case) else _UNITS.get(case.dtype, "fp32")
    return Cost(2.0 * products * m * bn * bk * _kept(case), moved, unit)  # type: ignore[arg-type]


def backward_baseline(dy: Tensor, x: Tensor, *args: Any) -> Callable[[], Any]:
    """torch's own products for the dense layer."""
    *weight, x_grad, values_grad, bias_grad = args
    return dense_gradients(dy, x, _dense(weight, x.dtype, x.shape[-1], dy.shape[-1]), x_grad, values_grad, bias_grad)


BACKWARD = register(
    OpSpec(
        name="bsr_linear_backward",
        schema="(Tensor dy, Tensor x, Tensor values, Tensor crow_indices, Tensor col_indices, Tensor transposed, "
        "Tensor? scale, bool x_grad, bool values_grad, bool bias_grad) -> (Tensor, Tensor, Tensor)",
        reference=backward_reference,
        fake=backward_fake,
        autograd=None,
        impls=(Impl("triton", f"{_KERNELS}:bsr_linear_backward", f"{_KERNELS}:supports_backward"),),
        cases=Cases(
            test=(
                *(case for case in _TEST_CASES if case.values != "extreme" and "bias" not in case.options),
                *(case_of(11, 40, 48, 16, 0.5, _BF16, grads=grads) for grads in ("x", "values")),
            ),
            bench=(
                *(case_of(m, *_SQUARE, 32, 0.1, bias=False) for m in (16, 128, 512)),
                case_of(128, *_SQUARE, 32, 0.5, bias=False),
                case_of(128, *_SQUARE, 32, 0.1, bias=False, weight="int8"),
            ),
            invalid=(
                Invalid("dy shape", lambda dy, *r: (dy[..., :-1], *r), "crow_indices|dy has shape .*, expected"),
                Invalid("dy rows", lambda dy, *r: (dy[:-1], *r), "dy has shape .*, expected"),
                Invalid("dy dtype", lambda dy, *r: (dy.half(), *r), "dy is fp16, expected fp32 as x is"),
                Invalid("x int", lambda dy, x, *r: (dy, x.int(), *r), "x is int32, expected"),
                Invalid("values", lambda dy, x, v, *r: (dy, x, v[1:], *r), "col_indices has shape .*, expected"),
                Invalid(
                    "int8 values_grad",
                    lambda dy, x, v, *r: (dy, x, v.char(), *r[:3], torch.ones(49), *r[4:]),
                    "values_grad is True, expected False",
                ),
            ),
        ),
        make=backward_make,
        cost=backward_cost,
        baseline=backward_baseline,
    )
)

_linear, _inference, _backward = SPEC.overload(), SPEC.entry, BACKWARD.entry


def bsr_linear_backward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients, as :func:`backward_reference` defines them; positional arguments as in the op's schema."""
    if dispatch.overrides:
        return dispatch.call(BACKWARD, args, needs_grad=False)
    return _backward(*args)


def bsr_linear(
    x: Tensor, values: Tensor, crow_indices: Tensor, col_indices: Tensor, transposed: Tensor, scale: OptTensor,
    bias: OptTensor, N: int,
) -> Tensor:  # fmt: skip
    """``x W^T + bias`` for a W of kept blocks.

    Args:
        x: ``[..., K]``, fp32, bf16 or fp16.
        values, crow_indices, col_indices: ``compress``'s of W, values in x's dtype or int8, on x's device.
        transposed: ``transpose_index``'s of them.
        scale: fp32 ``[N]`` with int8 values, else None.
        bias: ``[N]`` fp32, bf16 or fp16, or None.
        N: rows of W.

    Returns:
        ``[..., N]`` in x's dtype. Differentiable in x, bias and values that are not int8.

    Raises:
        RuntimeError: a shape, dtype, device or index that does not fit; the message names the argument.
    """
    needs_grad = dispatch.differentiates("bsr_linear", x, values, bias)
    args = (x, values, crow_indices, col_indices, transposed, scale, bias, N)
    if dispatch.overrides:
        return dispatch.call(SPEC, args, needs_grad)
    return (_linear if needs_grad else _inference)(*args)
