"""Linear layers of any make, and 2-d convolutions: which can be converted, and in words why the rest cannot.

Nothing here changes a module. A reason is a clause that finishes the sentence "kept, because ...".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.nn.utils import parametrize

from burnish.bytecode import weights_read
from burnish.kinds.kind import Misfit
from burnish.nn import masked
from burnish.nn.int8_linear import float_weight, is_conv1d
from burnish.registry import dtype_name

_FLOATING = (torch.float32, torch.bfloat16, torch.float16)
WALK = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
_HOOKS = ("_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks")


def is_candidate(module: torch.nn.Module) -> bool:
    """Whether a rule for linear layers speaks of this module: a float linear layer of any make."""
    return isinstance(module, torch.nn.Linear) or is_conv1d(module)


def objection(
    module: torch.nn.Module, parents: list[torch.nn.Module], noun: str, *, keeps: bool = False, masks: bool = False
) -> str | None:
    """Why a float layer cannot be converted; None if it can.

    Args:
        module: a linear layer or an nn.Conv2d.
        parents: the modules it is a child of.
        noun: what it would become, in a word.
        keeps: whether the new layer goes on using this one, so that FSDP2 may have sharded it and may have hooks on it.
        masks: whether the new layer takes over a mask on the weight, so that there may be one.
    """
    bare = masked.plain(module) if masks else module
    reason = _by_class(bare, keeps) or _by_parents(module, parents) or _by_tensors(bare, noun, keeps)
    if reason is None and "weight_orig" in module._parameters and bare._forward_pre_hooks:
        return "it has forward pre-hooks beside its mask's, whose handles would not reach the new layer"
    return reason


def check_form(found: torch.nn.Module, form: Mapping[str, Any]) -> torch.Tensor:
    """The weight ``[N, K]`` of a float layer that a checkpoint's layer of this form replaced.

    Raises:
        Misfit: it has other sizes.
    """
    weight = float_weight(found)
    assert weight is not None
    has = {**dict(zip(("out_features", "in_features"), weight.shape, strict=True)), "bias": found.bias is not None}
    for name, value in has.items():
        if form[name] != value:
            raise Misfit(f"{name} {value} in the model, {form[name]} in the checkpoint")
    return weight


def walk_of(module: torch.nn.Module) -> dict[str, Any]:
    """A convolution's attributes as JSON gives them back."""
    values = {name: getattr(module, name) for name in WALK}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def check_walk(found: torch.nn.Module, form: Mapping[str, Any]) -> None:
    """Raise Misfit unless a convolution walks as one that a checkpoint's layer of this form replaced."""
    for name, value in {**walk_of(found), "bias": found.bias is not None}.items():
        if form[name] != value:
            raise Misfit(f"{name} {value} in the model, {form[name]} in the checkpoint")


def _by_class(module: torch.nn.Module, keeps: bool) -> str | None:
    cls = type(module)
    if "forward" in vars(module):
        return "its forward was replaced on the instance (offloading hooks do that)"
    if parametrize.is_parametrized(module):
        return "it is parametrized: remove the parametrization first"
    original = _original(cls)
    methods = ("forward", "_conv_forward") if original is torch.nn.Conv2d else ("forward",)
    own = [name for name in methods if getattr(cls, name) is not getattr(original, name)]
    if own or cls.__call__ is not torch.nn.Module.__call__:
        return f"{cls.__name__} is a subclass of {original.__name__} with its own forward"
    if isinstance(module, torch.nn.modules.lazy.LazyModuleMixin) and module.has_uninitialized_params():
        return "it is lazy and has no shape yet: run one batch first"
    if not keeps and any(getattr(module, name, None) for name in _HOOKS):
        return "it has state_dict hooks, which expect a float weight"
    return None


def _original(cls: type) -> Any:
    """The class whose forward says what the layer computes."""
    ours = (torch.nn.Linear, torch.nn.Conv2d)
    return next(base for base in cls.__mro__ if base in ours or base.__module__ == "transformers.pytorch_utils")


def _by_parents(module: torch.nn.Module, parents: list[torch.nn.Module]) -> str | None:
    """Layers whose parent reads their weight instead of calling them."""
    for parent in parents:
        cls: Any = type(parent)
        if any(child is module and name in weights_read(cls) for name, child in parent._modules.items()):
            return f"{cls.__name__} reads its weight directly"
    return None


def _by_tensors(module: torch.nn.Module, noun: str, keeps: bool) -> str | None:
    for name in ("weight", "bias"):
        if name not in module._parameters:
            if f"{name}_mask" in module._buffers:
                return f"its {name} has a pruning mask: call torch.nn.utils.prune.remove first"
            return f"its {name} is computed by a hook (weight or spectral norm): remove that first"
        tensor = module._parameters[name]
        if tensor is None:
            continue
        if type(tensor) is not torch.nn.Parameter and not (keeps and type(tensor).__name__ == "DTensor"):
            return f"its {name} is a {type(tensor).__name__}, not a plain parameter: swap before sharding or wrapping"
        if tensor.layout != torch.strided:
            return f"its {name} is {str(tensor.layout).removeprefix('torch.')}, not dense"
        if tensor.dtype not in _FLOATING:
            return f"its {name} is {dtype_name(tensor.dtype)}; {noun} has kernels for fp32, bf16 and fp16"
    others = {*module._parameters, *module._buffers, *module._modules} - {"weight", "bias"}
    if others:
        what = "convolution" if isinstance(module, torch.nn.Conv2d) else "linear layer"
        return f"it holds more than a {what} does: {', '.join(sorted(others))}"
    weight: torch.Tensor = module.weight  # type: ignore[assignment]
    dims = 4 if isinstance(module, torch.nn.Conv2d) else 2
    if weight.dim() != dims:
        return f"its weight has {weight.dim()} dimensions, not {dims}"
    return "it has no outputs" if weight.shape[1 if is_conv1d(module) else 0] == 0 else None
