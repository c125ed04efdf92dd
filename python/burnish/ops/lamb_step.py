"""lamb_step: one step of LAMB on a list of parameters.

    m = m + (g - m) * (1 - beta1)                          v = v * beta2 + g ** 2 * (1 - beta2)
    u = m / (1 - beta1 ** t) / (sqrt(v) / sqrt(1 - beta2 ** t) + eps) + weight_decay * p
    p = p - lr * trust * u                                 without bias_correction both corrections are 1
    trust = norm(p) / norm(u)                              1 where a norm is 0 or NaN, at most 1 with trust_clip

Norms are of one tensor, of the elements that its mask keeps: sums of squares in double, by chunks of 16384 elements and
then of the chunks, each in a fixed order, which is Triton's own there. Without ``adapt`` trust is 1. The lists of
moments are exp_avgs (m) and exp_avg_sqs (v). What surrounds the formula, what each list holds and how results are
rounded is every step op's: see :mod:`burnish.step_op`.

squares  fp64 [parameters, 2], or None: the sums of squares of p and of u, as :func:`burnish.ops.lamb_squares` gives
         them. They are given where the parameters are shards of tensors, whose sums are more than theirs.

The norms need a first pass, which reads what the step does and writes nothing; the second does what Adam's does. Both
compute u from the old state, before anything is rounded, so that it is one whatever the formats are. That is 44 bytes
of memory traffic for each fp32 element where Adam has 28: moments that the first pass wrote would save 4 of them, and
cost that coded and 16-bit moments are rounded before their use.

Method: You et al. 2020 (arXiv 1904.00962), algorithm 2 with phi the identity; trust_clip is its bound, as in LAMBC
(Fong et al. 2020, arXiv 2011.13584).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from burnish import moments, step_cases
from burnish.checks import check_devices
from burnish.moments import square_root
from burnish.ops.grad_norm import elements, shapes
from burnish.registry import Case, Cost, Invalid, dtype_name, register
from burnish.step_cases import BF16, FP32, WEIGHT_DECAY, changed
from burnish.step_checks import FLAG, FRACTION, NOT_NEGATIVE, ROWS
from burnish.step_op import Moments, StepOp, caller, divided, gpu_impls, power

__all__ = ["lamb_step"]


def update(
    p: torch.Tensor,
    g: torch.Tensor,
    m: torch.Tensor,
    v: torch.Tensor,
    t: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    bias_correction: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """u, and the new moments."""
    m = m + (g - m) * (1 - beta1)
    v = v * beta2 + g.square() * (1 - beta2)
    correction1, correction2 = (1 - power(beta1, t), 1 - power(beta2, t)) if bias_correction else (1.0, 1.0)
    inverse = divided(1.0, math.sqrt(correction2) if correction2 >= 0 else math.nan)
    u = m * divided(1.0, correction1) / (square_root(v) * inverse + eps)
    return (u + p * weight_decay if weight_decay else u), m, v


def square(tensor: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """The sum of the squares of what the mask keeps, fp64 ``[]``."""
    return (tensor if mask is None else torch.where(mask, tensor, 0.0)).double().square().sum()


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
    bias_correction: bool,
    adapt: bool,
    trust_clip: bool,
    squares: torch.Tensor | None,
    mask: torch.Tensor | None,
) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
    first, second = held
    u, m, v = update(p, g, first, second, t, beta1, beta2, eps, weight_decay, bias_correction)
    of_p, of_u = map(float, (square(p, mask), square(u, mask)) if squares is None else squares)
    trust = 1.0
    if adapt and of_p > 0 and of_u > 0:
        trust = divided(math.sqrt(of_p), math.sqrt(of_u))
        trust = 1.0 if trust_clip and trust > 1 else trust
    return p - u * (lr * trust), [m, v]


def check_squares(given: Any) -> None:
    squares, shape = given.squares, (len(given.params), 2)
    if squares is None:
        return
    torch._check(
        squares.dtype == torch.float64 and squares.is_contiguous(),
        lambda: f"lamb_step: squares is {dtype_name(squares.dtype)}, expected fp64, contiguous",
    )
    torch._check(
        tuple(squares.shape) == shape,
        lambda: f"lamb_step: squares has shape {tuple(squares.shape)}, expected {shape}",
    )
    if given.params:
        check_devices("lamb_step", given.params[0], squares=squares)


MOMENTS = (Moments("exp_avgs", signed=True), Moments("exp_avg_sqs", signed=False))
NUMBERS = {
    "beta1": FRACTION,
    "beta2": FRACTION,
    "eps": NOT_NEGATIVE,
    "weight_decay": NOT_NEGATIVE,
    "bias_correction": FLAG,
}
STEP = StepOp(
    name="lamb_step",
    moments=MOMENTS,
    numbers={**NUMBERS, "adapt": FLAG, "trust_clip": FLAG, "squares": ROWS},
    element=element,
    whole=True,
    refuse=check_squares,
)


def common_numbers(case: Case) -> tuple[Any, ...]:
    """Those that fp32 holds."""
    options = case.options
    decay = 0.0 if options.get("no_decay") else WEIGHT_DECAY
    return 1 - 13421773 / 2**27, 1 - 8389 / 2**23, 2.0**-20, decay, not options.get("uncorrected", False)


def numbers(case: Case) -> tuple[Any, ...]:
    options = case.options
    adapt, count = not options.get("unadapted", False), len(shapes(case))
    squares = torch.arange(1.0, 1.0 + 2 * count, dtype=torch.float64).view(count, 2) if options.get("given") else None
    return *common_numbers(case), adapt, bool(options.get("clip")), squares


def cost_of_sums(case: Case) -> Cost:
    """Bytes of each element: all of it is read."""
    options = case.options
    state = {"bf16": 2.0, "int8": 1 + 4 / moments.BLOCK}.get(options.get("state", "fp32"), 4.0)
    master = {"split": case.dtype.itemsize + 1, "fp32": 4}.get(options.get("master", ""), case.dtype.itemsize)
    read = options.get("grad_dtype", case.dtype).itemsize + (1 if options.get("mask") else 0)
    return Cost(ops=20.0 * elements(case), bytes=elements(case) * (master + 2 * state + read), unit="fp32")


def cost(case: Case) -> Cost:
    """Two passes, unless the sums are given or not asked for."""
    step = step_cases.coster(STEP, ops=21.0)(case)
    if case.options.get("given") or case.options.get("unadapted"):
        return step
    sums = cost_of_sums(case)
    return Cost(ops=sums.ops + step.ops, bytes=sums.bytes + step.bytes, unit="fp32")


def baseline(*args: Any) -> Callable[[], None]:
    """torch's foreach operations; a fused LAMB it has not."""
    given = step_cases.as_torch(STEP, args)
    params, grads, firsts, seconds, lr = given.params, given.grads, given.exp_avgs, given.exp_avg_sqs, float(given.lr)

    def run() -> None:
        torch._foreach_add_(given.steps, 1)
        torch._foreach_lerp_(firsts, grads, 1 - given.beta1)
        torch._foreach_mul_(seconds, given.beta2)
        torch._foreach_addcmul_(seconds, grads, grads, 1 - given.beta2)
        t = float(given.steps[0])
        spread = torch._foreach_sqrt(seconds)
        torch._foreach_div_(spread, math.sqrt(1 - given.beta2**t))
        torch._foreach_add_(spread, given.eps)
        u = torch._foreach_div(firsts, spread)
        torch._foreach_div_(u, 1 - given.beta1**t)
        torch._foreach_add_(u, params, alpha=given.weight_decay)
        of_p, of_u = (torch.stack(torch._foreach_norm(tensors)) for tensors in (params, u))
        trust = torch.where((of_p > 0) & (of_u > 0), of_p / of_u, 1.0)
        torch._foreach_mul_(u, list((trust * lr).unbind()))
        torch._foreach_sub_(params, u)

    return run


REFUSED = (
    Invalid("fp32 squares", changed(STEP, "squares", lambda _: torch.ones(3, 2)), "squares is fp32, expected fp64"),
    Invalid(
        "fewer squares",
        changed(STEP, "squares", lambda _: torch.ones(2, 2, dtype=torch.float64)),
        r"squares has shape \(2, 2\), expected \(3, 2\)",
    ),
)
OPTIONS = (
    (FP32, {"maximize": True, "no_decay": True}),
    (FP32, {"uncorrected": True, "clip": True}),
    (FP32, {"unadapted": True}),
    (FP32, {"given": True}),
    (FP32, {"state": "int8", "amp": True, "mask": True}),
    (BF16, {"state": "int8", "stochastic": True, "ema": True, "mask": True}),
)

SPEC = register(
    STEP.spec(
        cases=step_cases.cases(STEP, OPTIONS, refused=REFUSED),
        make=step_cases.maker(STEP, numbers),
        cost=cost,
        baseline=baseline,
        impls=gpu_impls("lamb_step"),
    )
)


def lamb_step(
    params: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
    steps: Sequence[torch.Tensor],
    exp_avgs: Sequence[torch.Tensor],
    exp_avg_sqs: Sequence[torch.Tensor],
    scales: Sequence[torch.Tensor] = (),
    masters: Sequence[torch.Tensor] = (),
    emas: Sequence[torch.Tensor] = (),
    masks: Sequence[torch.Tensor] = (),
    *,
    lr: torch.Tensor,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-6,
    weight_decay: float = 0.0,
    bias_correction: bool = True,
    adapt: bool = True,
    trust_clip: bool = False,
    squares: torch.Tensor | None = None,
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
        params, grads, steps, exp_avgs, exp_avg_sqs, scales, masters, emas, masks, lr, beta1, beta2, eps, weight_decay,
        bias_correction, adapt, trust_clip, squares, maximize, ema_decay, max_grad_norm, grad_norm, grad_scale,
        found_inf, seed,
    )  # fmt: skip


_call = caller(SPEC)
