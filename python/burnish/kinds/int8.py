"""Int8: linear layers of any make become :class:`burnish.nn.Int8Linear`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from burnish.configs import Config, Int8
from burnish.kinds import linear
from burnish.kinds.kind import Kind, Request
from burnish.nn.int8_linear import Int8Linear, float_weight
from burnish.ops.int8_linear import MAX_K

NOUN = "int8"


def objection(module: torch.nn.Module, parents: list[torch.nn.Module]) -> str | None:
    """Why a linear layer cannot become an int8 one; None if it can."""
    reason = linear.objection(module, parents, NOUN)
    if reason is not None:
        return reason
    weight = float_weight(module)
    assert weight is not None
    if weight.shape[1] > MAX_K:
        return f"it has {weight.shape[1]} inputs; int32 sums are exact up to {MAX_K}"
    return None


def convert(request: Request) -> Int8Linear:
    assert isinstance(request.config, Int8)
    return Int8Linear.from_float(request.module, request.config, activation=request.activation)


def form(module: torch.nn.Module) -> dict[str, Any]:
    assert isinstance(module, Int8Linear)
    return {
        "in_features": module.in_features,
        "out_features": module.out_features,
        "bias": module.bias is not None,
        "activation": module.activation,
    }


def rebuild(found: torch.nn.Module, config: Config, form: Mapping[str, Any]) -> Int8Linear:
    assert isinstance(config, Int8)
    weight = linear.check_form(found, form)
    made = Int8Linear(device="meta", dtype=weight.dtype, **form)
    made.bias = found.bias  # type: ignore[assignment]
    made.config = config
    return made


INT8 = Kind(
    config=Int8,
    noun=NOUN,
    made=(Int8Linear,),
    candidate=linear.is_candidate,
    objection=objection,
    convert=convert,
    weights=("weight_packed", "weight_scale"),
    races=lambda module: True,
    form=form,
    rebuild=rebuild,
)
