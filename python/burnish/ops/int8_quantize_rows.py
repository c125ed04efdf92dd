"""int8_quantize_rows: symmetric int8 quantisation of each row by its largest magnitude.

    scale[m] = amax(|x[m, :]|) / 127          q[m, k] = round_half_even(x[m, k] * (127 / amax))

=======  =============  ==================
x        [..., K]       fp32, bf16, fp16
q        [..., K]       int8, in [-127, 127]
scale    [...]          fp32
=======  =============  ==================

The arithmetic is fp32 with IEEE division and one rounding an operation, so every backend gives the same bits. amax is
at least 2**-100, which keeps the inverse finite: a row of zeros has q = 0 and that floor's scale. A row with a NaN has
scale NaN and q = 0; a row with an infinity has scale Inf, q = +-127 at the infinities and 0 elsewhere, so that a linear
layer on it gives the infinities and NaNs that a float layer would. Deterministic; no gradient.

Per-row ("per-token") dynamic activation scaling as in LLM.int8() (Dettmers et al. 2022, arXiv 2208.07339) without the
outlier split, and ZeroQuant (Yao et al. 2022, arXiv 2206.01861).
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from burnish import dispatch, native
from burnish.checks import FLOATING, check_floating
from burnish.registry import Backend, Case, Cases, Cost, Impl, Invalid, OpSpec, register

__all__ = ["int8_quantize_rows"]

AMAX_FLOOR = 2.0**-100


def reference(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition, in plain torch; a float64 ``x`` is taken for exactly representable fp32 values."""
    x32 = x.to(torch.float32)
    if x.shape[-1] == 0:
        amax = x32.new_zeros(x.shape[:-1])
    else:
        amax = x32.abs().amax(-1)
    amax = amax.clamp_min(AMAX_FLOOR)  # clamp_min keeps NaN
    # a tensor, because torch computes number / tensor as reciprocal * number, and tensor / number so on a GPU
    limit = torch.full_like(amax, 127.0)
    inverse = torch.where(amax.isinf(), 0.0, limit / amax).unsqueeze(-1)
    scaled = torch.where(x32.isinf(), x32.sign() * 127.0, x32 * inverse)
    q = torch.where(amax.isnan().unsqueeze(-1), 0.0, scaled).round().to(torch.int8)
    return q, amax / limit


def fake(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    check_floating("int8_quantize_rows", x=x)
    torch._check(x.dim() >= 1, lambda: "int8_quantize_rows: x is a scalar, expected [..., K]")
    return (
        x.new_empty(x.shape, dtype=torch.int8),
        x.new_empty(x.shape[:-1], dtype=torch.float32),
    )


def make(case: Case, backend: Backend, seed: int) -> tuple[torch.Tensor]:
    return (make_rows(case, seed),)


def make_rows(case: Case, seed: int) -> torch.Tensor:
    """x [M, K]: ``integers`` have amax 127, so that the scale is one and q = x; ``extreme`` are all +-127;
    ``wide`` rows differ in magnitude by 2**40; ``midpoints`` land on halves before rounding."""
    generator = torch.Generator().manual_seed(seed)
    shape = (case.dims["M"], case.dims["K"])
    if case.values == "integers":
        x = torch.randint(-8, 9, shape, generator=generator).float()
        x[:, :1] = 127.0
    elif case.values == "extreme":
        x = 127.0 * (torch.randint(0, 2, shape, generator=generator).float() * 2 - 1)
    elif case.values == "wide":
        x = torch.randn(shape, generator=generator)
        x = x * torch.exp2(torch.randint(-20, 21, (shape[0], 1), generator=generator).float())
        x = x.clamp(-6e4, 6e4)
    elif case.values == "midpoints":
        x = torch.randint(-127, 127, shape, generator=generator) + 0.5
        x[:, :1] = 127.0
    else:
        x = torch.randn(shape, generator=generator)
    return x.to(case.dtype)


def cost(case: Case) -> Cost:
    rows, width = case.dims["M"], case.dims["K"]
    return Cost(ops=2.0 * rows * width, bytes=rows * width * (case.dtype.itemsize + 1) + 4.0 * rows, unit="fp32")


def baseline(x: torch.Tensor) -> Callable[[], torch.Tensor]:
    def run() -> torch.Tensor:
        amax = x.abs().amax(-1, keepdim=True).float().clamp_min(AMAX_FLOOR)
        return (x * (127.0 / amax)).round().to(torch.int8)

    return run


_EDGES = ((0, 16), (1, 1), (1, 64), (3, 17), (5, 100), (7, 0), (17, 127), (33, 129), (64, 384), (67, 40), (2, 5000))

SPEC = register(
    OpSpec(
        name="int8_quantize_rows",
        schema="(Tensor x) -> (Tensor, Tensor)",
        reference=reference,
        fake=fake,
        autograd=None,
        impls=(
            Impl("native", "torch.ops:burnish.int8_quantize_rows.native", f"{__name__}:supports_native"),
            Impl(
                "triton",
                "burnish.kernels.quant.int8_quantize_rows:int8_quantize_rows",
                "burnish.kernels.quant.int8_quantize_rows:supports",
            ),
        ),
        cases=Cases(
            test=tuple(
                Case({"M": rows, "K": width}, dtype, values)
                for dtype in FLOATING
                for rows, width in _EDGES
                for values in (("normal", "integers", "extreme", "wide", "midpoints") if rows * width else ("normal",))
            ),
            bench=tuple(
                Case({"M": rows, "K": width}, torch.bfloat16)
                for rows, width in ((1, 4096), (16, 4096), (128, 384), (512, 4096), (4096, 384))
            ),
            invalid=(
                Invalid("int32 x", lambda x: (x.to(torch.int32),), "x is int32, expected"),
                Invalid("float64 x", lambda x: (x.double(),), "x is fp64, expected"),
                Invalid("complex x", lambda x: (x.to(torch.complex64),), "x is complex64, expected"),
                Invalid("scalar x", lambda x: (x.new_zeros(()),), "x is a scalar"),
            ),
        ),
        make=make,
        cost=cost,
        baseline=baseline,
    )
)


def supports_native(x: torch.Tensor) -> str | None:
    return None if x.is_cuda or native.emulating() else f"the tensors are on {x.device}, expected CUDA"


def int8_quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise each row of ``x`` to int8; returns ``(q, scale)`` with ``q * scale[..., None]`` close to ``x``.

    Args:
        x: ``[..., K]``, fp32, bf16 or fp16, any strides.

    Returns:
        ``q`` int8 ``[..., K]`` in [-127, 127] and ``scale`` fp32 ``[...]``. The error of an element is at most half its
        row's scale.

    Raises:
        RuntimeError: ``x`` has another dtype or no dimension.
    """
    if dispatch.overrides:
        return dispatch.call(SPEC, (x,), needs_grad=False)
    return _op(x)


_op = SPEC.entry
