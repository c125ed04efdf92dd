"""lamb_squares: the sums of squares of parameters and of the updates that a step of LAMB would make.

    squares[i] = sum(p ** 2), sum(u ** 2)                  p and u as in :mod:`burnish.ops.lamb_step`

The arguments are :func:`burnish.ops.lamb_step`'s, of which nothing is changed. That step takes the sums itself; they
are for parameters that are shards of tensors: their sums, added over the shards, are the step's ``squares``. Sums are
of the elements that the mask keeps, and zeros where ``found_inf`` says that the step will change nothing.

squares  fp64 [parameters, 2]

Deterministic; the same bits at every number of threads and instruction set. No gradient.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from burnish import dispatch, step_cases
from burnish.arguments import map_tensors
from burnish.ops import lamb_step
from burnish.ops.lamb_step import common_numbers, cost_of_sums, square, update
from burnish.registry import register
from burnish.step_cases import BF16, FP32
from burnish.step_checks import check
from burnish.step_op import native_impl, triton_impl

__all__ = ["lamb_squares"]


def reference(given: Any) -> torch.Tensor:
    found = []

    def element(
        p: torch.Tensor, g: torch.Tensor, held: list[Any], t: float, lr: float, *own: Any, mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, list[Any]]:
        first, second = held
        u, _, _ = update(p, g, first, second, t, *own)
        found.append(torch.stack([square(p, mask), square(u, mask)]))
        return p, held

    step = replace(STEP, element=element).spec(CASES, make, cost_of_sums)
    step.reference(*map_tensors(torch.clone, tuple(vars(given).values())))
    return torch.stack(found) if found else torch.zeros(len(given.params), 2, dtype=torch.float64)


def fake(given: Any) -> torch.Tensor:
    check(STEP, given)
    empty: torch.Tensor = given.lr.new_empty((len(given.params), 2), dtype=torch.float64)
    return empty


STEP = replace(lamb_step.STEP, name="lamb_squares", numbers=lamb_step.NUMBERS, refuse=None)


def baseline(*args: Any) -> Callable[[], torch.Tensor]:
    """torch's foreach operations."""
    given = step_cases.as_torch(STEP, args)

    def run() -> torch.Tensor:
        t = float(given.steps[0]) + 1
        u = torch._foreach_lerp(given.exp_avgs, given.grads, 1 - given.beta1)
        spread = torch._foreach_mul(given.exp_avg_sqs, given.beta2)
        torch._foreach_addcmul_(spread, given.grads, given.grads, 1 - given.beta2)
        torch._foreach_sqrt_(spread)
        torch._foreach_div_(spread, (1 - given.beta2**t) ** 0.5)
        torch._foreach_add_(spread, given.eps)
        torch._foreach_div_(u, spread)
        torch._foreach_div_(u, 1 - given.beta1**t)
        torch._foreach_add_(u, given.params, alpha=given.weight_decay)
        norms = [torch.stack(torch._foreach_norm(tensors)) for tensors in (given.params, u)]
        return torch.stack(norms, 1).double().square()

    return run


OPTIONS = (
    (FP32, {"maximize": True, "no_decay": True}),
    (FP32, {"uncorrected": True}),
    (BF16, {"state": "int8", "mask": True, "amp": True}),
)

_ALL = step_cases.cases(STEP, OPTIONS)
# the float64 of a parameter has no low byte; lamb_step's cases take sums of such
CASES = replace(_ALL, test=tuple(case for case in _ALL.test if case.options.get("master") != "split"))
make = step_cases.maker(STEP, common_numbers)

SPEC = register(
    replace(
        STEP.spec(CASES, make, cost_of_sums, baseline, (native_impl("lamb_squares"), triton_impl("lamb_squares"))),
        schema=re.sub(r"\(\w!\)", "", STEP.schema).replace("-> ()", "-> Tensor"),
        reference=STEP.function(reference),
        fake=STEP.function(fake),
    )
)


def lamb_squares(
    params: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
    steps: Sequence[torch.Tensor],
    exp_avgs: Sequence[torch.Tensor],
    exp_avg_sqs: Sequence[torch.Tensor],
    scales: Sequence[torch.Tensor] = (),
    masters: Sequence[torch.Tensor] = (),
    masks: Sequence[torch.Tensor] = (),
    *,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-6,
    weight_decay: float = 0.0,
    bias_correction: bool = True,
    maximize: bool = False,
    max_grad_norm: float = 0.0,
    grad_norm: torch.Tensor | None = None,
    grad_scale: torch.Tensor | None = None,
    found_inf: torch.Tensor | None = None,
) -> torch.Tensor:
    """fp64 ``[parameters, 2]`` of what :func:`burnish.ops.lamb_step` would be given; see the module.

    Raises RuntimeError for a dtype, shape, layout, length or number outside of what :mod:`burnish.step_op` says.
    """
    lists = [list(one) for one in (params, grads, steps, exp_avgs, exp_avg_sqs, scales, masters)]
    args = (
        *lists, [], list(masks), torch.zeros((), device=params[0].device), beta1, beta2, eps, weight_decay,
        bias_correction, maximize, 0.0, max_grad_norm, grad_norm, grad_scale, found_inf, None,
    )  # fmt: skip
    if dispatch.overrides:
        return dispatch.call(SPEC, args, needs_grad=False)
    return _op(*args)


_op = SPEC.entry
