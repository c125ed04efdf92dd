"""adagrad_step: one step of Adagrad on a list of parameters, in one pass over memory.

    g  = g + weight_decay * p
    s  = s + g ** 2
    p  = p - lr / (1 + (t - 1) * lr_decay) * g / (sqrt(s) + eps)

The list of moments is state_sums (s). What surrounds the formula, what each list holds and how results are rounded is
every step op's: see :mod:`burnish.step_op`.

Duchi, Hazan and Singer 2011, with the decay of the rate and the eps of torch.optim.Adagrad.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from burnish import step_cases
from burnish.moments import square_root
from burnish.registry import Case, register
from burnish.step_cases import BF16, FP32, WEIGHT_DECAY
from burnish.step_checks import NOT_NEGATIVE
from burnish.step_op import Moments, StepOp, caller, divided, gpu_impls

__all__ = ["adagrad_step"]


def element(
    p: torch.Tensor,
    g: torch.Tensor,
    held: list[Any],
    t: float,
    lr: float,
    lr_decay: float,
    weight_decay: float,
    eps: float,
) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
    (total,) = held
    if weight_decay:
        g = g + p * weight_decay
    total = total + g.square()
    update = g / (square_root(total) + eps)
    return p - update * divided(lr, 1 + (t - 1) * lr_decay), [total]


STEP = StepOp(
    name="adagrad_step",
    moments=(Moments("state_sums", signed=False),),
    numbers={"lr_decay": NOT_NEGATIVE, "weight_decay": NOT_NEGATIVE, "eps": NOT_NEGATIVE},
    element=element,
)


def numbers(case: Case) -> tuple[Any, ...]:
    """Those that fp32 holds."""
    decay = WEIGHT_DECAY if case.options.get("decay", True) else 0.0
    return 0.125 if case.options.get("lr_decay") else 0.0, decay, 2.0**-33


def baseline(*args: Any) -> Callable[[], None]:
    """torch's fused kernel."""
    given = step_cases.as_torch(STEP, args)

    def run() -> None:
        torch._foreach_add_(given.steps, 1)
        torch._fused_adagrad_(
            given.params,
            given.grads,
            given.state_sums,
            given.steps,
            lr=given.lr,
            lr_decay=given.lr_decay,
            weight_decay=given.weight_decay,
            eps=given.eps,
            maximize=given.maximize,
        )

    return run


OPTIONS: step_cases.Own = (
    (FP32, {"decay": False}),
    (FP32, {"lr_decay": True, "maximize": True}),
    (BF16, {"lr_decay": True, "state": "int8", "first": True}),
)

SPEC = register(
    STEP.spec(
        cases=step_cases.cases(STEP, OPTIONS),
        make=step_cases.maker(STEP, numbers),
        cost=step_cases.coster(STEP, ops=8.0),
        baseline=baseline,
        impls=gpu_impls("adagrad_step"),
    )
)


def adagrad_step(
    params: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
    steps: Sequence[torch.Tensor],
    state_sums: Sequence[torch.Tensor],
    scales: Sequence[torch.Tensor] = (),
    masters: Sequence[torch.Tensor] = (),
    emas: Sequence[torch.Tensor] = (),
    masks: Sequence[torch.Tensor] = (),
    *,
    lr: torch.Tensor,
    lr_decay: float = 0.0,
    weight_decay: float = 0.0,
    eps: float = 1e-10,
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
        params, grads, steps, state_sums, scales, masters, emas, masks, lr, lr_decay, weight_decay, eps,
        maximize, ema_decay, max_grad_norm, grad_norm, grad_scale, found_inf, seed,
    )  # fmt: skip


_call = caller(SPEC)
