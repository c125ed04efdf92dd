"""lion_step: one step of Lion on a list of parameters, in one pass over memory.

    p = p * (1 - lr * weight_decay) - lr * sign(m * beta1 + g * (1 - beta1))
    m = m * beta2 + g * (1 - beta2)

The sign of 0 and of NaN is 0, as torch.sign has it. The list of moments is exp_avgs (m). What surrounds the formula,
what each list holds and how results are rounded is every step op's: see :mod:`burnish.step_op`.

Method: Chen et al. 2023 (arXiv 2302.06675), algorithm 2.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from burnish import moments, step_cases
from burnish.registry import Backend, Case, register
from burnish.step_cases import BF16, FP32, WEIGHT_DECAY
from burnish.step_checks import FRACTION, NOT_NEGATIVE
from burnish.step_op import Moments, StepOp, caller, gpu_impls, gradient_factor

__all__ = ["lion_step"]


def element(
    p: torch.Tensor,
    g: torch.Tensor,
    held: list[Any],
    t: float,
    lr: float,
    beta1: float,
    beta2: float,
    weight_decay: float,
) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
    (m,) = held
    sign = (m * beta1 + g * (1 - beta1)).sign()
    kept = 1 - lr * weight_decay if weight_decay else 1.0
    return p * kept - sign * lr, [m * beta2 + g * (1 - beta2)]


STEP = StepOp(
    name="lion_step",
    moments=(Moments("exp_avgs", signed=True),),
    numbers={"beta1": FRACTION, "beta2": FRACTION, "weight_decay": NOT_NEGATIVE},
    element=element,
)


def numbers(case: Case) -> tuple[float, float, float]:
    """Those that fp32 holds."""
    return 1 - 13421773 / 2**27, 1 - 10737418 / 2**30, 0.0 if case.options.get("no_decay") else WEIGHT_DECAY


def make(case: Case, backend: Backend, seed: int) -> tuple[Any, ...]:
    """No sign hangs on the rounding of what is nearly 0: such gradients are 0."""
    args = step_cases.maker(STEP, numbers)(case, backend, seed)
    given = STEP.given(args)
    factor = gradient_factor(given, 0.0 if given.grad_norm is None else float(given.grad_norm))
    for i, (grad, stored) in enumerate(zip(given.grads, given.exp_avgs, strict=True)):
        m = moments.decode(stored.view(-1), given.scales[i][0]).view(stored.shape) if given.scales else stored.float()
        parts = m * given.beta1, grad.float() * factor * (1 - given.beta1)
        grad[(parts[0] + parts[1]).abs() < 2.0**-12 * parts[0].abs()] = 0
    return args


def baseline(*args: Any) -> Callable[[], None]:
    """torch's foreach operations; a fused Lion it has not."""
    given = step_cases.as_torch(STEP, args)
    params, grads, firsts, lr = given.params, given.grads, given.exp_avgs, float(given.lr)

    def run() -> None:
        direction = torch._foreach_mul(firsts, given.beta1)
        torch._foreach_add_(direction, grads, alpha=1 - given.beta1)
        torch._foreach_sign_(direction)
        torch._foreach_mul_(params, 1 - lr * given.weight_decay)
        torch._foreach_add_(params, direction, alpha=-lr)
        torch._foreach_mul_(firsts, given.beta2)
        torch._foreach_add_(firsts, grads, alpha=1 - given.beta2)

    return run


OPTIONS = (
    (FP32, {"maximize": True, "no_decay": True}),
    (FP32, {"state": "int8", "amp": True}),
    (BF16, {"state": "int8", "stochastic": True, "ema": True, "mask": True}),
)

SPEC = register(
    STEP.spec(
        cases=step_cases.cases(STEP, OPTIONS),
        make=make,
        cost=step_cases.coster(STEP, ops=11.0),
        baseline=baseline,
        impls=gpu_impls("lion_step"),
    )
)


def lion_step(
    params: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
    steps: Sequence[torch.Tensor],
    exp_avgs: Sequence[torch.Tensor],
    scales: Sequence[torch.Tensor] = (),
    masters: Sequence[torch.Tensor] = (),
    emas: Sequence[torch.Tensor] = (),
    masks: Sequence[torch.Tensor] = (),
    *,
    lr: torch.Tensor,
    beta1: float = 0.9,
    beta2: float = 0.99,
    weight_decay: float = 0.0,
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
        params, grads, steps, exp_avgs, scales, masters, emas, masks, lr, beta1, beta2, weight_decay, maximize,
        ema_decay, max_grad_norm, grad_norm, grad_scale, found_inf, seed,
    )  # fmt: skip


_call = caller(SPEC)
