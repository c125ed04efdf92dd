"""Lion: one moment, and steps of one size in every element.

Method: Chen et al. 2023 (arXiv 2302.06675). The arithmetic is in :mod:`burnish.ops.lion_step`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from burnish.ops.lion_step import lion_step
from burnish.optim import options
from burnish.optim.batch import Batch, Columns
from burnish.optim.fused import FusedOptimizer
from burnish.optim.state import Moment

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Lion(FusedOptimizer):
    """Chen et al.'s algorithm 2, with the keywords that torch.optim's optimizers have.

    Args:
        params: parameters, pairs of names and parameters, or dicts of groups; fp32, bf16 or fp16.
        lr: a number, or a tensor of one element, which is read where it is; a third to a tenth of AdamW's.
        betas: two numbers, or two tensors of one element on the CPU, read at each step: the weight of the moment in
            the update, and in the next moment.
        weight_decay: decoupled; three to ten times AdamW's, as it is multiplied by ``lr``.
        maximize, capturable: as torch.optim.AdamW.
        foreach, fused: accepted; every step is fused.
        differentiable: refused.
        extras: :class:`burnish.optim.options.Extras`.

    Raises:
        ValueError, TypeError, RuntimeError: naming the argument.
    """

    required = ("lr", "betas", "weight_decay", "burnish_version")

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-4,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.99),
        weight_decay: float = 0,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        **extras: Unpack[options.Extras],
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
        }
        super().__init__(params, defaults, extras)

    def moments(self, group: Mapping[str, Any]) -> tuple[Moment, ...]:
        return (Moment("exp_avg", torch.int8),)

    def check_group(self, group: Mapping[str, Any]) -> None:
        super().check_group(group)
        options.check_not_negative(group, "weight_decay", "weight_decay value")
        options.check_betas(self._who, group)

    def update(self, batch: Batch, state: Columns, common: dict[str, Any]) -> None:
        group = batch.group
        beta1, beta2 = map(float, group["betas"])
        lion_step(
            batch.params,
            batch.grads,
            state["step"],
            state["exp_avg"],
            **common,
            beta1=beta1,
            beta2=beta2,
            weight_decay=float(group["weight_decay"]),
        )
