"""peft's LoRA layers: known by the names of their classes, so that peft need not be imported or even be there.

:func:`adapter` reads what a layer has, :func:`objection` says why one cannot be taken over, and :func:`shield` which
modules of a model that peft has wrapped are none of a swap's business.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from burnish.checks import FLOATING
from burnish.configs import Config, LoRA
from burnish.kinds import linear
from burnish.nn.base_layer import refusal
from burnish.nn.int8_linear import Int8Linear
from burnish.registry import dtype_name

_LAYERS = "peft.tuners.lora.layer"
_WRAPPERS = {("peft.utils.other", name) for name in ("ModulesToSaveWrapper", "AuxiliaryTrainingWrapper")}
#: the values of peft's init_lora_weights that leave the base as it is
BEGINNINGS = (True, False, "gaussian", "orthogonal", "eva")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@dataclass(frozen=True)
class Adapter:
    """The active adapter of a layer, with the parameters themselves."""

    base: torch.nn.Module
    r: int
    lora_alpha: float
    lora_dropout: float
    use_rslora: bool
    scaling: float
    lora_A: torch.nn.Parameter
    lora_B: torch.nn.Parameter


def is_layer(module: torch.nn.Module) -> bool:
    """Whether it is one of peft's LoRA layers, of any sort."""
    return any((cls.__module__, cls.__qualname__) == (_LAYERS, "LoraLayer") for cls in type(module).__mro__)


def _active(module: Any) -> list[str]:
    names = module._active_adapter
    return [name for name in ([names] if isinstance(names, str) else names) if name in module.lora_A]


def objection(module: Any) -> str | None:
    """Why the adapter of one of peft's LoRA layers cannot be taken over, as a clause; None if it can."""
    cls = type(module)
    if (cls.__module__, cls.__qualname__) != (_LAYERS, "Linear"):
        return f"burnish has no form for peft's {cls.__qualname__} of {cls.__module__}"
    names = _active(module)
    if len(names) != 1:
        return f"{len(names)} of its adapters are active, not one"
    name = names[0]
    if module.merged_adapters:
        return "its adapter is merged: call peft's unmerge_adapter() first"
    if module._disable_adapters:
        return "its adapter is disabled"
    variant = module.lora_variant.get(name)
    if variant is not None:
        return f"its adapter is no plain LoRA but a {type(variant).__name__}"
    return _by_factors(module, name) or _by_base(module)


def _by_factors(module: Any, name: str) -> str | None:
    for factor in (module.lora_A[name], module.lora_B[name]):
        if type(factor) is not torch.nn.Linear or type(factor._parameters.get("weight")) is not torch.nn.Parameter:
            return "the factors of its adapter are no plain linear layers"
        if factor.bias is not None:
            return "its adapter has a bias (lora_bias)"
        if any(getattr(factor, hooks) for hooks in _HOOKS):
            return "the factors of its adapter have hooks, which would not run"
        if factor.weight.dtype not in FLOATING:
            return f"its adapter is {dtype_name(factor.weight.dtype)}; LoRA has kernels for fp32, bf16 and fp16"
    dropout = module.lora_dropout[name]
    return None if type(dropout) in (torch.nn.Dropout, torch.nn.Identity) else f"its dropout is a {type(dropout)}"


def _by_base(module: Any) -> str | None:
    base = module.base_layer
    if any(getattr(base, hooks) for hooks in _HOOKS) or "forward" in vars(base):
        return "its base layer has hooks or a forward of its own, which would not run"
    reason = refusal(base)
    if reason is not None:
        return f"its base layer is {reason}"
    trained = [name for name, parameter in base.named_parameters() if parameter.requires_grad]
    return f"the {trained[0]} of its base layer is trained, too; burnish would keep it frozen" if trained else None


def left_behind(model: torch.nn.Module) -> str | None:
    """What an adapter of peft's has in the model beside layers that were taken over, as a sentence; None if nothing."""
    for name, module in model.named_modules():
        if is_layer(module) and any(adapter in module.r for adapter in module.active_adapters):
            return f"{name!r} has an adapter of peft's that was not swapped"
        if any((cls.__module__, cls.__qualname__) in _WRAPPERS for cls in type(module).__mro__):
            return f"{name!r} is trained beside the adapter, by peft's modules_to_save or trainable_token_indices"
        configs = vars(module).get("peft_config")
        for config in configs.values() if isinstance(configs, dict) else ():
            began = getattr(config, "init_lora_weights", True)
            if began not in BEGINNINGS:
                return f"peft's init_lora_weights is {began!r}, which has changed the base"
    return None


def adapter(module: Any) -> Adapter:
    """What a layer that :func:`objection` lets pass has."""
    name = _active(module)[0]
    return Adapter(
        base=module.base_layer,
        r=module.r[name],
        lora_alpha=module.lora_alpha[name],
        lora_dropout=float(getattr(module.lora_dropout[name], "p", 0.0)),
        use_rslora=bool(module.use_rslora[name]),
        scaling=module.scaling[name],
        lora_A=module.lora_A[name].weight,
        lora_B=module.lora_B[name].weight,
    )


def shield(model: torch.nn.Module) -> Callable[[torch.nn.Module, Config | None], str | None]:
    """Why a module of this model that a configuration could convert is to be left alone all the same: it is part of an
    adapter of peft's, or ``LoRA()``, which takes peft's adapters over, finds none on it."""
    layers = [module for module in model.modules() if is_layer(module)]
    parts = {id(part) for layer in layers for part in _parts(layer)}
    bases = {id(layer.base_layer) for layer in layers}

    def reason(module: torch.nn.Module, config: Config | None) -> str | None:
        if id(module) in parts:
            return "it is part of an adapter of peft's"
        plain = linear.is_candidate(module) or isinstance(module, Int8Linear)
        if layers and config == LoRA() and plain and id(module) not in bases:
            return "peft gave it no adapter; LoRA(r=...) would"
        return None

    return reason


def _parts(layer: torch.nn.Module) -> Iterator[torch.nn.Module]:
    for name, child in layer.named_children():
        if name != "base_layer":
            yield from child.modules()
