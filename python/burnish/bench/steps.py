"""The arguments of ``adam_step`` as optimizers of other libraries want them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from burnish import moments
from burnish.arguments import Args
from burnish.ops.adam_step import STEP
from burnish.ops.grad_norm import grad_norm
from burnish.registry import Case


def named(args: Args) -> dict[str, Any]:
    """The arguments by name."""
    return dict(vars(STEP.given(args)))


def optimizer(make: Callable[..., torch.optim.Optimizer], args: Args) -> tuple[Any, list[torch.nn.Parameter]]:
    """An optimizer by torch's keywords whose parameters, which are returned too, have the memory of the op's, and the
    op's gradients; it has no state yet."""
    given = named(args)
    with torch.inference_mode(False):
        params = [torch.nn.Parameter(param) for param in given["params"]]
        for param, grad in zip(params, given["grads"], strict=True):
            param.grad = grad
        made = make(
            params,
            lr=float(given["lr"]),
            betas=(given["beta1"], given["beta2"]),
            eps=given["eps"],
            weight_decay=given["weight_decay"],
        )
    return made, params


def states(args: Args) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """Of each parameter the number of steps so far and both moments: the op's own tensors, or what its codes stand
    for, in fp32."""
    given = named(args)
    columns = [given["steps"], given["exp_avgs"], given["exp_avg_sqs"], given["scales"] or [None] * len(args[0])]
    for step, first, second, scales in zip(*columns, strict=True):
        if scales is not None:
            first, second = (
                moments.decode(codes.reshape(-1), scale).view(codes.shape)
                for codes, scale in zip((first, second), scales, strict=True)
            )
        yield int(step), first, second


def stepping(made: torch.optim.Optimizer) -> Callable[[], None]:
    """The optimizer's step, as training calls it."""

    def run() -> None:
        with torch.inference_mode(False):
            made.step()

    return run


def clipped_to(args: Args) -> tuple[float, float]:
    """The norm to clip the gradients to, and the coefficient that this gives, which is the case's."""
    given = named(args)
    coefficient = min(1.0, given["max_grad_norm"] / (float(given["grad_norm"]) + 1e-6))
    norm, _ = grad_norm(given["grads"], given["grad_scale"])
    return coefficient * (float(norm) + 1e-6), coefficient


def amp_only(op: str, case: Case) -> str | None:
    """Why a peer does not take a case that it takes for being scaled and clipped alone."""
    return None if op == "adam_step" and case.options == {"amp": True} else "only a scaled and clipped step is timed"


def coded_only(op: str, case: Case) -> str | None:
    """Why a peer with 8-bit state does not take a case; small tensors of any case have no codes there."""
    if op != "adam_step":
        return "only a step of Adam is timed here"
    if case.options == {"state": "int8"} or (case.values == "thousand" and not case.options):
        return None
    return "it has no master weights" if "master" in case.options else "its state is 8-bit"
