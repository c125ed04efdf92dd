"""RMSprop: torch.optim's, in one pass.

Method: Hinton, Srivastava and Swersky 2012 (lecture 6e of Neural Networks for Machine Learning); centered by Graves
2013 (arXiv 1308.0850). The arithmetic is in :mod:`burnish.ops.rmsprop_step`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from burnish.ops.rmsprop_step import rmsprop_step
from burnish.optim import options
from burnish.optim.batch import Batch, Columns
from burnish.optim.fused import FusedOptimizer
from burnish.optim.state import Moment

if TYPE_CHECKING:
    from typing_extensions import Unpack

_AVERAGE, _MOMENTUM = Moment("grad_avg", torch.int8), Moment("momentum_buffer", torch.int8)


class RMSprop(FusedOptimizer):
    """torch.optim.RMSprop.

    Args:
        params: parameters, pairs of names and parameters, or dicts of groups; fp32, bf16 or fp16.
        lr: a number, or a tensor of one element, which is read where it is.
        alpha: below 1, which torch.optim does not ask for.
        eps, weight_decay, momentum, centered, capturable, maximize: as torch.optim.RMSprop. Where rounding leaves the
            mean square below the squared mean, whose difference ``centered`` takes the root of, it counts as 0.
            ``centered`` excludes a ``state_dtype`` of "int8".
        foreach, fused: accepted; every step is fused.
        differentiable: refused.
        extras: :class:`burnish.optim.options.Extras`.

    Raises:
        ValueError, TypeError, RuntimeError: torch.optim.RMSprop's where it has one, else naming the argument.
    """

    required = ("lr", "alpha", "eps", "weight_decay", "momentum", "centered")
    optional = (_AVERAGE, _MOMENTUM)

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum: float = 0,
        centered: bool = False,
        capturable: bool = False,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        *,
        fused: bool | None = None,
        **extras: Unpack[options.Extras],
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "alpha": alpha,
            "eps": eps,
            "centered": centered,
            "weight_decay": weight_decay,
            "capturable": capturable,
            "foreach": foreach,
            "maximize": maximize,
            "differentiable": differentiable,
            "fused": fused,
        }
        super().__init__(params, defaults, extras)

    def moments(self, group: Mapping[str, Any]) -> tuple[Moment, ...]:
        found = [Moment("square_avg", torch.uint8)]
        if group["centered"]:
            found.append(_AVERAGE)
        if group["momentum"] > 0:
            found.append(_MOMENTUM)
        return tuple(found)

    def check_group(self, group: Mapping[str, Any]) -> None:
        super().check_group(group)
        options.check_not_negative(group, "eps", "epsilon value")
        options.check_not_negative(group, "momentum", "momentum value")
        options.check_not_negative(group, "weight_decay", "weight_decay value")
        options.check_not_negative(group, "alpha", "alpha value")
        if group["alpha"] >= 1.0:
            raise ValueError(f"Invalid alpha value: {group['alpha']}")
        if group["centered"] and group["state_dtype"] == "int8":
            raise ValueError(
                f"{self._who}: state_dtype is 'int8', expected 'fp32' or 'bf16' with centered, since codes of the two "
                "moments lose their difference"
            )

    def update(self, batch: Batch, state: Columns, common: dict[str, Any]) -> None:
        group = batch.group
        rmsprop_step(
            batch.params,
            batch.grads,
            state["step"],
            state["square_avg"],
            state.get("grad_avg", []),
            state.get("momentum_buffer", []),
            **common,
            alpha=float(group["alpha"]),
            eps=float(group["eps"]),
            weight_decay=float(group["weight_decay"]),
            momentum=float(group["momentum"]),
        )
