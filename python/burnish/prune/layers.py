"""The layers that can be pruned, why others cannot, and their weights as matrices ``[N, K]``.

Linear layers, transformers' Conv1D and convolutions of one to three dimensions; not what is inside a layer that
burnish made, which reads its parts' weights in its own way.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.utils import parametrize

from burnish import kinds
from burnish.nn.int8_linear import is_conv1d
from burnish.registry import dtype_name

_CLASSES = (torch.nn.Linear, torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)


def candidates(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """Each layer that pruning speaks of, under its first fqn."""
    inside = {
        id(part)
        for module in model.modules()
        if kinds.made_by(module)
        for part in module.modules()
        if part is not module
    }
    return {
        fqn: module
        for fqn, module in model.named_modules()
        if (isinstance(module, _CLASSES) or is_conv1d(module)) and id(module) not in inside
    }


def absence(model: torch.nn.Module) -> str:
    """Why a model has no candidates, as a clause."""
    for fqn, module in model.named_modules():
        if kinds.made_by(module):
            return f"the model's layers are swapped, {fqn!r} to {type(module).__name__}: prune before swapping"
    return "the model has no linear or convolution layer"


def matrix(module: torch.nn.Module, weight: Tensor) -> Tensor:
    """A tensor of the layer's weight's shape as ``[N, K]``."""
    return weight.t() if is_conv1d(module) else weight.flatten(1)


def unmatrix(module: torch.nn.Module, rows: Tensor, shape: torch.Size) -> Tensor:
    """The way back from :func:`matrix`."""
    return (rows.t() if is_conv1d(module) else rows).reshape(shape)


def owners(model: torch.nn.Module) -> dict[int, list[str]]:
    """The fqns of the parameters that each parameter, by id, is."""
    found: dict[int, list[str]] = {}
    for module_fqn, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                found.setdefault(id(parameter), []).append(f"{module_fqn}.{name}" if module_fqn else name)
    return found


def objection(module: torch.nn.Module, owned: dict[int, list[str]]) -> str | None:
    """Why a candidate cannot be given a mask, as a clause; None if it can."""
    if parametrize.is_parametrized(module, "weight"):
        return "its weight is parametrized: remove the parametrization first"
    weight = module._parameters.get("weight")
    if weight is None:
        return "its weight is computed by a hook (weight or spectral norm): remove that first"
    if torch.nn.parameter.is_lazy(weight):
        return "it is lazy and has no shape yet: run one batch first"
    if type(weight) is not torch.nn.Parameter:
        return f"its weight is a {type(weight).__name__}, not a plain parameter: prune before sharding or wrapping"
    if weight.is_meta:
        return "it is on the meta device and has no values"
    if not weight.is_floating_point() or weight.layout != torch.strided:
        return f"its weight is {dtype_name(weight.dtype)}, {weight.layout}, expected dense floating-point values"
    if not weight.numel():
        return f"its weight has no elements: shape {tuple(weight.shape)}"
    if len(owned[id(weight)]) > 1:
        return f"its weight is shared by {' and '.join(map(repr, owned[id(weight)]))}, and a mask would be on one only"
    return None


def check_finite(who: str, fqn: str, weight: Tensor) -> None:
    """Raise ValueError for a weight with a NaN or an infinity."""
    if not bool(weight.isfinite().all()):
        raise ValueError(f"{who}: layer {fqn!r} has NaN or infinite weights, expected finite values")
