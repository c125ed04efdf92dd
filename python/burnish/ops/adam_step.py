"""adam_step: one step of Adam, AdamW or their amsgrad forms on a list of parameters, in one pass over memory.

    g  = g + weight_decay * p                              unless decoupled
    m  = m + (g - m) * (1 - beta1)                         v = v * beta2 + g ** 2 * (1 - beta2)
    v' = max(v', v), which then stands for v below         where there are max_exp_avg_sqs
    p  = p * (1 - lr * weight_decay) - lr / (1 - beta1 ** t) * m / (sqrt(v) / sqrt(1 - beta2 ** t) + eps)

The lists of moments are exp_avgs (m), exp_avg_sqs (v) and, optional, max_exp_avg_sqs (v'). What surrounds the formula,
what each list holds and how results are rounded is every step op's: see :mod:`burnish.step_op`.

Adam: Kingma and Ba 2015; AdamW: Loshchilov and Hutter 2019; amsgrad: Reddi et al. 2018. 24-bit parameters as FlashOptim
has them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from burnish import step_cases
from burnish.moments import square_root
from burnish.registry import Case, register
from burnish.step_cases import FP16, FP32, WEIGHT_DECAY
from burnish.step_checks import FLAG, FRACTION, NOT_NEGATIVE
from burnish.step_op import Moments, StepOp, caller, divided, gpu_impls, power

__all__ = ["adam_step"]


def element(
    p: torch.Tensor,
    g: torch.Tensor,
    held: list[Any],
    t: float,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    decoupled: bool,
) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
    m, v, greatest = held
    if not decoupled and weight_decay:
        g = g + p * weight_decay
    m = m + (g - m) * (1 - beta1)
    v = v * beta2 + g.square() * (1 - beta2)
    if greatest is not None:
        greatest = torch.maximum(greatest, v)
    correction1, correction2 = 1 - power(beta1, t), 1 - power(beta2, t)
    inverse = divided(1.0, math.sqrt(correction2) if correction2 >= 0 else math.nan)
    update = m / (square_root(v if greatest is None else greatest) * inverse + eps)
    kept = 1 - lr * weight_decay if decoupled and weight_decay else 1.0
    return p * kept - update * divided(lr, correction1), [m, v, greatest]


STEP = StepOp(
    name="adam_step",
    moments=(
        Moments("exp_avgs", signed=True),
        Moments("exp_avg_sqs", signed=False),
        Moments("max_exp_avg_sqs", signed=False, option="amsgrad"),
    ),
    numbers={
        "beta1": FRACTION,
        "beta2": FRACTION,
        "eps": NOT_NEGATIVE,
        "weight_decay": NOT_NEGATIVE,
        "decoupled": FLAG,
    },
    element=element,
)


def numbers(case: Case) -> tuple[Any, ...]:
    """Those that fp32 holds."""
    return 1 - 13421773 / 2**27, 1 - 8389 / 2**23, 2.0**-26, WEIGHT_DECAY, not case.options.get("coupled", False)


def baseline(*args: Any) -> Callable[[], None]:
    """torch's fused kernel."""
    given = step_cases.as_torch(STEP, args)
    fused = torch._fused_adamw_ if given.decoupled else torch._fused_adam_

    def run() -> None:
        torch._foreach_add_(given.steps, 1)
        fused(
            given.params,
            given.grads,
            given.exp_avgs,
            given.exp_avg_sqs,
            given.max_exp_avg_sqs,
            given.steps,
            lr=given.lr,
            beta1=given.beta1,
            beta2=given.beta2,
            weight_decay=given.weight_decay,
            eps=given.eps,
            amsgrad=bool(given.max_exp_avg_sqs),
            maximize=given.maximize,
        )

    return run


OPTIONS: step_cases.Own = (
    (FP32, {"amsgrad": True}),
    (FP32, {"coupled": True, "maximize": True}),
    (FP32, {"state": "int8", "amsgrad": True, "coupled": True, "amp": True}),
    (FP16, {"master": "split", "amsgrad": True}),
)

SPEC = register(
    STEP.spec(
        cases=step_cases.cases(STEP, OPTIONS),
        make=step_cases.maker(STEP, numbers),
        cost=step_cases.coster(STEP, ops=16.0),
        baseline=baseline,
        impls=gpu_impls("adam_step"),
    )
)


def adam_step(
    params: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
    steps: Sequence[torch.Tensor],
    exp_avgs: Sequence[torch.Tensor],
    exp_avg_sqs: Sequence[torch.Tensor],
    max_exp_avg_sqs: Sequence[torch.Tensor] = (),
    scales: Sequence[torch.Tensor] = (),
    masters: Sequence[torch.Tensor] = (),
    emas: Sequence[torch.Tensor] = (),
    masks: Sequence[torch.Tensor] = (),
    *,
    lr: torch.Tensor,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decoupled: bool = True,
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
        params, grads, steps, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, scales, masters, emas, masks, lr, beta1, beta2,
        eps, weight_decay, decoupled, maximize, ema_decay, max_grad_norm, grad_norm, grad_scale, found_inf, seed,
    )  # fmt: skip


_call = caller(SPEC)
