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


def same_mask(module: torch.nn.Module, other: torch.nn.Module) -> bool:
    """Whether layers that share a weight keep the same of it; without a mask, all."""
    mine, theirs = mask_of(module), mask_of(other)
    if mine is None or theirs is None:
        return mine is theirs
    return torch.equal(mine, theirs)


def _matrix(module: torch.nn.Module, tensor: Tensor) -> Tensor:
    return tensor.t() if is_conv1d(module) else tensor.flatten(1)


def refusal(module: Any) -> str | None:
    """What makes the weight or the bias, beside one mask on the weight, as a clause; None if nothing does."""
    if parametrize.is_parametrized(module) and not _has_mask_alone(module):
        return "it has another parametrization beside a mask on its weight: remove that first"
    if mask_of(module) is None and "weight" not in module._parameters:
        return "its weight is computed by a hook (weight or spectral norm): remove that first"
    if "bias" not in module._parameters:
        return "its bias has a mask: call torch.nn.utils.prune.remove first"
    return None


def _has_mask_alone(module: Any) -> bool:
    """Whether the only parametrization of a parametrized module is a mask on its weight."""
    chains = module.parametrizations
    return list(chains) == ["weight"] and len(chains["weight"]) == 1 and mask_of(module) is not None


def plain(module: Any, *, zeros: bool = False) -> Any:
    """What ``module`` would be without the mask on its weight, a layer that shares all else with it but what
    ``module.compile()`` made of it; itself where it has none. With ``zeros``, the weight is a new parameter that has
    them where the mask does."""
    mask = mask_of(module)
    if mask is None:
        return module
    weight = weight_of(module)
    if zeros:
        weight = Parameter(torch.where(mask, weight.detach(), 0), weight.requires_grad)
    cls: Any = type(module)
    state, modules, pre_hooks = dict(vars(module)), dict(module._modules), module._forward_pre_hooks
    if parametrize.is_parametrized(module) and _has_mask_alone(module):  # others stay, for whoever looks
        cls = cls.__mro__[1]  # torch derived the class of a parametrized module from its own
        del modules["parametrizations"]
    if any(map(_masks_weight, pre_hooks.values())):
        pre_hooks = OrderedDict((key, hook) for key, hook in pre_hooks.items() if not _masks_weight(hook))
        state.pop("weight", None)  # what the hook computed last
    state.pop("_compiled_call_impl", None)
    twin = cls.__new__(cls)
    vars(twin).update(
        state,
        _modules=modules,
        _parameters={"weight": weight, **{n: p for n, p in module._parameters.items() if n != "weight_orig"}},
        _buffers={name: buffer for name, buffer in module._buffers.items() if name != "weight_mask"},
        _forward_pre_hooks=pre_hooks,
    )
    return twin


def _masks_weight(hook: Any) -> bool:
    return isinstance(hook, BasePruningMethod) and hook._tensor_name == "weight"
