"""int8_linear: W8A8 linear with dynamic per-row activation scales and a fused epilogue.

    q, sx = int8_quantize_rows(x)
    y = act(float(q @ w^T) * (sx * scale) + bias)

==========  =======================  =====================================================================
x           [..., K]                 fp32, bf16, fp16; any strides
weight      packed [N, K]            int8_linear_pack's result for the device (w in int8)
scale       [N]                      fp32, one a output channel: w * scale is the weight
bias        [N] or None              fp32, bf16, fp16
y           [..., N]                 out_dtype, or x's dtype
==========  =======================  =====================================================================

Products are summed in int32, which is exact for K <= 131072; the epilogue is fp32 and rounds once, to nearest even.
Deterministic, independent of the number of threads, and bit-equal over the CPU's instruction sets. A row of x with a
NaN gives a row of NaN, an infinity gives what a float layer gives.

Gradients pass straight through the quantisation of x (Bengio et al. 2013, arXiv 1308.3432); weight and scale are
frozen:

    dz = dy * act'(z)        dx = (dz * scale) @ w        dbias = sum_m dz

dz is fp32; a bf16 dy has dz * scale rounded to bf16 for the product, as a layer in bf16 rounds its weight. The bits of
dx depend on the CPU's instruction set.

Saved for backward: weight, scale and, only where there is an activation, x and bias, from which z is recomputed.

Method: symmetric W8A8 with per-token and per-channel scales, Yao et al. 2022 (arXiv 2206.01861), Xiao et al. 2023
(arXiv 2211.10438, the "O1" setting).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from burnish import dispatch
from burnish.checks import FLOATING, check_devices, check_floating
from burnish.ops import int8_linear_pack as packing
from burnish.ops import int8_quantize_rows as rows
from burnish.registry import Autograd, Backend, Case, Cases, Cost, Impl, Invalid, OpSpec, dtype_name, register

OptTensor = Tensor | None

__all__ = ["ACTIVATIONS", "int8_linear"]

#: epilogue activations and their codes in the op's schema; gelu is the erf form, gelu_tanh its tanh approximation
ACTIVATIONS = {"none": 0, "relu": 1, "gelu": 2, "gelu_tanh": 3, "silu": 4}
MAX_K = 131072

_CURVES: tuple[Callable[[Tensor], Tensor], ...] = (
    lambda z: z,
    torch.relu,
    F.gelu,
    lambda z: F.gelu(z, approximate="tanh"),
    F.silu,
)


def _canonical(weight: Tensor, scale: Tensor, width: int) -> Tensor:
    return packing.unpack_reference(weight, scale.shape[0], width)


def reference(
    x: Tensor, weight: Tensor, scale: Tensor, bias: OptTensor, activation: int, out_dtype: torch.dtype | None
) -> Tensor:
    z = _preactivation(x, weight, scale, bias)
    return _CURVES[activation](z).to(out_dtype or x.dtype)


def _preactivation(x: Tensor, weight: Tensor, scale: Tensor, bias: OptTensor) -> Tensor:
    """z in float64 for a float64 x, else in fp32; the integer product is exact either way."""
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    q, row_scale = rows.reference(x)
    product = q.double() @ _canonical(weight, scale, x.shape[-1]).double().T  # [..., N]
    z = product.to(compute) * (row_scale.to(compute).unsqueeze(-1) * scale.to(compute))
    return z if bias is None else z + bias.to(compute)


def surrogate(
    x: Tensor, weight: Tensor, scale: Tensor, bias: OptTensor, activation: int, out_dtype: torch.dtype | None
) -> Tensor:
    """Same values as :func:`reference`, with the gradient that the op promises."""
    q, row_scale = rows.reference(x.detach())
    quantised = (q.to(x.dtype) * row_scale.to(x.dtype).unsqueeze(-1) - x).detach() + x
    dense = _canonical(weight, scale, x.shape[-1]).to(x.dtype) * scale.detach().to(x.dtype).unsqueeze(-1)
    z = F.linear(quantised, dense, None if bias is None else bias.to(x.dtype))
    return _CURVES[activation](z).to(out_dtype or x.dtype)


def check_operands(op: str, first: str, x: Tensor, K: int, *, weight: Tensor, scale: Tensor, bias: OptTensor) -> None:
    """What forward and backward ask alike; ``first`` names the float operand ``x``."""
    check_floating(op, **{first: x})
    torch._check(x.dim() >= 1, lambda: f"{op}: {first} is a scalar, expected at least one dimension")
    check_devices(op, x, weight=weight, scale=scale, bias=bias)
    torch._check(scale.dtype == torch.float32, lambda: f"{op}: scale is {dtype_name(scale.dtype)}, expected fp32")
    torch._check(
        scale.dim() == 1 and scale.shape[0] >= 1,
        lambda: f"{op}: scale has shape {tuple(scale.shape)}, expected [N] with N >= 1",
    )
    torch._check(K <= MAX_K, lambda: f"{op}: K is {K}, expected at most {MAX_K}: int32 sums could overflow")
    packing.check_packed(f"{op}: weight", weight, scale.shape[0], K)
    check_floating(op, bias=bias)
    torch._check(
        bias is None or (bias.dim() == 1 and bias.shape[0] == scale.shape[0]),
        lambda: f"{op}: bias has shape {tuple(bias.shape)}, expected [{scale.shape[0]}] as scale has",  # type: ignore[union-attr]
    )


def _check_activation(op: str, activation: int) -> None:
    torch._check(
        0 <= activation < len(_CURVES), lambda: f"{op}: activation is {activation}, expected 0 to {len(_CURVES) - 1}"
    )


def fake(
    x: Tensor, weight: Tensor, scale: Tensor, bias: OptTensor, activation: int, out_dtype: torch.dtype | None
) -> Tensor:
    width = x.shape[-1] if x.dim() else 0
    check_operands("int8_linear", "x", x, width, weight=weight, scale=scale, bias=bias)
    _check_activation("int8_linear", activation)
    torch._check(
        out_dtype is None or out_dtype in FLOATING,
        lambda: f"int8_linear: out_dtype is {out_dtype}, expected fp32, bf16, fp16 or None",
    )
    return x.new_empty((*x.shape[:-1], scale.shape[0]), dtype=out_dtype or x.dtype)


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, scale, bias, activation, _ = inputs
    smooth = activation != 0
    ctx.save_for_backward(x if smooth else None, weight, scale, bias if smooth else None)
    ctx.activation, ctx.width, ctx.x_dtype = activation, x.shape[-1], x.dtype
    ctx.bias_dtype = None if bias is None else bias.dtype


def backward(ctx: Any, dy: Tensor) -> tuple[OptTensor, ...]:
    if torch.is_grad_enabled():
        raise RuntimeError("int8_linear has no double backward: differentiate it without create_graph=True")
    x, weight, scale, bias = ctx.saved_tensors
    bias_grad = ctx.bias_dtype is not None and ctx.needs_input_grad[3]
    dy = dy.to(torch.promote_types(dy.dtype, ctx.x_dtype))  # dx comes in dy's dtype: never narrower than x
    dx, dbias = int8_linear_backward(dy, x, weight, scale, bias, ctx.width, ctx.activation, bias_grad)
    return dx.to(ctx.x_dtype), None, None, dbias.to(ctx.bias_dtype) if bias_grad else None, None, None


def make(case: Case, backend: Backend, seed: int) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(seed + 2)
    channels = case.dims["N"]
    if case.values == "integers":
        scale = torch.ones(channels)
        bias = torch.randint(-8, 9, (channels,), generator=generator).float()
    else:
        scale = (torch.rand(channels, generator=generator) + 0.5) / 127 / max(case.dims["K"], 1) ** 0.5
        bias = torch.randn(channels, generator=generator)
    kept = case.options.get("bias", case.dtype)  # a dtype, or False
    # by the op, as a layer does it: where the weight lies in memory is part of what a benchmark times
    weight = packing.SPEC.entry(packing.make_weight(case, seed), packing.runtime_layout(backend))
    code = ACTIVATIONS[case.options.get("activation", "none")]
    offset = bias.to(kept) if kept else None
    return rows.make_rows(case, seed), weight, scale, offset, code, case.options.get("out_dtype")


def cost(case: Case) -> Cost:
    m, n, k = case.dims["M"], case.dims["N"], case.dims["K"]
    out = case.options.get("out_dtype") or case.dtype
    moved = m * k * case.dtype.itemsize + n * k + 4.0 * n + m * n * out.itemsize
    return Cost(ops=2.0 * m * n * k, bytes=moved, unit="int8")


def _dense(weight: Tensor, scale: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    return (_canonical(weight, scale, width) * scale.unsqueeze(-1)).to(dtype)


def baseline(
    x: Tensor, weight: Tensor, scale: Tensor, bias: OptTensor, activation: int, out_dtype: torch.dtype | None
) -> Callable[[], Tensor]:
    """torch's own linear in x's dtype, then the activation."""
    dense = _dense(weight, scale, x.shape[-1], x.dtype)
    offset = None if bias is None else bias.to(x.dtype)
    curve = _CURVES[activation]
    return lambda: curve(F.linear(x, dense, offset))


def _case(m: int, n: int, k: int, dtype: torch.dtype = torch.bfloat16, values: str = "normal", **options: Any) -> Case:
    return Case({"M": m, "N": n, "K": k}, dtype, values, options)


_EDGES = (
    (3, 17, 33), (0, 16, 32), (1, 1, 1), (1, 64, 64), (2, 16, 0), (5, 63, 100), (6, 64, 128), (7, 65, 129),
    (13, 48, 64), (16, 130, 67), (17, 200, 256), (33, 64, 96), (65, 129, 70),
)  # fmt: skip
_TEST_CASES = (
    *(_case(*edge, dtype) for dtype in FLOATING for edge in _EDGES),
    *(_case(*edge, dtype, "integers") for dtype in FLOATING for edge in _EDGES[1:] if edge[0] * edge[2]),
    *(_case(m, 70, 260, dtype, "extreme", bias=False) for dtype in FLOATING for m in (1, 4, 16, 33)),
    *(
        _case(m, 72, 96, dtype, activation=activation)
        for dtype in FLOATING
        for activation in ("relu", "gelu", "gelu_tanh", "silu")
        for m in (1, 19)
    ),
    *(_case(9, 40, 48, dtype, out_dtype=out) for dtype in FLOATING for out in FLOATING if dtype != out),
    *(_case(9, 40, 48, dtype, bias=torch.float32) for dtype in (torch.bfloat16, torch.float16)),
    _case(4, 33, 64, bias=False),
)
_BENCH_CASES = (
    *(_case(m, 4096, 4096) for m in (1, 4, 16, 64, 128, 512)),
    *(_case(128, n, k) for n, k in ((384, 384), (1536, 384), (384, 1536))),
)

_INVALID = (
    Invalid("x int32", lambda x, *r: (x.to(torch.int32), *r), "x is int32, expected fp32, bf16 or fp16"),
    Invalid("x fp64", lambda x, *r: (x.double(), *r), "x is fp64, expected fp32, bf16 or fp16"),
    Invalid("x complex", lambda x, *r: (x.to(torch.complex64), *r), "x is complex64, expected"),
    Invalid("x scalar", lambda x, *r: (x.new_zeros(()), *r), "x is a scalar, expected"),
    Invalid("x inner dim", lambda x, *r: (x[:, :16], *r), "weight has shape .*, expected .* K=16"),
    Invalid("weight fp32", lambda x, w, *r: (x, w.float(), *r), "weight is fp32, expected"),
    Invalid("weight rows", lambda x, w, *r: (x, w[:-1], *r), "weight has shape .*, expected"),
    Invalid("weight 1-d", lambda x, w, *r: (x, w.flatten(), *r), "weight has shape .*, expected"),
    Invalid("weight strided", lambda x, w, *r: (x, w.T.contiguous().T, *r), "weight is not contiguous, expected"),
    Invalid("scale fp64", lambda x, w, s, *r: (x, w, s.double(), *r), "scale is fp64, expected fp32"),
    Invalid("scale length", lambda x, w, s, *r: (x, w, s.repeat(9), *r), "weight has shape .*, expected"),
    Invalid("scale 2-d", lambda x, w, s, *r: (x, w, s[None], *r), r"scale has shape .*expected \[N\]"),
    Invalid("scale empty", lambda x, w, s, *r: (x, w, s[:0], *r), "scale has shape .*N >= 1"),
    Invalid("bias int", lambda x, w, s, b, *r: (x, w, s, b.int(), *r), "bias is int32, expected"),
    Invalid("bias length", lambda x, w, s, b, *r: (x, w, s, b[:-1], *r), "bias has shape .*expected"),
    Invalid("bias 2-d", lambda x, w, s, b, *r: (x, w, s, b[None], *r), "bias has shape .*expected"),
    Invalid("activation", lambda *a: (*a[:4], 9, a[5]), "activation is 9, expected 0 to 4"),
    Invalid("activation < 0", lambda *a: (*a[:4], -1, a[5]), "activation is -1, expected 0 to 4"),
    Invalid("out_dtype", lambda *a: (*a[:5], torch.int32), "out_dtype is .*expected"),
)

_KERNELS = "burnish.kernels.quant.int8_linear"

SPEC = register(
    OpSpec(
        name="int8_linear",
        schema="(Tensor x, Tensor weight, Tensor scale, Tensor? bias, int activation, ScalarType? out_dtype) -> Tensor",
        reference=reference,
        fake=fake,
        autograd=Autograd(setup_context, backward, surrogate),
        impls=(
            Impl("native", "torch.ops:burnish.int8_linear.native", f"{__name__}:supports_native"),
            Impl("triton", f"{_KERNELS}:int8_linear", f"{_KERNELS}:supports"),
        ),
        cases=Cases(test=_TEST_CASES, bench=_BENCH_CASES, invalid=_INVALID, wide=(_case(4096, 4096, 4096),)),
        make=make,
        cost=cost,
        baseline=baseline,
    )
)


def supports_native(x: Tensor, weight: Tensor, *_: Any) -> str | None:
    """The CUDA C++ kernel streams the weight once for a few rows."""
    m = x.shape[:-1].numel()
    if m > 16:
        return f"M is {m}, the small-M kernel takes at most 16"
    if weight.dtype != torch.int8:
        return "the weight is in the vnni layout, the kernel takes rows"
    return rows.supports_native(x)


def backward_reference(
    dy: Tensor, x: OptTensor, weight: Tensor, scale: Tensor, bias: OptTensor, K: int, activation: int, bias_grad: bool
) -> tuple[Tensor, Tensor]:
    compute = torch.float64 if dy.dtype == torch.float64 else torch.float32
    dz = dy.to(compute)
    if activation != 0:
        assert x is not None
        z = _preactivation(x.to(compute), weight, scale, bias).detach().requires_grad_()
        with torch.enable_grad():
            (slope,) = torch.autograd.grad(_CURVES[activation](z).sum(), z)
        dz = dz * slope
    scaled = (dz * scale.to(compute)).to(dy.dtype, copy=True)  # a copy: stored in dy's dtype, in the kit's eyes
    dx = scaled.to(compute) @ _canonical(weight, scale, K).to(compute)
    dbias = dz.reshape(-1, scale.shape[0]).sum(0) if bias_grad else dz.new_empty(0)
    return dx.to(dy.dtype), dbias if compute == torch.float64 else dbias.float()


def backward_fake(
    dy: Tensor, x: OptTensor, weight: Tensor, scale: Tensor, bias: OptTensor, K: int, activation: int, bias_grad: bool
) -> tuple[Tensor, Tensor]:
    op = "int8_linear_backward"
    check_operands(op, "dy", dy, K, weight=weight, scale=scale, bias=bias)
    _check_activation(op, activation)
    torch._check(
        dy.shape[-1] == scale.shape[0],
        lambda: f"{op}: dy has shape {tuple(dy.shape)}, expected [..., {scale.shape[0]}] as scale has",
    )
    if activation != 0:
        torch._check(x is not None, lambda: f"{op}: x is None, expected the input that the activation's slope needs")
        assert x is not None
        check_floating(op, x=x)
        check_devices(op, dy, x=x)
        torch._check(
            x.shape[:-1] == dy.shape[:-1] and x.shape[-1] == K,
            lambda: f"{op}: x has shape {tuple(x.shape)}, expected {(*dy.shape[:-1], K)}",
        )
    dbias = dy.new_empty(scale.shape[0] if bias_grad else 0, dtype=torch.float32)
    return dy.new_empty((*dy.shape[:-1], K)), dbias


def backward_make(case: Case, backend: Backend, seed: int) -> tuple[Any, ...]:
    x, weight, scale, bias, activation, _ = make(case, backend, seed)
    generator = torch.Generator().manual_seed(seed + 3)
    shape = (case.dims["M"], case.dims["N"])
    integers = case.values == "integers"
    dy = torch.randint(-8, 9, shape, generator=generator) if integers else torch.randn(shape, generator=generator)
    saved_x, saved_bias = (x, bias) if activation else (None, None)
    return dy.to(case.dtype), saved_x, weight, scale, saved_bias, case.dims["K"], activation, bias is not None


def backward_cost(case: Case) -> Cost:
    m, n, k = case.dims["M"], case.dims["N"], case.dims["K"]
    moved = (m * n + m * k) * case.dtype.itemsize + n * k + 4.0 * n
    return Cost(ops=2.0 * m * n * k, bytes=moved, unit="bf16" if case.dtype == torch.bfloat16 else "fp32")


def backward_baseline(dy: Tensor, *args: Any) -> Callable[[], Any]:
    """torch's own two products in dy's dtype; for a row without an activation, as the bench cases are."""
    _, weight, scale, _, K, _, bias_grad = args
    dense = _dense(weight, scale, K, dy.dtype)
    return lambda: (dy @ dense, dy.sum(0) if bias_grad else None)


BACKWARD = register(
    OpSpec(
        name="int8_linear_backward",
        schema="(Tensor dy, Tensor? x, Tensor weight, Tensor scale, Tensor? bias, int K, int activation, "
        "bool bias_grad) -> (Tensor, Tensor)",
        reference=backward_reference,
        fake=backward_fake,
        autograd=None,
        impls=(Impl("triton", f"{_KERNELS}:int8_linear_backward", f"{_KERNELS}:supports_backward"),),
        cases=Cases(
            test=tuple(case for case in _TEST_CASES if "out_dtype" not in case.options and case.values != "extreme"),
            bench=tuple(_case(m, 4096, 4096) for m in (1, 16, 128, 512)),
            invalid=(
                Invalid("dy shape", lambda dy, *r: (dy[..., :-1], *r), "dy has shape .*, expected"),
                Invalid("dy int", lambda dy, *r: (dy.int(), *r), "dy is int32, expected"),
                Invalid("K", lambda *a: (*a[:5], a[5] + 64, *a[6:]), "weight has shape"),
                Invalid("no x", lambda *a: (a[0], None, *a[2:6], 2, a[7]), "x is None, expected"),
                Invalid("activation", lambda *a: (*a[:6], 7, a[7]), "activation is 7, expected"),
            ),
        ),
        make=backward_make,
        cost=backward_cost,
        baseline=backward_baseline,
    )
)

_linear, _inference, _backward = SPEC.overload(), SPEC.entry, BACKWARD.entry


def int8_linear_backward(*args: Any) -> tuple[Tensor, Tensor]:
    """The gradients, as :func:`backward_reference` defines them; positional arguments as in the op's schema."""
    if dispatch.overrides:
        return dispatch.call(BACKWARD, args, needs_grad=False)
    return _backward(*args)


def int8_linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    activation: str = "none",
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """``act(x @ (w * scale)^T + bias)`` with x quantised to int8 row by row; see the module for the exact formula.

    Args:
        x: ``[..., K]``, fp32, bf16 or fp16.
        weight: :func:`burnish.ops.int8_linear_pack` of an int8 ``[N, K]``, on x's device.
        scale: fp32 ``[N]``.
        bias: ``[N]`` fp32, bf16 or fp16, or None.
        activation: ``none``, ``relu``, ``gelu``, ``gelu_tanh`` or ``silu``.
        out_dtype: fp32, bf16, fp16, or None for x's dtype.

    Returns:
        ``[..., N]``. Differentiable in x and bias.

    Raises:
        ValueError: unknown activation.
        RuntimeError: a shape, dtype or device that does not fit; the message names the argument.
    """
    try:
        code = ACTIVATIONS[activation]
    except (KeyError, TypeError):
        raise ValueError(
            f"int8_linear: activation is {activation!r}, expected one of: {', '.join(ACTIVATIONS)}"
        ) from None
    if forward_ad._current_level >= 0:  # what dispatch.differentiates does, a tenth of a small call's time faster
        dispatch.refuse_tangents("int8_linear", x, bias)
    needs_grad = torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))
    if dispatch.overrides:
        return dispatch.call(SPEC, (x, weight, scale, bias, code, out_dtype), needs_grad)
    return (_linear if needs_grad else _inference)(x, weight, scale, bias, code, out_dtype)
