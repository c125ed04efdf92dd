"""peft's ``adapter_config.json`` and the names in its ``adapter_model.safetensors``: what they say, and how to say it.

============================================  ==================================================================
``base_model.model.<layer>.lora_A.weight``    [R, K]
``base_model.model.<layer>.lora_B.weight``    [N, R]
``r``, ``rank_pattern``                       the rank, and those of the layers whose names match a pattern
``lora_alpha``, ``alpha_pattern``             likewise; scaling is alpha / r, with ``use_rslora`` alpha / sqrt(r)
``target_modules``                            the layers: ends of names, a regular expression, or ``all-linear``
============================================  ==================================================================

A pattern ``p`` matches a layer's name as ``(.*\\.)?(p)$`` does, the first one wins. Options that make of an adapter
something else than ``x W^T + scaling (x A^T) B^T`` are refused, and so are those that a newer peft may have.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from burnish.configs import LoRA
from burnish.kinds.lora import is_candidate
from burnish.kinds.peft import BEGINNINGS
from burnish.nn.lora_linear import LoRALinear

PREFIX = "base_model.model."
_KEY = re.compile(r"base_model\.model\.(.+)\.lora_(A|B)\.weight")
#: options of any value: they choose layers, name things, or tell how training began
_IRRELEVANT = frozenset({
    "auto_mapping", "base_model_name_or_path", "bias", "corda_config", "eva_config", "exclude_modules",
    "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform", "loftq_config",
    "lora_ga_config", "megatron_core", "peft_type", "peft_version", "qalora_group_size", "revision", "runtime_config",
    "target_modules", "task_type",
})  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """A configuration's options for each layer."""

    config: LoRA
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]

    def of(self, layer: str) -> LoRA:
        """The options of the layer with this name."""
        r, alpha = (_matching(pattern, layer) for pattern in (self.rank_pattern, self.alpha_pattern))
        config = self.config if r is None else replace(self.config, r=r)
        return config if alpha is None else replace(config, lora_alpha=alpha)


def _matching(patterns: Mapping[str, Any], layer: str) -> Any:
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", layer)), None)


def parse(data: Any) -> Plan:
    """The plan of a configuration in peft's words.

    Raises:
        ValueError, TypeError: it is none, or has an option that burnish does not know or that has no plain LoRA form;
            the message names it.
    """
    if not isinstance(data, Mapping):
        raise TypeError(f"the configuration is a {type(data).__name__}, expected an object")
    if data.get("peft_type") != "LORA":
        raise ValueError(f"peft_type is {data.get('peft_type')!r}, expected 'LORA'")
    if data.get("bias", "none") != "none":
        raise ValueError(f"bias is {data['bias']!r}, expected 'none': burnish keeps the base's biases frozen")
    known = {"rank_pattern", "alpha_pattern", *(field.name for field in fields(LoRA))} - {"dtype"}
    for name, value in data.items():
        if name not in known | _IRRELEVANT and value not in (None, False, [], {}):
            raise ValueError(f"{name} is {value!r}, expected it to be absent: burnish has no such adapter")
    began = data.get("init_lora_weights", True)
    if began != "pissa" and began not in BEGINNINGS:
        raise ValueError(f"init_lora_weights is {began!r}, which changes the base; expected True or 'pissa'")
    config = LoRA(
        data.get("r", 8),
        data.get("lora_alpha", 8),
        data.get("lora_dropout", 0.0),
        data.get("use_rslora", False),
        "pissa" if began == "pissa" else "default",
    ).resolved()
    plan = Plan(config, data.get("rank_pattern") or {}, data.get("alpha_pattern") or {})
    for name in ("rank_pattern", "alpha_pattern"):
        _check_pattern(name, getattr(plan, name), plan)
    return plan


def _check_pattern(name: str, patterns: Any, plan: Plan) -> None:
    if not isinstance(patterns, Mapping):
        raise TypeError(f"{name} is {patterns!r}, expected an object")
    for key, value in patterns.items():
        try:
            re.compile(rf"(.*\.)?({key})$")
        except re.error as error:
            raise ValueError(f"{name} has the key {key!r}, which is not a regular expression: {error}") from None
        option = "r" if name == "rank_pattern" else "lora_alpha"
        replace(plan.config, **{option: value})  # which raises


def layer_and_factor(key: str) -> tuple[str, str] | None:
    """("model.q_proj", "A") for the key of its lora_A; None for a key of another form."""
    match = _KEY.fullmatch(key)
    return None if match is None else (match[1], match[2])


def key_of(layer: str, factor: str) -> str:
    return f"{PREFIX}{layer}.lora_{factor}.weight"


def describe(layers: Mapping[str, LoRALinear], names: Iterable[str]) -> dict[str, Any]:
    """The configuration of adapters, by their layers' names, in a model whose modules have ``names``.

    Raises:
        ValueError: the layers differ in something that peft has one value for.
    """
    rslora = all(layer.config.use_rslora for layer in layers.values())
    ranks = {name: layer.r for name, layer in layers.items()}
    alphas = {name: _alpha(layer, rslora) for name, layer in layers.items()}
    r, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    pissa = _common(layers, {name: layer.config.init_lora_weights for name, layer in layers.items()}, "init") == "pissa"
    return {
        "alpha_pattern": {_exactly(name): value for name, value in alphas.items() if value != alpha},
        "auto_mapping": None,
        "base_model_name_or_path": None,
        "bias": "none",
        "fan_in_fan_out": all(not isinstance(layer.base_layer, torch.nn.Linear) for layer in layers.values()),
        "inference_mode": True,
        "init_lora_weights": "pissa" if pissa else True,
        "lora_alpha": alpha,
        "lora_dropout": _common(layers, {name: layer.lora_dropout for name, layer in layers.items()}, "lora_dropout"),
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": r,
        "rank_pattern": {_exactly(name): value for name, value in ranks.items() if value != r},
        "revision": None,
        "target_modules": _targets(set(names), sorted(layers)),
        "task_type": None,
        "use_dora": False,
        "use_rslora": rslora,
    }


def _alpha(layer: LoRALinear, rslora: bool) -> float:
    """The alpha that gives the layer's scaling."""
    alpha = layer.lora_alpha
    if replace(layer.config, use_rslora=rslora).scaling == layer.scaling:
        return alpha
    return layer.scaling * (layer.r**0.5 if rslora else layer.r)


def _common(layers: Mapping[str, LoRALinear], values: Mapping[str, Any], what: str) -> Any:
    first, value = next(iter(values.items()))
    for name, other in values.items():
        if other != value:
            raise ValueError(
                f"the layers differ in {what}: {value!r} in {first!r}, {other!r} in {name!r}; peft's file has one value"
            )
    return value


def _exactly(name: str) -> str:
    """The pattern that matches this layer and no other."""
    return "^" + re.escape(name)


def _targets(names: set[str], adapted: Sequence[str]) -> list[str] | str:
    """The shortest form of ``target_modules`` that means these layers and none else."""
    for targets in (sorted({name.rpartition(".")[2] for name in adapted}), list(adapted)):
        if {name for name in names | set(adapted) if _ends(name, targets)} == set(adapted):
            return targets
    return "|".join(map(re.escape, adapted))


def _ends(name: str, targets: Sequence[str]) -> bool:
    return any(name == target or name.endswith(f".{target}") for target in targets)


def lora_rules(model: torch.nn.Module, config: Any) -> dict[str, LoRA]:
    """The rules with which :func:`burnish.swap_` gives a model the adapters that peft would give it.

        burnish.swap_(model, burnish.lora_rules(model, peft.LoraConfig(r=8, target_modules=["q_proj", "v_proj"])))

    Args:
        model: a model without adapters.
        config: peft's LoraConfig, or a mapping with its options; ``target_modules`` is needed. ``all-linear`` leaves
            out the model's output embeddings, as peft does.

    Raises:
        ValueError, TypeError: an option that has no form here, or no layer is meant; the message names it.
    """
    data = {"peft_type": "LORA", **(config if isinstance(config, Mapping) else config.to_dict())}
    try:
        plan = parse(data)
        for name in ("layers_to_transform", "layers_pattern"):
            if data.get(name):
                raise ValueError(f"{name} is {data[name]!r}, expected None: write a regular expression instead")
        if data.get("init_lora_weights", True) not in (True, "pissa"):
            raise ValueError(f"init_lora_weights is {data['init_lora_weights']!r}, expected True or 'pissa'")
        chosen = [name for name, module in model.named_modules() if name and is_candidate(module)]
        chosen = _meant(model, chosen, data.get("target_modules"))
        excluded = data.get("exclude_modules") or []
        chosen = [name for name in chosen if not (excluded and _means(excluded, name))]
        if not chosen:
            raise ValueError(f"target_modules is {data.get('target_modules')!r}, which means no layer of the model")
    except (TypeError, ValueError) as error:
        raise type(error)(f"lora_rules: {error}") from None
    return {f"re:{re.escape(name)}": plan.of(name) for name in chosen}


def _meant(model: Any, names: list[str], targets: Any) -> list[str]:
    if not targets or not isinstance(targets, str | list | tuple | set):
        raise TypeError(f"target_modules is {targets!r}, expected ends of names, a regular expression or 'all-linear'")
    if targets == "all-linear":
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        return [name for name in names if model.get_submodule(name) is not head]
    return [name for name in names if _means(targets, name)]


def _means(targets: Any, name: str) -> bool:
    return bool(re.fullmatch(targets, name)) if isinstance(targets, str) else _ends(name, list(targets))
