"""lowrank_linear: a linear layer whose weight is a product of two thin matrices, W = B A, in one call.

    s = x A^T          y = s B^T + bias

==========  ==========  ==============================================
x           [..., K]    fp32, bf16, fp16; any strides
A           [R, K]      x's dtype: the down-projection
B           [N, R]      x's dtype: the up-projection
bias        [N] or None fp32, bf16, fp16
y           [..., N]    x's dtype
==========  ==========  ==============================================

Sums are fp32. s stays on the chip and is rounded to x's dtype between the two products, as two linear layers would
round it; y is rounded once and written once. Deterministic, and independent of the number of threads.

Gradients, with s computed again from x:

    t = dy B          dx = t A          dA = t^T x          dB = dy^T s          dbias = sum_m dy

t is rounded to x's dtype as s is; dy is read once for t, dB and dbias. Saved for backward: x, A and B.

Method: low-rank factorisation of a layer, Denil et al. 2013 (arXiv 1306.0543), Denton et al. 2014 (arXiv 1404.0736).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from burnish import dispatch
from burnish.checks import FLOATING, check_devices, check_floating
from burnish.native import warpgroups
from burnish.ops.int8_quantize_rows import supports_native as on_device
from burnish.registry import Autograd, Backend, Case, Cases, Cost, Impl, Invalid, OpSpec, dtype_name, register

OptTensor = Tensor | None

__all__ = ["lowrank_linear"]


def reference(x: Tensor, A: Tensor, B: Tensor, bias: OptTensor) -> Tensor:
    s = (x @ A.T).to(x.dtype, copy=True)  # a copy: stored in x's dtype, in the kit's eyes
    return F.linear(s, B, None if bias is None else bias.to(x.dtype))


def surrogate(x: Tensor, A: Tensor, B: Tensor, bias: OptTensor) -> Tensor:
    return F.linear(x @ A.T, B, None if bias is None else bias.to(x.dtype))


def check_factors(op: str, first: str, x: Tensor, K: int, A: Tensor, B: Tensor) -> None:
    """What every op on a pair of factors asks of them; ``first`` names the float operand ``x``."""
    check_floating(op, **{first: x})
    torch._check(x.dim() >= 1, lambda: f"{op}: {first} is a scalar, expected at least one dimension")
    check_devices(op, x, A=A, B=B)
    for name, factor in (("A", A), ("B", B)):
        torch._check(
            factor.dtype == x.dtype,
            lambda name=name, factor=factor: (
                f"{op}: {name} is {dtype_name(factor.dtype)}, expected {dtype_name(x.dtype)} as {first} is"
            ),
        )
    torch._check(
        A.dim() == 2 and A.shape[0] >= 1, lambda: f"{op}: A has shape {tuple(A.shape)}, expected [R, K] with R >= 1"
    )
    torch._check(A.shape[1] == K, lambda: f"{op}: A has shape {tuple(A.shape)}, expected [R, {K}]")
    torch._check(
        B.dim() == 2 and B.shape[0] >= 1, lambda: f"{op}: B has shape {tuple(B.shape)}, expected [N, R] with N >= 1"
    )
    torch._check(
        B.shape[1] == A.shape[0],
        lambda: f"{op}: B has shape {tuple(B.shape)}, expected [N, {A.shape[0]}] for A's rank {A.shape[0]}",
    )


def check_bias(op: str, x: Tensor, bias: OptTensor, N: int) -> None:
    """A bias of N elements in any floating dtype, or None."""
    check_floating(op, bias=bias)
    check_devices(op, x, bias=bias)
    torch._check(
        bias is None or (bias.dim() == 1 and bias.shape[0] == N),
        lambda: f"{op}: bias has shape {tuple(bias.shape)}, expected [{N}]",  # type: ignore[union-attr]
    )


def fake(x: Tensor, A: Tensor, B: Tensor, bias: OptTensor) -> Tensor:
    op = "lowrank_linear"
    check_factors(op, "x", x, x.shape[-1] if x.dim() else 0, A, B)
    check_bias(op, x, bias, B.shape[0])
    return x.new_empty((*x.shape[:-1], B.shape[0]))


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, A, B, bias = inputs
    ctx.save_for_backward(x, A, B)
    ctx.bias_dtype = None if bias is None else bias.dtype


def backward(ctx: Any, dy: Tensor) -> tuple[OptTensor, ...]:
    if torch.is_grad_enabled():
        raise RuntimeError("lowrank_linear has no double backward: differentiate it without create_graph=True")
    x, A, B = ctx.saved_tensors
    x_grad, *factors = ctx.needs_input_grad[:3]
    bias_grad = ctx.bias_dtype is not None and ctx.needs_input_grad[3]
    dx, dA, dB, dbias = lowrank_linear_backward(dy, x, A, B, x_grad, any(factors), bias_grad)
    return (
        dx if x_grad else None,
        dA if factors[0] else None,
        dB if factors[1] else None,
        dbias.to(ctx.bias_dtype) if bias_grad else None,
    )


def make(case: Case, backend: Backend, seed: int) -> tuple[Any, ...]:
    m, n, k, r = (case.dims[name] for name in "MNKR")
    generator = torch.Generator().manual_seed(seed)
    kept = case.options.get("bias", case.dtype)  # a dtype, or False
    if case.values == "integers":
        x = torch.randint(-8, 9, (m, k), generator=generator).float()
        A, B = few_integers(r, k, generator), torch.randint(-8, 9, (n, r), generator=generator).float()
        bias = torch.randint(-8, 9, (n,), generator=generator).float()
    else:
        x = torch.randn(m, k, generator=generator)
        A = torch.randn(r, k, generator=generator) / max(k, 1) ** 0.5
        B = torch.randn(n, r, generator=generator) / r**0.5
        bias = torch.randn(n, generator=generator)
    return x.to(case.dtype), A.to(case.dtype), B.to(case.dtype), bias.to(kept) if kept else None


def few_integers(rows: int, width: int, generator: torch.Generator) -> Tensor:
    """Integers in [-8, 8] with at most four a row, so that a sum of products with others is at most 256: bf16 holds it
    exactly, as rule C4 needs of what is rounded between two products."""
    values = torch.randint(-8, 9, (rows, width), generator=generator).float()
    places = torch.rand(rows, width, generator=generator).argsort(-1)[:, :4]
    return values * torch.zeros(rows, width).scatter_(1, places, 1.0)


def cost(case: Case) -> Cost:
    m, n, k, r = (case.dims[name] for name in "MNKR")
    unit = "bf16" if case.dtype == torch.bfloat16 else "fp32"
    return Cost(2.0 * m * r * (n + k), float(m * k + r * k + n * r + m * n) * case.dtype.itemsize, unit)  # type: ignore[arg-type]


def baseline(x: Tensor, A: Tensor, B: Tensor, bias: OptTensor) -> Callable[[], Tensor]:
    """torch's own two linear layers, one after the other."""
    offset = None if bias is None else bias.to(x.dtype)
    return lambda: F.linear(F.linear(x, A), B, offset)


def case_of(
    m: int, n: int, k: int, r: int, dtype: torch.dtype = torch.bfloat16, values: str = "normal", **options: Any
) -> Case:
    return Case({"M": m, "N": n, "K": k, "R": r}, dtype, values, options)


_EDGES = (
    (3, 17, 33, 5), (0, 16, 32, 4), (1, 1, 1, 1), (1, 64, 64, 16), (2, 16, 0, 3), (5, 63, 100, 8), (6, 64, 128, 16),
    (7, 65, 129, 17), (13, 48, 64, 32), (16, 130, 67, 15), (17, 100, 96, 33), (33, 64, 96, 16), (65, 49, 70, 2),
    (4, 24, 40, 65),
)  # fmt: skip
_TEST_CASES = (
    *(case_of(*edge, dtype) for dtype in FLOATING for edge in _EDGES),
    *(case_of(*edge, dtype, "integers") for dtype in FLOATING for edge in _EDGES[1:] if edge[0] * edge[2]),
    *(case_of(2, 17, 1304, 7, dtype, "integers") for dtype in FLOATING),  # long enough for a kernel to split K
    *(case_of(9, 40, 48, 8, dtype, bias=torch.float32) for dtype in (torch.bfloat16, torch.float16)),
    *(case_of(m, 33, 64, 12, dtype, bias=False) for dtype in FLOATING for m in (2, 19)),
    # many rows of whole lines, which warpgroups multiply
    *(case_of(70, 136, 200, r, dtype, v) for dtype in FLOATING[1:] for r, v in ((24, "integers"), (72, "normal"))),
)
_BENCH_CASES = tuple(
    case_of(m, 4096, 4096, r, dtype, bias=False)
    for dtype in (torch.bfloat16, torch.float32)
    for r in (16, 64, 128)
    for m in (1, 16, 128, 512)
)
_WIDE_CASES = tuple(case_of(4096, 4096, 4096, r, bias=False) for r in (16, 64, 128))

#: what csrc/cuda/lowrank_host.cuh takes: rows of x, bytes of s
NATIVE_ROWS, NATIVE_LOW_BYTES = 64, 16 << 10
#: the largest rank that the kernel for more than NATIVE_ROWS rows takes; csrc/cuda/lowrank_wide.cuh has it too
NATIVE_WIDE_RANK = 128

#: bad pairs of factors, for every op that takes A and B at these places
INVALID = (
    Invalid("x int32", lambda x, *r: (x.to(torch.int32), *r), "x is int32, expected fp32, bf16 or fp16"),
    Invalid("x fp64", lambda x, *r: (x.double(), *r), "x is fp64, expected fp32, bf16 or fp16"),
    Invalid("x complex", lambda x, *r: (x.to(torch.complex64), *r), "x is complex64, expected"),
    Invalid("x scalar", lambda x, *r: (x.new_zeros(()), *r), "x is a scalar, expected"),
)
_INVALID = (
    *INVALID,
    Invalid("x inner dim", lambda x, *r: (x[:, :16], *r), r"A has shape .*, expected \[R, 16\]"),
    Invalid("A dtype", lambda x, A, *r: (x, A.half(), *r), "A is fp16, expected fp32 as x is"),
    Invalid("A int", lambda x, A, *r: (x, A.int(), *r), "A is int32, expected fp32 as x is"),
    Invalid("A 1-d", lambda x, A, *r: (x, A.flatten(), *r), r"A has shape .*, expected \[R, K\]"),
    Invalid("A empty", lambda x, A, B, b: (x, A[:0], B[:, :0], b), "A has shape .*R >= 1"),
    Invalid("B dtype", lambda x, A, B, b: (x, A, B.bfloat16(), b), "B is bf16, expected fp32 as x is"),
    Invalid("B rank", lambda x, A, B, b: (x, A, B[:, :-1], b), r"B has shape .*, expected \[N, 5\] for A's rank 5"),
    Invalid("B 3-d", lambda x, A, B, b: (x, A, B[None], b), r"B has shape .*, expected \[N, R\]"),
    Invalid("B empty", lambda x, A, B, b: (x, A, B[:0], b), "B has shape .*N >= 1"),
    Invalid("bias int", lambda x, A, B, b: (x, A, B, b.int()), "bias is int32, expected"),
    Invalid("bias length", lambda x, A, B, b: (x, A, B, b[:-1]), "bias has shape .*expected"),
    Invalid("bias 2-d", lambda x, A, B, b: (x, A, B, b[None]), "bias has shape .*expected"),
)

_KERNELS = "burnish.kernels.lowrank.lowrank_linear"

SPEC = register(
    OpSpec(
        name="lowrank_linear",
        schema="(Tensor x, Tensor A, Tensor B, Tensor? bias) -> Tensor",
        reference=reference,
        fake=fake,
        autograd=Autograd(setup_context, backward, surrogate),
        impls=(
            Impl(
                "native",
                "torch.ops:burnish.lowrank_linear.native",
                f"{__name__}:supports_native",
                yields=f"{__name__}:has_one_row",
            ),
            Impl("triton", f"{_KERNELS}:lowrank_linear", f"{_KERNELS}:supports"),
        ),
        cases=Cases(test=_TEST_CASES, bench=_BENCH_CASES, invalid=_INVALID, wide=_WIDE_CASES),
        make=make,
        cost=cost,
        baseline=baseline,
    )
)


def has_one_row(x: Tensor, *_: Any) -> bool:
    """Whether x is one row, for which the kernel in CUDA C++ takes 1.2 to 1.3 times Triton's time on an H200."""
    return x.dim() > 0 and x.shape[:-1].numel() == 1


def supports_native(x: Tensor, A: Tensor, B: Tensor, *_: Any) -> str | None:
    """The CUDA C++ kernels stream the factors once for a few rows, and multiply many by warpgroups on sm_90."""
    if x.shape[:-1].numel() <= NATIVE_ROWS:
        return supports_few_rows(x, A)
    sizes = (x.shape[-1], B.shape[0], A.shape[0])
    return supports_many_rows(x, "x", x.dtype, sizes, NATIVE_WIDE_RANK)


def supports_many_rows(x: Tensor, name: str, dtype: torch.dtype, sizes: tuple[int, int, int], most: int) -> str | None:
    """The CUDA C++ kernels for more rows multiply what ``name`` is, of ``dtype``, by warpgroups. ``sizes``: K, N and R,
    which is at most ``most``."""
    m = x.shape[:-1].numel()
    if dtype.itemsize != 2:
        return f"M is {m} and {name} {dtype_name(dtype)}, the large-M kernel takes bf16 and fp16"
    if any(size % 8 or size == 0 for size in sizes) or sizes[2] > most:
        return f"M is {m} and (K, N, R) {sizes}, the large-M kernel takes multiples of 8 and ranks up to {most}"
    return on_device(x) or (None if warpgroups(x.device) else f"M is {m}, the large-M kernel needs sm_90")


def supports_few_rows(x: Tensor, A: Tensor) -> str | None:
    """The CUDA C++ kernel for at most NATIVE_ROWS rows keeps s in shared memory."""
    m, r = x.shape[:-1].numel(), A.shape[0]
    if m * r * x.itemsize > NATIVE_LOW_BYTES:
        return f"s has {m} rows of {r}, the small-M kernel keeps at most {NATIVE_LOW_BYTES} bytes of it on the chip"
    return on_device(x)


def as_rows(x: Tensor) -> Tensor:
    """x ``[..., K]`` as a matrix."""
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])


def backward_reference(
    dy: Tensor, x: Tensor, A: Tensor, B: Tensor, x_grad: bool, factor_grad: bool, bias_grad: bool
) -> tuple[Tensor, ...]:
    rows, flat = as_rows(dy), as_rows(x)
    t = (rows @ B).to(x.dtype, copy=True)
    dx = (t @ A).reshape(x.shape) if x_grad else x.new_empty(0)
    if factor_grad:
        s = (flat @ A.T).to(x.dtype, copy=True)
        dA, dB = t.T @ flat, rows.T @ s
    else:
        dA, dB = A.new_empty(0), B.new_empty(0)
    wide = torch.promote_types(dy.dtype, torch.float32)
    dbias = rows.to(wide).sum(0) if bias_grad else dy.new_empty(0, dtype=wide)
    return dx, dA, dB, dbias


def check_gradient(op: str, dy: Tensor, x: Tensor, N: int) -> None:
    """dy is x's, with N as its last size."""
    check_devices(op, x, dy=dy)
    torch._check(
        dy.dtype == x.dtype, lambda: f"{op}: dy is {dtype_name(dy.dtype)}, expected {dtype_name(x.dtype)} as x is"
    )
    torch._check(
        dy.dim() == x.dim() and dy.shape[:-1] == x.shape[:-1] and dy.shape[-1] == N,
        lambda: f"{op}: dy has shape {tuple(dy.shape)}, expected {(*x.shape[:-1], N)}",
    )


def new_gradients(
    x: Tensor, A: Tensor, B: Tensor, x_grad: bool, factor_grad: bool, bias_grad: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx, dA, dB and dbias to be filled: in their operands' shapes and dtypes, dbias fp32; what is not asked for is
    empty."""
    dx = x.new_empty(x.shape if x_grad else (0,))
    dA, dB = (factor.new_empty(factor.shape if factor_grad else (0,)) for factor in (A, B))
    return dx, dA, dB, x.new_empty(B.shape[0] if bias_grad else 0, dtype=torch.float32)


def backward_fake(
    dy: Tensor, x: Tensor, A: Tensor, B: Tensor, x_grad: bool, factor_grad: bool, bias_grad: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    op = "lowrank_linear_backward"
    check_factors(op, "x", x, x.shape[-1] if x.dim() else 0, A, B)
    check_gradient(op, dy, x, B.shape[0])
    return new_gradients(x, A, B, x_grad, factor_grad, bias_grad)


def backward_make(case: Case, backend: Backend, seed: int) -> tuple[Any, ...]:
    x, A, B, bias = make(case, backend, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    if case.values == "integers":
        dy = torch.randint(-8, 9, (x.shape[0], B.shape[0]), generator=generator)
        B = few_integers(B.shape[1], B.shape[0], generator).T.contiguous()
    else:
        dy = torch.randn(x.shape[0], B.shape[0], generator=generator)
    wanted = case.options.get("grads", "all")
    return dy.to(case.dtype), x, A, B.to(case.dtype), wanted != "factors", wanted != "x", bias is not None


def backward_cost(case: Case) -> Cost:
    m, n, k, r = (case.dims[name] for name in "MNKR")
    unit = "bf16" if case.dtype == torch.bfloat16 else "fp32"
    moved = float(m * n + 2 * m * k + 2 * r * (k + n)) * case.dtype.itemsize
    return Cost(2.0 * m * r * (2 * n + 3 * k), moved, unit)  # type: ignore[arg-type]


def backward_baseline(
    dy: Tensor, x: Tensor, A: Tensor, B: Tensor, x_grad: bool, factor_grad: bool, bias_grad: bool
) -> Callable[[], Any]:
    """The products that torch's autograd makes for two linear layers, which kept s."""
    s = x @ A.T

    def run() -> Any:
        t = dy @ B
        dx = t @ A if x_grad else None
        dA, dB = (t.T @ x, dy.T @ s) if factor_grad else (None, None)
        return dx, dA, dB, dy.sum(0) if bias_grad else None

    return run


BACKWARD = register(
    OpSpec(
        name="lowrank_linear_backward",
        schema="(Tensor dy, Tensor x, Tensor A, Tensor B, bool x_grad, bool factor_grad, bool bias_grad) "
        "-> (Tensor, Tensor, Tensor, Tensor)",
        reference=backward_reference,
        fake=backward_fake,
        autograd=None,
        impls=(Impl("triton", f"{_KERNELS}:lowrank_linear_backward", f"{_KERNELS}:supports_backward"),),
        cases=Cases(
            test=(
                *(case for case in _TEST_CASES if case.options.get("bias") in (None, False)),
                *(case_of(11, 40, 48, 8, dtype, grads=grads) for dtype in FLOATING for grads in ("x", "factors")),
            ),
            bench=tuple(case_of(m, 4096, 4096, r, bias=False) for r in (16, 64) for m in (16, 128, 512)),
            invalid=(
                Invalid("dy shape", lambda dy, *r: (dy[..., :-1], *r), "dy has shape .*, expected"),
                Invalid("dy rows", lambda dy, *r: (dy[:-1], *r), "dy has shape .*, expected"),
                Invalid("dy dtype", lambda dy, *r: (dy.half(), *r), "dy is fp16, expected fp32 as x is"),
                Invalid("x int", lambda dy, x, *r: (dy, x.int(), *r), "x is int32, expected"),
                Invalid("A rank", lambda dy, x, A, *r: (dy, x, A[:-1], *r), "B has shape .*, expected"),
                Invalid("A width", lambda dy, x, A, *r: (dy, x, A[:, :-1], *r), "A has shape .*, expected"),
            ),
        ),
        make=backward_make,
        cost=backward_cost,
        baseline=backward_baseline,
    )
)

_linear, _inference, _backward = SPEC.overload(), SPEC.entry, BACKWARD.entry


def lowrank_linear_backward(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients, as :func:`backward_reference` defines them; positional arguments as in the op's schema."""
    if dispatch.overrides:
        return dispatch.call(BACKWARD, args, needs_grad=False)
    return _backward(*args)


def lowrank_linear(x: Tensor, A: Tensor, B: Tensor, bias: Tensor | None = None) -> Tensor:
    """``(x A^T) B^T + bias``, the product of the thin matrices never formed.

    Args:
        x: ``[..., K]``, fp32, bf16 or fp16.
        A: ``[R, K]`` in x's dtype, on its device.
        B: ``[N, R]``, likewise.
        bias: ``[N]`` fp32, bf16 or fp16, or None.

    Returns:
        ``[..., N]`` in x's dtype. Differentiable in all four.

    Raises:
        RuntimeError: a shape, dtype or device that does not fit; the message names the argument.
    """
    needs_grad = dispatch.differentiates("lowrank_linear", x, A, B, bias)
    if dispatch.overrides:
        return dispatch.call(SPEC, (x, A, B, bias), needs_grad)
    return (_linear if needs_grad else _inference)(x, A, B, bias)
