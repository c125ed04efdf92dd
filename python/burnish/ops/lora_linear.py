"""lora_linear: a frozen linear layer and its low-rank adapter in one call, dropout included.

    h = keep * x          s = c h A^T          y = x W^T + bias + s B^T          c = scale * dropout.factor(p)

============  ===========  =======================================================================
x             [..., K]     fp32, bf16, fp16; any strides
weight        frozen       the base, in one of the formats of :mod:`burnish.bases`
weight_scale  or None      likewise
bias          [N] or None  fp32, bf16, fp16
A             [R, K]       x's dtype
B             [N, R]       x's dtype
seed          [1] or None  int64; None for p = 0
y             [..., N]     x's dtype
============  ===========  =======================================================================

``keep`` is :func:`burnish.dropout.keep` of the seed: a mask that is the same bits on every backend and never stored.
Sums are fp32; s is rounded to x's dtype, the sum of base, bias and adapter once, and written once. An int8 base
multiplies x as :func:`burnish.ops.int8_linear` does. Deterministic, and independent of the number of threads.

Gradients, with s and keep computed again; weight and weight_scale are frozen:

    t = c dy B     dx = dy W + keep * (t A)     dA = t^T h     dB = dy^T s     dbias = sum_m dy

t is rounded to x's dtype as s is. Saved for backward: x, the base, A, B and the seed.

Method: LoRA, Hu et al. 2021 (arXiv 2106.09685); the cut at s, so that one pass over x and one over dy do, Zhu et al.
2025 (LoRAFusion, arXiv 2510.00206).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from burnish import dispatch, dropout
from burnish.bases import BASES, format_of
from burnish.checks import FLOATING, check_devices
from burnish.ops.int8_linear import make as make_int8
from burnish.ops.lowrank_linear import INVALID as INVALID_FACTORS
from burnish.ops.lowrank_linear import (
    NATIVE_ROWS,
    as_rows,
    case_of,
    check_bias,
    check_factors,
    check_gradient,
    new_gradients,
    supports_many_rows,
)
from burnish.ops.lowrank_linear import backward_make as make_backward_factors
from burnish.ops.lowrank_linear import make as make_factors
from burnish.ops.lowrank_linear import supports_few_rows as supports_factors
from burnish.registry import Autograd, Backend, Case, Cases, Cost, Impl, Invalid, OpSpec, dtype_name, register

OptTensor = Tensor | None

__all__ = ["lora_linear"]


def _dropped(x: Tensor, p: float, seed: OptTensor) -> Tensor:
    """keep * x; a tensor's zero, not a product, so that a NaN that is dropped is gone."""
    if p == 0.0 or seed is None:
        return x
    keep = dropout.keep(seed, x.shape[:-1].numel(), x.shape[-1], p).reshape(x.shape)
    return torch.where(keep, x, 0.0)


def reference(
    x: Tensor, weight: Tensor, weight_scale: OptTensor, bias: OptTensor, A: Tensor, B: Tensor, seed: OptTensor,
    scale: float, p: float, format: int,
) -> Tensor:  # fmt: skip
    s = scale * dropout.factor(p) * (_dropped(x, p, seed) @ A.T)
    return BASES[format].product(x, weight, weight_scale, bias) + s.to(x.dtype, copy=True) @ B.T


def surrogate(
    x: Tensor, weight: Tensor, weight_scale: OptTensor, bias: OptTensor, A: Tensor, B: Tensor, seed: OptTensor,
    scale: float, p: float, format: int,
) -> Tensor:  # fmt: skip
    s = scale * dropout.factor(p) * (_dropped(x, p, seed) @ A.T)
    return BASES[format].smooth(x, weight, weight_scale, bias) + s @ B.T


def _check(
    op: str, x: Tensor, weight: Tensor, weight_scale: OptTensor, A: Tensor, B: Tensor, seed: OptTensor, p: float,
    format: int,
) -> int:  # fmt: skip
    """What forward and backward ask alike; returns N."""
    K = x.shape[-1] if x.dim() else 0
    check_factors(op, "x", x, K, A, B)
    torch._check(0 <= format < len(BASES), lambda: f"{op}: format is {format}, expected 0 to {len(BASES) - 1}")
    N = BASES[format].check(op, x, K, weight, weight_scale)
    torch._check(
        B.shape[0] == N, lambda: f"{op}: B has shape {tuple(B.shape)}, expected [{N}, R] for the base's {N} outputs"
    )
    torch._check(0.0 <= p <= 1.0, lambda: f"{op}: p is {p}, expected 0 to 1")
    if p > 0.0:
        torch._check(seed is not None, lambda: f"{op}: seed is None, expected int64 [1] for p = {p}")
    if seed is not None:
        check_devices(op, x, seed=seed)
        torch._check(
            seed.dtype == torch.int64 and seed.dim() == 1 and seed.shape[0] == 1,
            lambda: f"{op}: seed is {dtype_name(seed.dtype)} {tuple(seed.shape)}, expected int64 [1]",
        )
    return N


def fake(
    x: Tensor, weight: Tensor, weight_scale: OptTensor, bias: OptTensor, A: Tensor, B: Tensor, seed: OptTensor,
    scale: float, p: float, format: int,
) -> Tensor:  # fmt: skip
    N = _check("lora_linear", x, weight, weight_scale, A, B, seed, p, format)
    check_bias("lora_linear", x, bias, N)
    return x.new_empty((*x.shape[:-1], N))


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, weight_scale, bias, A, B, seed, scale, p, format = inputs
    ctx.save_for_backward(x, weight, weight_scale, A, B, seed)
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.scale, ctx.p, ctx.format = scale, p, format


def backward(ctx: Any, dy: Tensor) -> tuple[OptTensor, ...]:
    if torch.is_grad_enabled():
        raise RuntimeError("lora_linear has no double backward: differentiate it without create_graph=True")
    x, weight, weight_scale, A, B, seed = ctx.saved_tensors
    needs = ctx.needs_input_grad
    bias_grad = ctx.bias_dtype is not None and needs[3]
    dx, dA, dB, dbias = lora_linear_backward(
        dy, x, weight, weight_scale, A, B, seed, ctx.scale, ctx.p, ctx.format, needs[0], needs[4] or needs[5], bias_grad
    )
    kept = [grad if needs[place] else None for grad, place in ((dx, 0), (dA, 4), (dB, 5))]
    return kept[0], None, None, dbias.to(ctx.bias_dtype) if bias_grad else None, *kept[1:], *[None] * 4


def make(case: Case, backend: Backend, seed: int) -> tuple[Any, ...]:
    x, A, B, bias = make_factors(case, backend, seed)
    if case.options.get("base") == "int8":
        _, weight, weight_scale, _, _, _ = make_int8(case, backend, seed)
        if case.values == "integers":
            x[:, :1] = 127.0  # the row's largest magnitude, so that quantising changes nothing
            A[:, :1] = 0.0
    else:
        generator = torch.Generator().manual_seed(seed + 7)
        shape = (case.dims["N"], case.dims["K"])
        if case.values == "integers":
            weight = torch.randint(-8, 9, shape, generator=generator).to(case.dtype)
        else:
            weight = (torch.randn(shape, generator=generator) / max(shape[1], 1) ** 0.5).to(case.dtype)
        weight_scale = None
    # powers of two, which keep integers exact
    scale, p = (0.5, 0.5) if case.values == "integers" else (2.0, 0.1)
    p = case.options.get("p", 0.0) and p
    key = torch.randint(-(2**63), 2**63 - 1, (1,), generator=torch.Generator().manual_seed(seed)) if p else None
    return x, weight, weight_scale, bias, A, B, key, scale, p, int(weight_scale is not None)


def _base_bytes(case: Case) -> float:
    n, k = case.dims["N"], case.dims["K"]
    return n * k + 4.0 * n if case.options.get("base") == "int8" else float(n * k) * case.dtype.itemsize


def cost(case: Case) -> Cost:
    m, n, k, r = (case.dims[name] for name in "MNKR")
    unit = "int8" if case.options.get("base") == "int8" else "bf16" if case.dtype == torch.bfloat16 else "fp32"
    moved = float(m * k + r * k + n * r + m * n) * case.dtype.itemsize + _base_bytes(case)
    return Cost(2.0 * m * (n * k + r * (n + k)), moved, unit)  # type: ignore[arg-type]


def baseline(
    x: Tensor, weight: Tensor, weight_scale: OptTensor, bias: OptTensor, A: Tensor, B: Tensor, seed: OptTensor,
    scale: float, p: float, format: int,
) -> Callable[[], Tensor]:  # fmt: skip
    """The composition that peft runs, in torch: a linear layer, dropout, two more linear layers, and a sum."""
    W = BASES[format].dense(weight, weight_scale, x)
    offset = None if bias is None else bias.to(x.dtype)
    return lambda: F.linear(x, W, offset) + F.linear(F.linear(F.dropout(x, p), A), B) * scale


_EDGES = (
    (3, 17, 33, 5), (0, 16, 32, 4), (1, 1, 1, 1), (1, 64, 64, 16), (2, 16, 0, 3), (5, 63, 100, 8), (6, 64, 128, 16),
    (7, 65, 129, 17), (13, 48, 64, 32), (17, 100, 67, 15), (33, 64, 96, 16), (65, 24, 33, 2), (4, 24, 40, 65),
)  # fmt: skip
_SOLID = tuple(edge for edge in _EDGES[1:] if edge[0] * edge[2])
_TEST_CASES = (
    *(case_of(*edge, dtype) for dtype in FLOATING for edge in _EDGES),
    *(case_of(*edge, dtype, p=True) for dtype in FLOATING for edge in _EDGES[:8:2]),
    *(case_of(*edge, dtype, "integers") for dtype in FLOATING for edge in _SOLID),
    *(case_of(*edge, dtype, "integers", p=True) for dtype in FLOATING for edge in _SOLID[::2]),
    *(case_of(*edge, dtype, base="int8") for dtype in FLOATING for edge in _EDGES[::2]),
    *(case_of(*edge, dtype, base="int8", p=True) for dtype in FLOATING for edge in _EDGES[:8:3]),
    *(case_of(*edge, dtype, "integers", base="int8") for dtype in FLOATING for edge in _SOLID[1::2]),
    # long enough to split K
    *(case_of(2, 17, 1304, 7, dtype, "integers", base=b, p=True) for dtype in FLOATING for b in (None, "int8")),
    # narrow enough to be packed a part of its depth at a time
    *(case_of(18, 40, 1500, 7, dtype, p=True) for dtype in FLOATING),
    *(case_of(9, 40, 48, 8, dtype, bias=torch.float32) for dtype in (torch.bfloat16, torch.float16)),
    *(case_of(7, 33, 64, 12, dtype, bias=False) for dtype in FLOATING),
    # a last panel that is narrower than the others, and deep
    *(case_of(9, 72, 1100, 7, dtype) for dtype in FLOATING),
    # many rows of whole lines, which warpgroups multiply
    *(case_of(70, 136, 128, 16, dtype, p=True) for dtype in FLOATING[1:]),
)
_BENCH_CASES = (
    *(case_of(m, 4096, 4096, 16, bias=False, p=p) for m in (128, 512) for p in (False, True)),
    *(case_of(m, 4096, 4096, 16, bias=False, base="int8") for m in (1, 16, 128, 512)),
    *(case_of(m, 4096, 4096, 16, bias=False) for m in (1, 16)),
)
_WIDE_CASES = (
    *(case_of(4096, 4096, 4096, 16, bias=False, p=p) for p in (False, True)),
    case_of(4096, 4096, 4096, 16, bias=False, base="int8"),
)

_INVALID = (
    *INVALID_FACTORS,
    Invalid("x inner dim", lambda x, *r: (x[:, :16], *r), r"A has shape .*, expected \[R, 16\]"),
    Invalid("A dtype", lambda *a: (*a[:4], a[4].half(), *a[5:]), "A is fp16, expected fp32 as x is"),
    Invalid("B rank", lambda *a: (*a[:5], a[5][:, :-1], *a[6:]), "B has shape .*, expected .* for A's rank 5"),
    Invalid("B outputs", lambda *a: (*a[:5], a[5][:-1], *a[6:]), r"B has shape .*, expected \[17, R\] for the base"),
    Invalid("weight dtype", lambda x, w, *r: (x, w.half(), *r), "weight is fp16, expected fp32 as x is"),
    Invalid("weight shape", lambda x, w, *r: (x, w[:, :-1], *r), r"weight has shape .*, expected \[N, 33\]"),
    Invalid("weight 1-d", lambda x, w, *r: (x, w.flatten(), *r), "weight has shape .*, expected"),
    Invalid("scale of a float", lambda x, w, _, *r: (x, w, w[:, 0], *r), "weight_scale is given, expected None"),
    Invalid("no scale", lambda x, w, _, *r: (x, w.to(torch.int8), None, *r[:-1], 1), "weight_scale is None, expected"),
    Invalid("bias length", lambda *a: (*a[:3], a[3][:-1], *a[4:]), "bias has shape .*expected"),
    Invalid("bias int", lambda *a: (*a[:3], a[3].int(), *a[4:]), "bias is int32, expected"),
    Invalid("p above 1", lambda *a: (*a[:8], 1.5, a[9]), "p is 1.5, expected 0 to 1"),
    Invalid("p below 0", lambda *a: (*a[:8], -0.5, a[9]), "p is -0.5, expected 0 to 1"),
    Invalid("no seed", lambda *a: (*a[:8], 0.5, a[9]), "seed is None, expected int64"),
    Invalid("seed int32", lambda x, *a: (x, *a[:5], x.new_zeros(1).int(), *a[6:]), "seed is int32 .*expected int64"),
    Invalid("seed shape", lambda x, *a: (x, *a[:5], x.new_zeros(2).long(), *a[6:]), "seed is int64 .*expected int64"),
    Invalid("format", lambda *a: (*a[:9], 7), "format is 7, expected 0 to 1"),
)

#: the largest rank that the kernel for more than NATIVE_ROWS rows takes; csrc/cuda/lora_wide.cuh has it too
NATIVE_WIDE_RANK = 64

_KERNELS = "burnish.kernels.lowrank.lora_linear"

SPEC = register(
    OpSpec(
        name="lora_linear",
        schema="(Tensor x, Tensor weight, Tensor? weight_scale, Tensor? bias, Tensor A, Tensor B, Tensor? seed, "
        "float scale, float p, int format) -> Tensor",
        reference=reference,
        fake=fake,
        autograd=Autograd(setup_context, backward, surrogate),
        impls=(
            Impl("native", "torch.ops:burnish.lora_linear.native", f"{__name__}:supports_native"),
            Impl("triton", f"{_KERNELS}:lora_linear", f"{_KERNELS}:supports"),
        ),
        cases=Cases(test=_TEST_CASES, bench=_BENCH_CASES, invalid=_INVALID, wide=_WIDE_CASES),
        make=make,
        cost=cost,
        baseline=baseline,
    )
)


def supports_native(
    x: Tensor, weight: Tensor, weight_scale: OptTensor, bias: OptTensor, A: Tensor, *_: Any
) -> str | None:
    """The CUDA C++ kernels stream base and factors once for a few rows, and multiply many by warpgroups on sm_90."""
    if weight.dtype == torch.uint8:
        return "the weight is in the vnni layout, the kernel takes rows"
    if x.shape[:-1].numel() <= NATIVE_ROWS:
        return supports_factors(x, A)
    sizes = (x.shape[-1], weight.shape[0], A.shape[0])
    return supports_many_rows(x, "the weight", weight.dtype, sizes, NATIVE_WIDE_RANK)


def backward_reference(
    dy: Tensor, x: Tensor, weight: Tensor, weight_scale: OptTensor, A: Tensor, B: Tensor, seed: OptTensor,
    scale: float, p: float, format: int, x_grad: bool, factor_grad: bool, bias_grad: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    K = x.shape[-1]
    c = scale * dropout.factor(p)
    rows, h = as_rows(dy), as_rows(_dropped(x, p, seed))
    t = (c * (rows @ B)).to(x.dtype, copy=True)
    dx = x.new_empty(0)
    if x_grad:
        pulled = BASES[format].pull(dy, weight, weight_scale, K)
        dx = pulled + _dropped((t @ A).reshape(x.shape), p, seed)
    if factor_grad:
        s = (c * (h @ A.T)).to(x.dtype, copy=True)
        dA, dB = t.T @ h, rows.T @ s
    else:
        dA, dB = A.new_empty(0), B.new_empty(0)
    wide = torch.promote_types(dy.dtype, torch.float32)
    dbias = rows.to(wide).sum(0) if bias_grad else dy.new_empty(0, dtype=wide)
    return dx, dA, dB, dbias


def backward_fake(
    dy: Tensor, x: Tensor, weight: Tensor, weight_scale: OptTensor, A: Tensor, B: Tensor, seed: OptTensor,
    scale: float, p: float, format: int, x_grad: bool, factor_grad: bool, bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    op = "lora_linear_backward"
    N = _check(op, x, weight, weight_scale, A, B, seed, p, format)
    check_gradient(op, dy, x, N)
    return new_gradients(x, A, B, x_grad, factor_grad, bias_grad)


def backward_make(case: Case, backend: Backend, seed: int) -> tuple[Any, ...]:
    x, weight, weight_scale, _, A, _, key, scale, p, format = make(case, backend, seed)
    dy, _, _, B, x_grad, factor_grad, bias_grad = make_backward_factors(case, backend, seed)
    return dy, x, weight, weight_scale, A, B, key, scale, p, format, x_grad, factor_grad, bias_grad


def backward_cost(case: Case) -> Cost:
    m, n, k, r = (case.dims[name] for name in "MNKR")
    unit = "bf16" if case.dtype == torch.bfloat16 and case.options.get("base") != "int8" else "fp32"
    moved = float(m * n + 2 * m * k + 2 * r * (k + n)) * case.dtype.itemsize + _base_bytes(case)
    return Cost(2.0 * m * (n * k + r * (2 * n + 3 * k)), moved, unit)  # type: ignore[arg-type]


def backward_baseline(
    dy: Tensor, x: Tensor, weight: Tensor, weight_scale: OptTensor, A: Tensor, B: Tensor, seed: OptTensor,
    scale: float, p: float, format: int, x_grad: bool, factor_grad: bool, bias_grad: bool,
) -> Callable[[], Any]:  # fmt: skip
    """What torch's autograd runs for that composition, which kept the mask, the dropped-out x and s."""
    W = BASES[format].dense(weight, weight_scale, x)
    c = scale / (1 - p)
    keep = torch.rand(x.shape, device=x.device) >= p if p else None
    h = x if keep is None else x * keep
    s = h @ A.T

    def run() -> Any:
        dz = dy * c
        t = dz @ B
        dx = None
        if x_grad:
            low = t @ A
            dx = dy @ W + (low if keep is None else low * keep)
        dA, dB = (t.T @ h, dz.T @ s) if factor_grad else (None, None)
        return dx, dA, dB, dy.sum(0) if bias_grad else None

    return run


BACKWARD = register(
    OpSpec(
        name="lora_linear_backward",
        schema="(Tensor dy, Tensor x, Tensor weight, Tensor? weight_scale, Tensor A, Tensor B, Tensor? seed, "
        "float scale, float p, int format, bool x_grad, bool factor_grad, bool bias_grad) "
        "-> (Tensor, Tensor, Tensor, Tensor)",
        reference=backward_reference,
        fake=backward_fake,
        autograd=None,
        impls=(Impl("triton", f"{_KERNELS}:lora_linear_backward", f"{_KERNELS}:supports_backward"),),
        cases=Cases(
            test=(
                *(case for case in _TEST_CASES if case.options.get("bias") in (None, False)),
                *(case_of(11, 40, 48, 8, dtype, grads=grads) for dtype in FLOATING for grads in ("x", "factors")),
            ),
            bench=tuple(case_of(m, 4096, 4096, 16, bias=False, p=p) for m in (128, 512) for p in (False, True)),
            invalid=(
                Invalid("dy shape", lambda dy, *r: (dy[..., :-1], *r), "dy has shape .*, expected"),
                Invalid("dy dtype", lambda dy, *r: (dy.half(), *r), "dy is fp16, expected fp32 as x is"),
                Invalid("weight shape", lambda dy, x, w, *r: (dy, x, w[:-1], *r), "B has shape .*, expected"),
                Invalid("p above 1", lambda *a: (*a[:8], 1.5, *a[9:]), "p is 1.5, expected 0 to 1"),
                Invalid("no seed", lambda *a: (*a[:8], 0.5, *a[9:]), "seed is None, expected int64"),
            ),
            wide=tuple(case_of(4096, 4096, 4096, 16, bias=False, p=p) for p in (False, True)),
        ),
        make=backward_make,
        cost=backward_cost,
        baseline=backward_baseline,
    )
)

_linear, _inference, _backward = SPEC.overload(), SPEC.entry, BACKWARD.entry


def lora_linear_backward(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients, as :func:`backward_reference` defines them; positional arguments as in the op's schema."""
    if dispatch.overrides:
        return dispatch.call(BACKWARD, args, needs_grad=False)
    return _backward(*args)


def lora_linear(
    x: Tensor,
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    bias: Tensor | None = None,
    weight_scale: Tensor | None = None,
    scale: float = 1.0,
    p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """``x W^T + bias + scale (dropout(x) A^T) B^T``; see the module for the exact formula.

    Args:
        x: ``[..., K]``, fp32, bf16 or fp16.
        weight: the frozen base: ``[N, K]`` in x's dtype, or :func:`burnish.ops.int8_linear_pack` of an int8 weight.
        A: ``[R, K]`` in x's dtype.
        B: ``[N, R]`` in x's dtype.
        bias: ``[N]`` fp32, bf16 or fp16, or None.
        weight_scale: fp32 ``[N]`` for an int8 weight, else None.
        scale: of the adapter, ``alpha / r`` in LoRA.
        p: the probability of dropping an element of the adapter's input, 0 to 1.
        seed: int64 ``[1]`` that the mask is drawn from; one may be None only where p is 0.

    Returns:
        ``[..., N]`` in x's dtype. Differentiable in x, A, B and bias.

    Raises:
        RuntimeError: a shape, dtype or device that does not fit, or a weight that asks for a gradient; the message
            names the argument.
    """
    if weight.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(
            "lora_linear: weight requires a gradient, expected a frozen base: weight.requires_grad_(False)"
        )
    args = (x, weight, weight_scale, bias, A, B, seed, scale, p, format_of(weight).code)
    needs_grad = dispatch.differentiates("lora_linear", x, weight, bias, A, B)
    if dispatch.overrides:
        return dispatch.call(SPEC, args, needs_grad)
    return (_linear if needs_grad else _inference)(*args)
