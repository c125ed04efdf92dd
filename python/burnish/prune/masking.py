"""Masks on weights: putting them on, finding them, and making their zeros permanent.

    masks = prune.masks(model)           # {fqn: bool tensor of the weight's shape, True where it is kept}
    prune.mask_(other, masks)            # the same masks on another model
    prune.remove_(model)                 # plain layers again, with zeros in their weights

A mask is a parametrization (torch.nn.utils.parametrize): ``layer.weight`` is ``where(mask, original, 0)``, computed
when it is read. Zeros are exact and positive whatever the values beneath, which training may move and nothing reads;
gradients beneath are exactly zero, even where the weight's own gradient is infinite. The parameter is the one that was
there, so optimizers made before or after hold it. A ``state_dict`` has ``parametrizations.weight.original`` and
``parametrizations.weight.0.mask``; to load one, put its masks on first, if it has any yet::

    if masks := prune.masks(state_dict):
        prune.mask_(model, masks)
    model.load_state_dict(state_dict)

Why not the attributes of torch.nn.utils.prune: there a forward hook writes ``layer.weight``, so that it is out of date
between an optimizer's step and the next call, ``copy.deepcopy`` fails after a forward pass with gradients, and parents
that read a child's weight without calling it (nn.MultiheadAttention, nn.TransformerEncoderLayer's fast path) see old
values. Parametrizations have none of these faults and go through DDP, FSDP2, torch.compile and torch.export; only
pickling a whole module is not for them, as torch says. Models that torch.nn.utils.prune masked are read, reported and
made plain by the functions here all the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import parametrize
from torch.nn.utils import prune as torch_prune

from burnish.prune.layers import candidates, objection, owners

_KEY = ".parametrizations.weight."


class Mask(torch.nn.Module):
    """The parametrization: the weight where ``mask`` is True, zero elsewhere."""

    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight: Tensor) -> Tensor:
        return torch.where(self.mask, weight, 0)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """What is assigned to ``layer.weight`` lies beneath the mask as it is."""
        return weight

    def extra_repr(self) -> str:
        return f"zeros={1 - self.mask.float().mean().item():.1%}" if not self.mask.is_meta else ""


def mask_of(module: torch.nn.Module) -> Tensor | None:
    """The mask on a module's weight, bool, whether burnish or torch.nn.utils.prune put it there; None without one."""
    own = _parametrization(module)
    if own is not None:
        return own.mask
    theirs = module._buffers.get("weight_mask")
    return theirs != 0 if theirs is not None and "weight_orig" in module._parameters else None


def parameter_of(module: torch.nn.Module) -> torch.nn.Parameter:
    """The parameter behind a layer's weight, beneath its mask if it has one."""
    if parametrize.is_parametrized(module, "weight"):
        chain: Any = module.parametrizations["weight"]  # type: ignore[index]
        original: torch.nn.Parameter = chain.original
        return original
    beneath = module._parameters.get("weight_orig", module._parameters.get("weight"))
    assert beneath is not None
    return beneath


def masks(source: torch.nn.Module | Mapping[str, Any]) -> dict[str, Tensor]:
    """The masks of a model, or in a model's ``state_dict``, by the fqns of their layers; copies, True where kept.

    Those of torch.nn.utils.prune are among them. A model without masks gives none.

    Raises:
        TypeError: neither a model nor a mapping.
    """
    if isinstance(source, torch.nn.Module):
        found = {fqn: mask_of(module) for fqn, module in source.named_modules()}
        return {fqn: mask.clone() for fqn, mask in found.items() if mask is not None}
    if not isinstance(source, Mapping):
        raise TypeError(f"masks: source is a {type(source).__name__}, expected an nn.Module or a state_dict")
    return {fqn: source[key] != 0 for fqn, key in mask_keys(source).items()}


def mask_keys(state: Mapping[str, Any]) -> dict[str, str]:
    """The keys of the masks in a ``state_dict``, by the fqns of their layers."""
    found = {}
    for key in state:
        fqn, own, rest = f".{key}".rpartition(_KEY)
        if own and rest.partition(".")[2] == "mask":
            found[fqn[1:]] = key
        elif f".{key}".endswith(".weight_mask"):
            found[key[: -len("weight_mask")].rstrip(".")] = key
    return found


def mask_(model: torch.nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Put masks on layers of ``model``: all or, where one is refused, none.

    Args:
        model: any nn.Module.
        masks: bool tensors of the weights' shapes by fqn, True where a weight is kept.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: no such layer, another shape or device, or a layer that cannot be given a mask: it has one already,
            shares its weight, is parametrized, on meta or sharded. The model is as it was.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"mask_: model is a {type(model).__name__}, expected an nn.Module")
    if not isinstance(masks, Mapping):
        raise TypeError(f"mask_: masks is a {type(masks).__name__}, expected a mapping from fqns to bool tensors")
    if not masks:
        raise ValueError("mask_: masks is empty, expected at least one")
    layers, owned = candidates(model), owners(model)
    for fqn, mask in masks.items():
        _check(fqn, mask, layers, owned)
    attach({fqn: (layers[fqn], mask.clone()) for fqn, mask in masks.items()})


def attach(masks: Mapping[str, tuple[torch.nn.Module, Tensor]]) -> None:
    """Register masks that were checked; on any interruption, none."""
    done: list[tuple[torch.nn.Module, torch.nn.Parameter | None]] = []
    try:
        for module, mask in masks.values():
            done.append((module, module._parameters["weight"]))
            _attach(module, mask)
    except BaseException:
        for module, parameter in done:
            if _parametrization(module) is not None:
                _detach(module)
            module._parameters["weight"] = parameter
        raise


def _attach(module: torch.nn.Module, mask: Tensor) -> None:
    """Put a mask before the layer's weight.

    torch calls ``set_`` on the parameter that it registers, which cuts it off from hooks on its gradient, DDP's among
    them: it is given a stand-in, of the same memory.
    """
    parameter = module._parameters["weight"]
    assert parameter is not None
    module._parameters["weight"] = torch.nn.Parameter(parameter.data, parameter.requires_grad)
    parametrize.register_parametrization(module, "weight", Mask(mask))
    chain: Any = module.parametrizations["weight"]  # type: ignore[index]
    chain.original = parameter


def _detach(module: torch.nn.Module) -> None:
    """Make the parameter beneath the mask the layer's weight again.

    torch takes the property off the module's class, which deep copies of the module share: this one gets its own first.
    """
    cls = type(module)
    own = {name: value for name, value in vars(cls).items() if name not in ("__dict__", "__weakref__")}
    module.__class__ = type(cls.__name__, cls.__bases__, own)
    parametrize.remove_parametrizations(module, "weight", leave_parametrized=False)


def remove_(model: torch.nn.Module) -> torch.nn.Module:
    """Take all masks off and leave zeros in their place: ordinary layers, whose parameters are the ones that were
    there. Masks of torch.nn.utils.prune, on any tensor, are taken off too.

    Returns:
        The model.

    Raises:
        TypeError: not a module.
        ValueError: no masks, one under another parametrization, or sharded weights; the model is as it was.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"remove_: model is a {type(model).__name__}, expected an nn.Module")
    own = {fqn: module for fqn, module in model.named_modules() if _parametrization(module) is not None}
    theirs = {fqn: names for fqn, module in model.named_modules() if (names := _torch_names(module))}
    if not own and not theirs:
        raise ValueError(
            "remove_: the model has no masks, expected one that burnish.prune or torch.nn.utils.prune made"
        )
    for fqn, module in own.items():
        chain: Any = module.parametrizations["weight"]
        if len(chain) > 1:
            raise ValueError(f"remove_: layer {fqn!r} has another parametrization beside its mask: remove that first")
        if type(chain.original) is not torch.nn.Parameter:
            raise ValueError(
                f"remove_: the weight of layer {fqn!r} is a {type(chain.original).__name__}, expected a plain "
                "parameter: gather shards first"
            )
    for module in own.values():
        mask = mask_of(module)
        assert mask is not None
        with torch.no_grad():
            parameter_of(module).masked_fill_(~mask, 0)
        _detach(module)
    for fqn, names in theirs.items():
        module = model.get_submodule(fqn)
        for name in names:
            with torch.no_grad():  # torch's product leaves negative zeros, and NaN under NaN
                getattr(module, f"{name}_orig").masked_fill_(getattr(module, f"{name}_mask") == 0, 0)
            torch_prune.remove(module, name)
    return model


def _parametrization(module: torch.nn.Module) -> Mask | None:
    """The mask among a module's parametrizations of its weight."""
    if not parametrize.is_parametrized(module, "weight"):
        return None
    chain: Any = module.parametrizations["weight"]  # type: ignore[index]
    return next((each for each in chain if isinstance(each, Mask)), None)


def _torch_names(module: torch.nn.Module) -> list[str]:
    """The tensors of a module that torch.nn.utils.prune has masked."""
    hooks = module._forward_pre_hooks.values()
    return [hook._tensor_name for hook in hooks if isinstance(hook, torch_prune.BasePruningMethod)]


def refusal(module: torch.nn.Module, owned: dict[int, list[str]]) -> str | None:
    """Why a candidate cannot be given a mask, one that it has already included; None if it can."""
    mask = mask_of(module)
    if mask is None:
        return objection(module, owned)
    return (
        f"it has a mask already, {1 - mask.float().mean().item():.1%} zero: call burnish.prune.remove_(model) to make "
        "its zeros permanent and prune on from there, or leave it out with filter_fn"
    )


def _check(fqn: Any, mask: Any, layers: Mapping[str, torch.nn.Module], owned: dict[int, list[str]]) -> None:
    if fqn not in layers:
        raise ValueError(f"mask_: the model has no linear or convolution layer {fqn!r}")
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"mask_: the mask of {fqn!r} is {got}, expected a bool tensor, True where a weight is kept")
    reason = refusal(layers[fqn], owned)
    if reason is not None:
        raise ValueError(f"mask_: layer {fqn!r} cannot be masked: {reason}")
    weight: Any = layers[fqn].weight
    if mask.shape != weight.shape or mask.device != weight.device:
        raise ValueError(
            f"mask_: the mask of {fqn!r} is {tuple(mask.shape)} on {mask.device}, expected {tuple(weight.shape)} on "
            f"{weight.device}"
        )
