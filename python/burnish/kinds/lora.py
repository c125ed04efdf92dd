"""LoRA: linear layers of any make, float or int8, become :class:`burnish.nn.LoRALinear`, which goes on using them.

A layer that peft has given an adapter is taken over with it: its active adapter's rank, scaling, dropout and
parameters. The result is the same, the parameters are the same objects, and peft's own switches (``disable_adapter``,
``set_adapter``, ``merge_and_unload``) no longer reach the layer; ``report.revert()`` puts peft's layer back.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from burnish.configs import Config, LoRA
from burnish.kinds import linear, peft
from burnish.kinds.kind import Kind, Misfit, Request, check_rank
from burnish.nn.base_layer import dtype_of, operands, refusal, sizes, with_weight
from burnish.nn.int8_linear import Int8Linear
from burnish.nn.lora_linear import LoRALinear
from burnish.registry import dtype_name

NOUN = "LoRA"


def is_candidate(module: torch.nn.Module) -> bool:
    """Whether a rule for LoRA speaks of this module."""
    return linear.is_candidate(module) or isinstance(module, Int8Linear) or peft.is_layer(module)


def objection(module: torch.nn.Module, parents: list[torch.nn.Module]) -> str | None:
    """Why a layer cannot get an adapter; None if it can."""
    if peft.is_layer(module):
        return peft.objection(module)
    for parent in parents:
        if peft.is_layer(parent):
            return "it is the base of a layer of peft's that is kept"
    if isinstance(module, Int8Linear):
        reason = refusal(module)
        return None if reason is None else f"it is {reason}"
    return linear.objection(module, parents, NOUN, keeps=True)


def convert(request: Request) -> LoRALinear:
    assert isinstance(request.config, LoRA)
    if not peft.is_layer(request.module):
        rank = request.config.resolved().r
        assert rank is not None
        check_rank("r", rank, min(sizes(request.module)))
        return LoRALinear.from_float(request.module, request.config, request.mesh)
    found = peft.adapter(request.module)
    known = {name: getattr(found, name) for name in ("r", "lora_alpha", "lora_dropout", "use_rslora")}
    known["dtype"] = dtype_name(found.lora_A.dtype)
    _check_agreement(request.config, known)
    made = LoRALinear.around(
        found.base, replace(request.config, **known), found.lora_A, found.lora_B, found.scaling, request.mesh
    )
    return made.train(request.module.training)


def _check_agreement(config: LoRA, known: Mapping[str, Any]) -> None:
    """Raise ValueError where an option that was given says something else than the adapter that is there."""
    if config.init_lora_weights != "default":
        raise ValueError(
            f"LoRALinear.from_float: the configuration has init_lora_weights {config.init_lora_weights!r}, and the "
            "layer has an adapter that has begun already"
        )
    for name, value in known.items():
        given = getattr(config, name)
        if given is not None and given != value:
            raise ValueError(
                f"LoRALinear.from_float: the configuration has {name} {given!r}, the adapter that is there {value!r}; "
                "leave the option out to take the adapter's"
            )


def form(module: torch.nn.Module) -> dict[str, Any]:
    assert isinstance(module, LoRALinear)
    return {
        "in_features": module.in_features,
        "out_features": module.out_features,
        "bias": module.bias is not None,
        "r": module.r,
        "scaling": module.scaling,
    }


def rebuild(found: torch.nn.Module, config: Config, form: Mapping[str, Any]) -> LoRALinear:
    assert isinstance(config, LoRA)
    if peft.is_layer(found):
        raise Misfit("an adapter of peft's in the model: load into the model without it, or swap it with LoRA() first")
    has = dict(zip(("in_features", "out_features"), sizes(found), strict=True))
    for name, value in {**has, "bias": operands(found)[2] is not None}.items():
        if form[name] != value:
            raise Misfit(f"{name} {value} in the model, {form[name]} in the checkpoint")
    dtype = config.torch_dtype or dtype_of(found)
    if config.init_lora_weights == "pissa" and not isinstance(found, Int8Linear):  # its base has a weight of its own
        found = with_weight(found, torch.empty_like(found.get_parameter("weight"), device="meta"))
    A, B = (
        torch.nn.Parameter(torch.empty(shape, device="meta", dtype=dtype))
        for shape in ((form["r"], form["in_features"]), (form["out_features"], form["r"]))
    )
    return LoRALinear.around(found, config, A, B, form["scaling"])


LORA = Kind(
    config=LoRA,
    noun=NOUN,
    made=(LoRALinear,),
    candidate=is_candidate,
    objection=objection,
    convert=convert,
    weights=(),
    races=lambda module: False,
    form=form,
    rebuild=rebuild,
)
