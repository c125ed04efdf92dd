"""SGD: torch.optim's, in one pass. The arithmetic and its sources are in :mod:`burnish.ops.sgd_step`.

The state of a parameter also has the ``step``, which torch.optim.SGD does not keep and ignores. A momentum buffer is
the first gradient that it meets, undamped, for which the count is there: where there is a buffer it is of the buffer's
steps. A buffer that torch.optim saved is of one at least. Ours may be of none, of zeros, where GradScaler let through
no step since it was made; torch.optim, which takes it for one, damps the first gradient.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from burnish.ops.sgd_step import sgd_step
from burnish.optim import options
from burnish.optim.batch import Batch, Columns
from burnish.optim.fused import FusedOptimizer
from burnish.optim.state import Moment

if TYPE_CHECKING:
    from typing_extensions import Unpack

_MOMENTUM = Moment("momentum_buffer", torch.int8)


class SGD(FusedOptimizer):
    """torch.optim.SGD.

    Args:
        params: parameters, pairs of names and parameters, or dicts of groups; fp32, bf16 or fp16.
        lr: a number, or a tensor of one element, which is read where it is.
        momentum, dampening, weight_decay, nesterov, maximize: as torch.optim.SGD.
        foreach, fused: accepted; every step is fused.
        differentiable: refused.
        extras: :class:`burnish.optim.options.Extras`.

    Raises:
        ValueError, TypeError, RuntimeError: torch.optim.SGD's where it has one, else naming the argument.
    """

    required = ("lr", "momentum", "dampening", "weight_decay", "nesterov")
    optional = (_MOMENTUM,)

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        **extras: Unpack[options.Extras],
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
            "foreach": foreach,
            "differentiable": differentiable,
            "fused": fused,
        }
        super().__init__(params, defaults, extras)

    def moments(self, group: Mapping[str, Any]) -> tuple[Moment, ...]:
        return (_MOMENTUM,) if group["momentum"] != 0 else ()

    def check_group(self, group: Mapping[str, Any]) -> None:
        super().check_group(group)
        options.check_not_negative(group, "momentum", "momentum value")
        options.check_not_negative(group, "weight_decay", "weight_decay value")
        options.check_finite(group, "dampening", "dampening value")
        if group["nesterov"] and (group["momentum"] <= 0 or group["dampening"] != 0):
            raise ValueError("Nesterov momentum requires a momentum and zero dampening")

    def adopted(self, values: Mapping[str, Any]) -> Mapping[str, Any]:
        if values.get("momentum_buffer") is None:
            return {}
        return {"step": 1.0, **values}

    def _columns(self, batch: Batch) -> Columns:
        states = [self.state[parameter] for parameter in batch.origin]
        if batch.group["momentum"] != 0:
            for state in states:
                if "momentum_buffer" not in state:
                    state.pop("step", None)
            return super()._columns(batch)
        columns = super()._columns(batch)
        steps = zip(columns["step"], states, strict=True)
        columns["step"] = [step.clone() if "momentum_buffer" in state else step for step, state in steps]
        return columns

    def update(self, batch: Batch, state: Columns, common: dict[str, Any]) -> None:
        group = batch.group
        sgd_step(
            batch.params,
            batch.grads,
            state["step"],
            state.get("momentum_buffer", []),
            **common,
            momentum=float(group["momentum"]),
            dampening=float(group["dampening"]),
            weight_decay=float(group["weight_decay"]),
            nesterov=group["nesterov"],
        )
