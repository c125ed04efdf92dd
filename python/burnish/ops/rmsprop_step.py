"""rmsprop_step: one step of RMSprop on a list of parameters, in one pass over memory.

    g  = g + weight_decay * p
    v  = v * alpha + g ** 2 * (1 - alpha)
    a  = a + (g - a) * (1 - alpha)                         where there are grad_avgs: centered
    u  = g / (sqrt(v) + eps)                               centered: of max(v - a ** 2, 0) for v
    b  = b * momentum + u, which then stands for u below   where there are momentum_buffers
    p  = p - lr * u

The lists of moments are square_avgs (v) and, optional, grad_avgs (a) and momentum_buffers (b). What surrounds the
formula, what each list holds and how results are rounded is every step op's: see :mod:`burnish.step_op`.

v - a ** 2 is a variance, which rounding may leave below 0; torch.optim has NaN there. Of 8-bit codes it leaves nothing:
where means are as large as spreads, 300 steps with both moments in codes went a million times too far. So codes are
refused with grad_avgs; bf16 costs 1 % of the sum of the updates there.

Hinton, Srivastava and Swersky 2012; centered: Graves 2013; momentum as torch.optim.RMSprop has it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.optim.rmsprop import rmsprop

from burnish import step_cases
from burnish.moments import square_root
from burnish.registry import Backend, Case, Invalid, register
from burnish.step_cases import BF16, FP32, WEIGHT_DECAY, changed
from burnish.step_checks import FRACTION, NOT_NEGATIVE
from burnish.step_op import Moments, StepOp, caller, gpu_impls

__all__ = ["rmsprop_step"]


def element(
    p: torch.Tensor,
    g: torch.Tensor,
    held: list[Any],
    t: float,
    lr: float,
    alpha: float,
    eps: float,
    weight_decay: float,
    momentum: float,
) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
    v, a, b = held
    if weight_decay:
        g = g + p * weight_decay
    v = v * alpha + g.square() * (1 - alpha)
    spread = v
    if a is not None:
        a = a + (g - a) * (1 - alpha)
        spread = (v - a.square()).clamp_min(0.0)
    u = g / (square_root(spread) + eps)
    if b is not None:
        u = b = b * momentum + u
    return p - u * lr, [v, a, b]


def check_centered(given: Any) -> None:
    torch._check(
        not given.grad_avgs or given.grad_avgs[0].dtype != torch.int8,
        lambda: "rmsprop_step: grad_avgs[0] is int8, expected fp32 or bf16: codes lose the variance",
    )


STEP = StepOp(
    name="rmsprop_step",
    moments=(
        Moments("square_avgs", signed=False),
        Moments("grad_avgs", signed=True, option="centered"),
        Moments("momentum_buffers", signed=True, option="momentum"),
    ),
    numbers={"alpha": FRACTION, "eps": NOT_NEGATIVE, "weight_decay": NOT_NEGATIVE, "momentum": NOT_NEGATIVE},
    element=element,
    needs={"momentum": "momentum_buffers"},
    refuse=check_centered,
)


def numbers(case: Case) -> tuple[float, float, float, float]:
    """Those that fp32 holds."""
    options = case.options
    decay = 0.0 if options.get("no_decay") else WEIGHT_DECAY
    return 1 - 10737418 / 2**30, 2.0**-26, decay, 0.875 if options.get("momentum") else 0.0


def make(case: Case, backend: Backend, seed: int) -> tuple[Any, ...]:
    """Mean squares are above squared means."""
    args = step_cases.maker(STEP, numbers)(case, backend, seed)
    given = STEP.given(args)
    for v, a in zip(given.square_avgs, given.grad_avgs, strict=False):
        v.add_(2 * a.square())
    return args


def baseline(*args: Any) -> Callable[[], None]:
    """torch.optim's foreach form; a fused RMSprop it has not."""
    given = step_cases.as_torch(STEP, args)

    def run() -> None:
        rmsprop(
            given.params,
            given.grads,
            given.square_avgs,
            given.grad_avgs,
            given.momentum_buffers,
            given.steps,
            foreach=True,
            maximize=given.maximize,
            lr=float(given.lr),
            alpha=given.alpha,
            eps=given.eps,
            weight_decay=given.weight_decay,
            momentum=given.momentum,
            centered=bool(given.grad_avgs),
        )

    return run


REFUSED = (
    Invalid(
        "codes of means",
        lambda *args: changed(STEP, "grad_avgs", lambda _: [p.to(torch.int8) for p in args[0]])(
            *changed(STEP, "square_avgs", lambda _: [p.to(torch.uint8) for p in args[0]])(
                *changed(STEP, "momentum_buffers", lambda _: [p.to(torch.int8) for p in args[0]])(
                    *changed(STEP, "scales", lambda _: [torch.zeros(3, -(-p.numel() // 256)) for p in args[0]])(*args)
                )
            )
        ),
        r"grad_avgs\[0\] is int8, expected fp32 or bf16",
    ),
)
OPTIONS: step_cases.Own = (
    (FP32, {}),
    (FP32, {"amp": True}),
    (FP32, {"maximize": True, "no_decay": True}),
    (FP32, {"centered": True}),
    (FP32, {"centered": True, "momentum": True}),
    (BF16, {"centered": True, "state": "bf16", "stochastic": True}),
    (BF16, {"state": "int8", "stochastic": True, "ema": True, "mask": True}),
)

SPEC = register(
    STEP.spec(
        cases=step_cases.cases(STEP, OPTIONS, base={"momentum": True}, refused=REFUSED),
        make=make,
        cost=step_cases.coster(STEP, ops=13.0),
        baseline=baseline,
        impls=gpu_impls("rmsprop_step"),
    )
)


def rmsprop_step(
    params: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
    steps: Sequence[torch.Tensor],
    square_avgs: Sequence[torch.Tensor],
    grad_avgs: Sequence[torch.Tensor] = (),
    momentum_buffers: Sequence[torch.Tensor] = (),
    scales: Sequence[torch.Tensor] = (),
    masters: Sequence[torch.Tensor] = (),
    emas: Sequence[torch.Tensor] = (),
    masks: Sequence[torch.Tensor] = (),
    *,
    lr: torch.Tensor,
    alpha: float = 0.99,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    momentum: float = 0.0,
    maximize: bool = False,
    ema_decay: float = 0.0,
    max_grad_norm: float = 0.0,
    grad_norm: torch.Tensor | None = None,
    grad_scale: torch.Tensor | None = None,
    found_inf: torch.Tensor | None = None,
    seed: int | None = None,
) -> None:
    """Step ``params`` in place, with everything that belongs to them, which :mod:`burnish.step_op` describes.

    Autograd learns of the change as of any in-place operation. Raises RuntimeError for a dtype, shape, layout, length
    or number outside of what is said there; then nothing has changed.
    """
    _call(
        params, grads, steps, square_avgs, grad_avgs, momentum_buffers, scales, masters, emas, masks, lr, alpha, eps,
        weight_decay, momentum, maximize, ema_decay, max_grad_norm, grad_norm, grad_scale, found_inf, seed,
    )  # fmt: skip


_call = caller(SPEC)
