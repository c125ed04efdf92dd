"""sgd_step: one step of SGD, with momentum or without, on a list of parameters, in one pass over memory.

    g  = g + weight_decay * p
    b  = b * momentum + g * (1 - dampening)                b = g where no step was done before
    g  = b                                                 g + b * momentum with nesterov
    p  = p - lr * g

b is the optional list of moments momentum_buffers; without it the second and third line are not there. What surrounds
the formula, what each list holds and how results are rounded is every step op's: see :mod:`burnish.step_op`.

Momentum: Polyak 1964, in the form of torch.optim.SGD; nesterov: Sutskever, Martens, Dahl and Hinton 2013.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from burnish import step_cases
from burnish.registry import Case, register
from burnish.step_cases import BF16, FP16, FP32, WEIGHT_DECAY
from burnish.step_checks import FINITE, FLAG, NOT_NEGATIVE
from burnish.step_op import Moments, StepOp, caller, gpu_impls

__all__ = ["sgd_step"]


def element(
    p: torch.Tensor,
    g: torch.Tensor,
    held: list[Any],
    t: float,
    lr: float,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
    (buffer,) = held
    if weight_decay:
        g = g + p * weight_decay
    if buffer is not None:
        buffer = g if t == 1 else buffer * momentum + g * (1 - dampening)
        g = g + buffer * momentum if nesterov else buffer
    return p - g * lr, [buffer]


STEP = StepOp(
    name="sgd_step",
    moments=(Moments("momentum_buffers", signed=True, option="momentum"),),
    numbers={"momentum": NOT_NEGATIVE, "dampening": FINITE, "weight_decay": NOT_NEGATIVE, "nesterov": FLAG},
    element=element,
    needs={"momentum": "momentum_buffers"},
)


def numbers(case: Case) -> tuple[Any, ...]:
    """Those that fp32 holds."""
    options = case.options
    momentum, dampening = 1 - 13421773 / 2**27, 0.25 if options.get("dampening") else 0.0
    decay = WEIGHT_DECAY if options.get("decay", True) else 0.0
    return momentum if options.get("momentum") else 0.0, dampening, decay, bool(options.get("nesterov"))


def baseline(*args: Any) -> Callable[[], None]:
    """torch's fused kernel."""
    given = step_cases.as_torch(STEP, args)

    def run() -> None:
        torch._fused_sgd_(
            given.params,
            given.grads,
            given.momentum_buffers,
            weight_decay=given.weight_decay,
            momentum=given.momentum,
            lr=given.lr,
            dampening=given.dampening,
            nesterov=given.nesterov,
            maximize=given.maximize,
            is_first_step=False,
        )

    return run


BASE = {"momentum": True}
OPTIONS: step_cases.Own = (
    (FP32, {}),
    (FP32, {"decay": False}),
    (FP32, {"mask": True, "ema": True, "amp": True}),
    (BF16, {"stochastic": True}),
    (FP16, {"master": "split"}),
    (FP32, {**BASE, "decay": False}),
    (FP32, {**BASE, "nesterov": True}),
    (FP32, {**BASE, "dampening": True, "maximize": True}),
    (BF16, {**BASE, "nesterov": True, "first": True, "state": "int8"}),
)

SPEC = register(
    STEP.spec(
        cases=step_cases.cases(STEP, OPTIONS, BASE),
        make=step_cases.maker(STEP, numbers),
        cost=step_cases.coster(STEP, ops=7.0),
        baseline=baseline,
        impls=gpu_impls("sgd_step"),
    )
)


def sgd_step(
    params: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
    steps: Sequence[torch.Tensor],
    momentum_buffers: Sequence[torch.Tensor] = (),
    scales: Sequence[torch.Tensor] = (),
    masters: Sequence[torch.Tensor] = (),
    emas: Sequence[torch.Tensor] = (),
    masks: Sequence[torch.Tensor] = (),
    *,
    lr: torch.Tensor,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
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
        params, grads, steps, momentum_buffers, scales, masters, emas, masks, lr, momentum, dampening, weight_decay,
        nesterov, maximize, ema_decay, max_grad_norm, grad_norm, grad_scale, found_inf, seed,
    )  # fmt: skip


_call = caller(SPEC)
