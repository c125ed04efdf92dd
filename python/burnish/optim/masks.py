"""Masks that hold elements of parameters at zero through the steps: whose they are, and what they may be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from burnish.optim import tensors
from burnish.registry import dtype_name

#: what a layer's masked weight is called: as it is, under prune's masks, under torch.nn.utils.prune's
_OF_LAYER = ("weight", "parametrizations.weight.original", "weight_orig")


class Masks:
    """The mask of each parameter that has one, in ``of``.

    Raises:
        TypeError: not a mapping from parameters or names to tensors.
        ValueError: a key that is no parameter, or a mask that is not bool, of another shape, or on another device.
    """

    def __init__(self, who: str, groups: Sequence[Mapping[str, Any]], masks: Mapping[Any, Tensor] | None) -> None:
        if masks is not None and not isinstance(masks, Mapping):
            raise TypeError(f"{who}: masks is a {type(masks).__name__}, expected a mapping from parameters or names")
        parameters = {parameter for group in groups for parameter in group["params"]}
        by_name = {
            name: parameter
            for group in groups
            for name, parameter in zip(group.get("param_names", ()), group["params"], strict=False)
        }
        self.of: dict[Tensor, Tensor] = {}
        for key, mask in (masks or {}).items():
            named = isinstance(key, str)
            parameter = _named(key, by_name) if named else key if _among(key, parameters) else None
            label = f"masks[{key!r}]" if named else "a key of masks"
            if parameter is None:
                raise ValueError(f"{who}: {label} is no parameter of this optimizer{_hint(named, by_name)}")
            reason = _objection(parameter, mask)
            if reason:
                raise ValueError(f"{who}: {label} {reason}")
            if parameter in self.of:
                raise ValueError(f"{who}: {label} is a second mask of one parameter")
            self.of[parameter] = _placed(mask, parameter)

    def objection(self, parameter: Tensor) -> str | None:
        """Why the mask of ``parameter`` is none, in words: both may have changed since they were given."""
        reason = _objection(parameter, self.of[parameter]) if parameter in self.of else None
        return reason and f"has a mask that {reason}"

    def local(self, parameter: Tensor) -> Tensor:
        """The mask of what this process holds of ``parameter``, in the order of its elements."""
        return tensors.in_order_of(tensors.local(parameter), tensors.local(self.of[parameter]))


def _among(key: Any, parameters: set[Tensor]) -> bool:
    return isinstance(key, Tensor) and key in parameters


def _named(key: str, by_name: Mapping[str, Tensor]) -> Tensor | None:
    prefix = f"{key}." if key else ""
    return next((by_name[name] for name in (key, *(prefix + end for end in _OF_LAYER)) if name in by_name), None)


def _hint(named: bool, by_name: Mapping[str, Tensor]) -> str:
    return "; pass its parameters by name, as model.named_parameters() gives them" if named and not by_name else ""


def _objection(parameter: Tensor, mask: Any) -> str | None:
    if not isinstance(mask, Tensor):
        return f"is a {type(mask).__name__}, expected a bool tensor"
    if mask.dtype is not torch.bool:
        return f"is {dtype_name(mask.dtype)}, expected bool"
    if mask.shape != parameter.shape:
        return f"has the shape {tuple(mask.shape)}, expected {tuple(parameter.shape)}"
    if mask.device != parameter.device:
        return f"is on {mask.device}, expected {parameter.device}"
    return None


def _placed(mask: Tensor, parameter: Any) -> Tensor:
    """``mask`` cut as its parameter is; every process has the whole mask, so nothing is sent."""
    if not tensors.is_sharded(parameter) or tensors.is_sharded(mask):
        return mask
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(mask, parameter.device_mesh, parameter.placements, src_data_rank=None)
