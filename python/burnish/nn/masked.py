"""Float layers whose weight may lie under a mask, of :mod:`burnish.prune` or of ``torch.nn.utils.prune``."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod

from burnish.nn.int8_linear import is_conv1d


def mask_of(module: torch.nn.Module) -> Tensor | None:
    """The mask on a layer's weight, bool, in its shape; None where there is none."""
    from burnish.prune.masking import mask_of as found  # which imports the layers that pruning leaves alone

    return found(module)


def weight_of(module: torch.nn.Module) -> Tensor:
    """The parameter of the weight: beneath the mask, where it has one."""
    from burnish.prune.masking import parameter_of

    return parameter_of(module)


def values_of(module: torch.nn.Module) -> tuple[Tensor, Tensor | None]:
    """The weight ``[N, K]`` with exact zeros where it is masked, and the mask as a matrix; a convolution's K is input
    channels x kernel."""
    weight, mask = weight_of(module).detach(), mask_of(module)
    masked = weight if mask is None else torch.where(mask, weight, 0)
    return _matrix(module, masked), None if mask is None else _matrix(module, mask)


def _matrix(module: torch.nn.Module, tensor: Tensor) -> Tensor:
    return tensor.t() if is_conv1d(module) else tensor.flatten(1)


def plain(module: Any, *, zeros: bool = False) -> Any:
    """What ``module`` would be without the mask on its weight, a layer that shares all else with it; itself where it
    has none. With ``zeros``, the weight is a new parameter that has them where the mask does."""
    if mask_of(module) is None:
        return module
    weight = weight_of(module)
    if zeros:
        weight = Parameter(torch.where(mask_of(module), weight.detach(), 0), weight.requires_grad)  # type: ignore[arg-type]
    cls: Any = type(module)
    state = dict(vars(module))
    modules = dict(module._modules)
    if parametrize.is_parametrized(module, "weight"):
        chains = module.parametrizations
        if list(chains) == ["weight"] and len(chains["weight"]) == 1:  # others stay, for whoever looks
            cls = cls.__mro__[1]  # torch derived the class of a parametrized module from its own
            del modules["parametrizations"]
    state.pop("weight", None)  # what torch.nn.utils.prune computed last
    twin = cls.__new__(cls)
    vars(twin).update(
        state,
        _modules=modules,
        _parameters={"weight": weight, **{n: p for n, p in module._parameters.items() if n != "weight_orig"}},
        _buffers={name: buffer for name, buffer in module._buffers.items() if name != "weight_mask"},
        _forward_pre_hooks=OrderedDict(
            (key, hook) for key, hook in module._forward_pre_hooks.items() if not _masks_weight(hook)
        ),
    )
    return twin


def _masks_weight(hook: Any) -> bool:
    return isinstance(hook, BasePruningMethod) and hook._tensor_name == "weight"
