"""Adagrad: torch.optim's, in one pass. The arithmetic and its sources are in :mod:`burnish.ops.adagrad_step`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from burnish.ops.adagrad_step import adagrad_step
from burnish.optim import options
from burnish.optim.batch import Batch, Columns
from burnish.optim.fused import FusedOptimizer
from burnish.optim.state import Moment

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Adagrad(FusedOptimizer):
    """torch.optim.Adagrad; the state of a parameter is made at its first step.

    Args:
        params: parameters, pairs of names and parameters, or dicts of groups; fp32, bf16 or fp16.
        lr: a number, or a tensor of one element, which is read where it is.
        lr_decay, weight_decay, initial_accumulator_value, eps, maximize: as torch.optim.Adagrad.
        foreach, fused: accepted; every step is fused.
        differentiable: refused.
        extras: :class:`burnish.optim.options.Extras`.

    Raises:
        ValueError, TypeError, RuntimeError: torch.optim.Adagrad's where it has one, else naming the argument.
    """

    required = ("lr", "lr_decay", "eps", "weight_decay", "initial_accumulator_value")

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-2,
        lr_decay: float = 0,
        weight_decay: float = 0,
        initial_accumulator_value: float = 0,
        eps: float = 1e-10,
        foreach: bool | None = None,
        *,
        maximize: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        **extras: Unpack[options.Extras],
    ) -> None:
        defaults = {
            "lr": lr,
            "lr_decay": lr_decay,
            "eps": eps,
            "weight_decay": weight_decay,
            "initial_accumulator_value": initial_accumulator_value,
            "foreach": foreach,
            "maximize": maximize,
            "differentiable": differentiable,
            "fused": fused,
        }
        super().__init__(params, defaults, extras)

    def moments(self, group: Mapping[str, Any]) -> tuple[Moment, ...]:
        return (Moment("sum", torch.uint8, float(group["initial_accumulator_value"])),)

    def check_group(self, group: Mapping[str, Any]) -> None:
        super().check_group(group)
        options.check_not_negative(group, "lr_decay", "lr_decay value")
        options.check_not_negative(group, "weight_decay", "weight_decay value")
        options.check_not_negative(group, "initial_accumulator_value", "initial_accumulator_value value")
        options.check_not_negative(group, "eps", "epsilon value")

    def update(self, batch: Batch, state: Columns, common: dict[str, Any]) -> None:
        group = batch.group
        adagrad_step(
            batch.params,
            batch.grads,
            state["step"],
            state["sum"],
            **common,
            lr_decay=float(group["lr_decay"]),
            weight_decay=float(group["weight_decay"]),
            eps=float(group["eps"]),
        )
