"""LAMB: Adam's update, in every tensor as long as the tensor's own norm says.

Method: You et al. 2020 (arXiv 1904.00962), algorithm 2. The arithmetic is in :mod:`burnish.ops.lamb_step`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from burnish.ops.lamb_squares import lamb_squares
from burnish.ops.lamb_step import lamb_step
from burnish.optim import norm, options, tensors
from burnish.optim.batch import Batch, Columns
from burnish.optim.fused import FusedOptimizer
from burnish.optim.state import Moment

if TYPE_CHECKING:
    from typing_extensions import Unpack


class LAMB(FusedOptimizer):
    """You et al.'s algorithm 2, with the keywords that torch.optim's optimizers have.

    A tensor's norms are of all of it, also where it is a DTensor in shards: one more reduction a step.

    Args:
        params: parameters, pairs of names and parameters, or dicts of groups; fp32, bf16 or fp16.
        lr: a number, or a tensor of one element, which is read where it is.
        betas: two numbers, or two tensors of one element on the CPU, read at each step.
        eps: added to the root of the second moment.
        weight_decay: joins the update, and with it its norm.
        bias_correction: of the moments, as Adam's.
        always_adapt: as the paper has it; False leaves groups without ``weight_decay``, which usually hold biases and
            scales, at Adam's step, as NVIDIA's and timm's LAMB do by default.
        trust_clip: no ratio of norms above 1 (You et al.'s bounded phi in its common form, LAMBC).
        maximize, capturable: as torch.optim.AdamW.
        foreach, fused: accepted; every step is fused.
        differentiable: refused.
        extras: :class:`burnish.optim.options.Extras`.

    Raises:
        ValueError, TypeError, RuntimeError: naming the argument.
    """

    required = ("lr", "betas", "eps", "weight_decay", "bias_correction", "always_adapt", "trust_clip")

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 1e-2,
        *,
        bias_correction: bool = True,
        always_adapt: bool = True,
        trust_clip: bool = False,
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
            "eps": eps,
            "weight_decay": weight_decay,
            "bias_correction": bias_correction,
            "always_adapt": always_adapt,
            "trust_clip": trust_clip,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
        }
        super().__init__(params, defaults, extras)

    def moments(self, group: Mapping[str, Any]) -> tuple[Moment, ...]:
        return (Moment("exp_avg", torch.int8), Moment("exp_avg_sq", torch.uint8))

    def check_group(self, group: Mapping[str, Any]) -> None:
        super().check_group(group)
        options.check_not_negative(group, "eps", "epsilon value")
        options.check_not_negative(group, "weight_decay", "weight_decay value")
        options.check_betas(self._who, group)

    def update(self, batch: Batch, state: Columns, common: dict[str, Any]) -> None:
        group = batch.group
        beta1, beta2 = map(float, group["betas"])
        numbers: dict[str, Any] = {
            "beta1": beta1,
            "beta2": beta2,
            "eps": float(group["eps"]),
            "weight_decay": float(group["weight_decay"]),
            "bias_correction": group["bias_correction"],
        }
        adapt = group["always_adapt"] or group["weight_decay"] != 0
        first, squares = batch.origin[0], None
        if adapt and tensors.is_sharded(first):
            given = numbers | {name: common[name] for name in _OF_SQUARES}
            parts = lamb_squares(
                batch.params, batch.grads, state["step"], state["exp_avg"], state["exp_avg_sq"], **given
            )
            squares = norm.reduced(parts, (first.device_mesh, tensors.shard_dims(first)))
        given = numbers | common | {"adapt": adapt, "trust_clip": group["trust_clip"], "squares": squares}
        lamb_step(batch.params, batch.grads, state["step"], state["exp_avg"], state["exp_avg_sq"], **given)


#: what the sums depend on, of what every step has
_OF_SQUARES = ("scales", "masters", "masks", "maximize", "max_grad_norm", "grad_norm", "grad_scale", "found_inf")
