"""Adam and AdamW: torch.optim's, in one pass.

Method: Kingma and Ba 2015 (arXiv 1412.6980); amsgrad by Reddi, Kale and Kumar 2018 (arXiv 1904.09237); decoupled weight
decay by Loshchilov and Hutter 2019 (arXiv 1711.05101). The arithmetic is in :mod:`burnish.ops.adam_step`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from burnish.ops.adam_step import adam_step
from burnish.optim import options
from burnish.optim.batch import Batch, Columns
from burnish.optim.fused import FusedOptimizer
from burnish.optim.state import Moment

if TYPE_CHECKING:
    from typing_extensions import Unpack

_MOMENTS = Moment("exp_avg", torch.int8), Moment("exp_avg_sq", torch.uint8)
_GREATEST = Moment("max_exp_avg_sq", torch.uint8)


class Adam(FusedOptimizer):
    """torch.optim.Adam; ``weight_decay`` is added to the gradient.

    Args:
        params: parameters, pairs of names and parameters, or dicts of groups; fp32, bf16 or fp16.
        lr: a number, or a tensor of one element, which is read where it is.
        betas: two numbers, or two tensors of one element on the CPU, read at each step.
        eps, weight_decay, amsgrad, maximize, capturable, decoupled_weight_decay: as torch.optim.Adam.
        foreach, fused: accepted; every step is fused.
        differentiable: refused.
        extras: :class:`burnish.optim.options.Extras`.

    Raises:
        ValueError, TypeError, RuntimeError: torch.optim.Adam's where it has one, else naming the argument.
    """

    required = ("lr", "betas", "eps", "weight_decay", "amsgrad")
    fixed = ("decoupled_weight_decay",)
    optional = (_GREATEST,)

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        **extras: Unpack[options.Extras],
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
            "decoupled_weight_decay": decoupled_weight_decay,
        }
        super().__init__(params, defaults, extras)

    def moments(self, group: Mapping[str, Any]) -> tuple[Moment, ...]:
        return (*_MOMENTS, _GREATEST) if group["amsgrad"] else _MOMENTS

    def check_group(self, group: Mapping[str, Any]) -> None:
        super().check_group(group)
        options.check_not_negative(group, "eps", "epsilon value")
        options.check_not_negative(group, "weight_decay", "weight_decay value")
        options.check_betas(self._who, group)

    def update(self, batch: Batch, state: Columns, common: dict[str, Any]) -> None:
        group = batch.group
        beta1, beta2 = map(float, group["betas"])
        adam_step(
            batch.params,
            batch.grads,
            state["step"],
            state["exp_avg"],
            state["exp_avg_sq"],
            state.get("max_exp_avg_sq", []),
            **common,
            beta1=beta1,
            beta2=beta2,
            eps=float(group["eps"]),
            weight_decay=float(group["weight_decay"]),
            decoupled=group["decoupled_weight_decay"],
        )


class AdamW(Adam):
    """torch.optim.AdamW: :class:`Adam` whose ``weight_decay`` shrinks the parameter and not the gradient's moments."""

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        **extras: Unpack[options.Extras],
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            maximize=maximize,
            foreach=foreach,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            decoupled_weight_decay=True,
            **extras,
        )
