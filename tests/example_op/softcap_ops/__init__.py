"""softcap: y = cap * tanh(x / cap), element by element; logits that large language models keep within a cap.

=======  =====  ==============================
x        [...]  fp32, bf16, fp16; any strides
cap      > 0    a number
y        [...]  x's dtype
=======  =====  ==============================

fp32 arithmetic with one rounding at the end; deterministic. dx = dy * (1 - tanh(x / cap)**2), with x saved for it.
Source: Gemma Team 2024 (arXiv 2408.00118).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from burnish import dispatch, native
from burnish.checks import FLOATING, check_floating
from burnish.registry import Autograd, Case, Cases, Cost, Impl, Invalid, OpSpec, register

__all__ = ["softcap"]

_HERE = Path(__file__).parent
torch.ops.load_library(_HERE / "_kernels.so")
if native.CUDA_LIBRARY not in native.missing and (_HERE / native.CUDA_LIBRARY).is_file():
    torch.ops.load_library(_HERE / native.CUDA_LIBRARY)  # _cuda.so, or _emulated.so where CUDA runs on the CPU


def reference(x: torch.Tensor, cap: float) -> torch.Tensor:
    wide = x if x.dtype == torch.float64 else x.float()
    return (cap * torch.tanh(wide / cap)).to(x.dtype)


def _check_cap(op: str, cap: float) -> None:
    torch._check(cap > 0, lambda: f"{op}: cap is {cap}, expected more than 0")


def fake(x: torch.Tensor, cap: float) -> torch.Tensor:
    check_floating("softcap", x=x)
    _check_cap("softcap", cap)
    return x.new_empty(x.shape)


def supports_native(x: torch.Tensor, cap: float) -> str | None:
    if not (_HERE / native.CUDA_LIBRARY).is_file():
        return "the CUDA kernel was not built"
    return None if x.is_cuda or native.emulating() else f"x is on {x.device}, expected cuda"


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, ctx.cap = inputs
    ctx.save_for_backward(x)


def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, None]:
    if torch.is_grad_enabled():
        raise RuntimeError("softcap has no double backward: differentiate it without create_graph=True")
    (x,) = ctx.saved_tensors
    return softcap_backward(dy, x, ctx.cap), None


def make(case: Case, backend: str, seed: int) -> tuple[torch.Tensor, float]:
    generator = torch.Generator().manual_seed(seed)
    x = 20 * torch.randn((case.dims["M"], case.dims["N"]), generator=generator)
    return x.to(case.dtype), 30.0


def cost(case: Case) -> Cost:
    size = case.dims["M"] * case.dims["N"]
    return Cost(ops=4.0 * size, bytes=2.0 * size * case.dtype.itemsize, unit="fp32")


_EDGES = ((3, 17), (0, 16), (1, 1), (1, 64), (33, 129), (65, 70))
_TEST_CASES = tuple(Case({"M": m, "N": n}, dtype) for dtype in FLOATING for m, n in _EDGES)
_BENCH_CASES = (Case({"M": 64, "N": 4096}, torch.bfloat16),)

SPEC = register(
    OpSpec(
        name="softcap_ops::softcap",
        schema="(Tensor x, float cap) -> Tensor",
        reference=reference,
        fake=fake,
        autograd=Autograd(setup_context, backward, reference),
        impls=(Impl("native", "torch.ops:softcap_ops.softcap.native", "softcap_ops:supports_native"),),
        cases=Cases(
            test=_TEST_CASES,
            bench=_BENCH_CASES,
            invalid=(
                Invalid("int x", lambda x, cap: (x.int(), cap), "x .*expected fp32, bf16 or fp16"),
                Invalid("no cap", lambda x, cap: (x, 0.0), "cap is 0.0.*, expected more than 0"),
            ),
        ),
        make=make,
        cost=cost,
        baseline=lambda x, cap: lambda: cap * torch.tanh(x / cap),
    )
)


def backward_reference(dy: torch.Tensor, x: torch.Tensor, cap: float) -> torch.Tensor:
    wide_dy, wide = (dy, x) if x.dtype == torch.float64 else (dy.float(), x.float())
    return (wide_dy * (1 - torch.tanh(wide / cap) ** 2)).to(x.dtype)


def backward_fake(dy: torch.Tensor, x: torch.Tensor, cap: float) -> torch.Tensor:
    check_floating("softcap_backward", dy=dy, x=x)
    _check_cap("softcap_backward", cap)
    torch._check(dy.shape == x.shape, lambda: "softcap_backward: dy has another shape than x")
    torch._check(dy.dtype == x.dtype, lambda: "softcap_backward: dy has another dtype than x")
    return x.new_empty(x.shape)


BACKWARD = register(
    OpSpec(
        name="softcap_ops::softcap_backward",
        schema="(Tensor dy, Tensor x, float cap) -> Tensor",
        reference=backward_reference,
        fake=backward_fake,
        autograd=None,
        impls=(),
        cases=Cases(
            test=_TEST_CASES,
            bench=_BENCH_CASES,
            invalid=(
                Invalid("shape", lambda dy, x, cap: (dy[1:], x, cap), "dy has another shape"),
                Invalid("dtype", lambda dy, x, cap: (dy.half(), x, cap), "dy has another dtype"),
            ),
        ),
        make=lambda case, backend, seed: (make(case, backend, seed + 1)[0], *make(case, backend, seed)),
        cost=cost,
        baseline=lambda dy, x, cap: lambda: dy * (1 - torch.tanh(x / cap) ** 2),
    )
)

_softcap, _inference, _backward = SPEC.overload(), SPEC.entry, BACKWARD.entry


def softcap_backward(dy: torch.Tensor, x: torch.Tensor, cap: float) -> torch.Tensor:
    """``dy`` times the slope of :func:`softcap` at x."""
    if dispatch.overrides:
        return dispatch.call(BACKWARD, (dy, x, cap), needs_grad=False)
    return _backward(dy, x, cap)


def softcap(x: torch.Tensor, cap: float) -> torch.Tensor:
    """``cap * tanh(x / cap)``; differentiable in x."""
    needs_grad = torch.is_grad_enabled() and x.requires_grad
    if dispatch.overrides:
        return dispatch.call(SPEC, (x, cap), needs_grad)
    return (_softcap if needs_grad else _inference)(x, cap)
