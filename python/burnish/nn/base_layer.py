"""The layers that a LoRA adapter can sit on, and the frozen tensors that each gives to the op.

=========================  ==================  ==========================================================
layer                      format              weight, weight_scale, bias
=========================  ==================  ==========================================================
nn.Linear                  float               ``weight`` [N, K], None, ``bias``
transformers' Conv1D       float               ``weight`` [K, N] seen as [N, K], None, ``bias``
Int8Linear                 int8                ``weight_packed``, ``weight_scale``, ``bias``
=========================  ==================  ==========================================================

The formats are those of :mod:`burnish.bases`. To add one: a branch in :func:`operands` and in :func:`refusal`.
"""

from __future__ import annotations

import copy

import torch
from torch.nn.utils import parametrize

from burnish.checks import FLOATING
from burnish.nn.int8_linear import Int8Linear, float_weight
from burnish.registry import dtype_name

Operands = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]


def operands(base: torch.nn.Module) -> Operands:
    """(weight, weight_scale, bias) of a layer that :func:`refusal` lets pass, for :func:`burnish.ops.lora_linear`."""
    bias = base._parameters["bias"]
    if isinstance(base, Int8Linear):
        return base._buffers["weight_packed"], base._buffers["weight_scale"], bias  # type: ignore[return-value]
    weight = base._parameters["weight"]
    assert weight is not None
    return (weight if isinstance(base, torch.nn.Linear) else weight.t()), None, bias


def refusal(base: torch.nn.Module) -> str | None:
    """What keeps an adapter from sitting on this layer, as the rest of a sentence; None if nothing does."""
    if isinstance(base, Int8Linear):
        fused = base.activation
        return None if fused == "none" else f"an Int8Linear that computes {fused}, expected one without activation"
    weight = float_weight(base)
    if weight is None:
        return f"a {type(base).__name__}, expected nn.Linear, transformers' Conv1D or Int8Linear"
    if parametrize.is_parametrized(base) or "weight" not in base._parameters or "bias" not in base._parameters:
        return "a layer whose weight or bias is computed, expected plain parameters: remove the parametrization first"
    if weight.dtype not in FLOATING:
        return f"a layer with a weight of {dtype_name(weight.dtype)}, expected fp32, bf16 or fp16"
    return None


def sizes(base: torch.nn.Module) -> tuple[int, int]:
    """(in_features, out_features)."""
    if isinstance(base, Int8Linear):
        return base.in_features, base.out_features
    outputs, inputs = operands(base)[0].shape
    return inputs, outputs


def dtype_of(base: torch.nn.Module) -> torch.dtype:
    """The dtype that the layer computes in."""
    return base.dtype if isinstance(base, Int8Linear) else operands(base)[0].dtype


def is_sharded(base: torch.nn.Module) -> bool:
    """Whether FSDP2 or tensor parallelism has cut the weight up."""
    return type(operands(base)[0]).__name__ == "DTensor"


def with_weight(base: torch.nn.Module, weight: torch.Tensor) -> torch.nn.Module:
    """A copy of a float layer that holds another weight, frozen, and shares all else."""
    twin = copy.copy(base)
    vars(twin)["_parameters"] = {**base._parameters, "weight": torch.nn.Parameter(weight, requires_grad=False)}
    return twin
