"""Bad options, bases, calls and state of LoRALinear and LoRA: each is one exception that says what was expected."""

from __future__ import annotations

import burnish
import pytest
import torch
from burnish import Int8, LoRA, SwapError, swap_
from burnish.nn import Int8Linear, LoRALinear
from lora_models import Net, adapted, base_of
from swap_models import same, snapshot
from torch import nn

BAD_CONFIGS = {
    "r zero": ({"r": 0}, ValueError, "r is 0, expected an integer of at least 1"),
    "r negative": ({"r": -3}, ValueError, "r is -3, expected an integer of at least 1"),
    "r float": ({"r": 4.0}, TypeError, "r is 4.0, expected an integer"),
    "r bool": ({"r": True}, TypeError, "r is True, expected an integer"),
    "alpha zero": ({"lora_alpha": 0}, ValueError, "lora_alpha is 0, expected a finite number above 0"),
    "alpha NaN": ({"lora_alpha": float("nan")}, ValueError, "lora_alpha is nan, expected a finite number above 0"),
    "alpha Inf": ({"lora_alpha": float("inf")}, ValueError, "lora_alpha is inf, expected a finite number above 0"),
    "alpha text": ({"lora_alpha": "8"}, TypeError, "lora_alpha is '8', expected a finite number"),
    "dropout above 1": ({"lora_dropout": 1.1}, ValueError, "lora_dropout is 1.1, expected a probability from 0 to 1"),
    "dropout below 0": ({"lora_dropout": -0.1}, ValueError, "lora_dropout is -0.1, expected a probability from 0 to 1"),
    "dropout NaN": ({"lora_dropout": float("nan")}, ValueError, "lora_dropout is nan, expected a probability"),
    "dropout bool": ({"lora_dropout": True}, TypeError, "lora_dropout is True, expected a probability"),
    "rslora": ({"use_rslora": 1}, TypeError, "use_rslora is 1, expected True or False"),
    "init": ({"init_lora_weights": "olora"}, ValueError, "init_lora_weights is 'olora', expected 'default' or 'pissa'"),
    "dtype": ({"dtype": "fp64"}, ValueError, "dtype is 'fp64', expected one of: fp32, bf16, fp16"),
}


@pytest.mark.parametrize("label", BAD_CONFIGS)
def test_bad_options_are_refused(label: str) -> None:
    options, kind, match = BAD_CONFIGS[label]
    with pytest.raises(kind, match=f"LoRA: {match}"):
        LoRA(**options)


def test_a_config_travels() -> None:
    config = LoRA(r=4, lora_alpha=2.5, lora_dropout=0.1, use_rslora=True, init_lora_weights="pissa", dtype="bf16")
    assert LoRA.from_dict(config.to_dict()) == config
    assert config.scaling == 2.5 / 2
    assert LoRA().resolved() == LoRA(8, 8, 0.0, False)
    with pytest.raises(ValueError, match="unknown options: rank"):
        LoRA.from_dict({**config.to_dict(), "rank": 4})


def _parametrized() -> nn.Module:
    return nn.utils.parametrizations.orthogonal(nn.Linear(8, 8))


BAD_CALLS = {
    "embedding": (lambda: LoRALinear(nn.Embedding(8, 8)), TypeError, "base_layer is a Embedding, expected nn.Linear"),
    "twice": (lambda: LoRALinear(adapted()[0]), TypeError, "base_layer is a LoRALinear, expected nn.Linear"),
    "fused": (
        lambda: LoRALinear(Int8Linear(8, 8, activation="gelu")),
        TypeError,
        "base_layer is an Int8Linear that computes gelu, expected one without activation",
    ),
    "fp64": (lambda: LoRALinear(nn.Linear(8, 8).double()), TypeError, "weight of fp64, expected fp32, bf16 or fp16"),
    "parametrized": (lambda: LoRALinear(_parametrized()), TypeError, "weight or bias is computed, expected plain"),
    "r": (lambda: LoRALinear(nn.Linear(8, 4), r=5), ValueError, r"r is 5, expected at most min\(.*\) = 4"),
    "r zero": (lambda: LoRALinear(nn.Linear(8, 4), r=0), ValueError, "r is 0, expected an integer of at least 1"),
    "dtype": (lambda: LoRALinear(nn.Linear(8, 8), dtype=torch.int8), ValueError, "dtype is 'int8', expected one of"),
    "pissa int8": (
        lambda: LoRALinear(base_of("int8"), init_lora_weights="pissa"),
        ValueError,
        "init_lora_weights is 'pissa' and base_layer is an Int8Linear, expected a whole float weight",
    ),
    "pissa meta": (
        lambda: LoRALinear(nn.Linear(8, 8, device="meta"), init_lora_weights="pissa"),
        ValueError,
        "init_lora_weights is 'pissa' and base_layer is on meta",
    ),
    "x width": (
        lambda: adapted()[0](torch.zeros(2, 41)),
        RuntimeError,
        r"lora_linear: A has shape .*expected \[R, 41\]",
    ),
    "x int": (lambda: adapted()[0](torch.zeros(2, 40).int()), RuntimeError, "lora_linear: x is int32, expected"),
    "x dtype": (lambda: adapted()[0](torch.zeros(2, 40).half()), RuntimeError, "weight is fp32, expected fp16 as x is"),
    "x scalar": (lambda: adapted()[0](torch.zeros(())), RuntimeError, "lora_linear: x is a scalar"),
    "thawed": (
        lambda: adapted()[0].requires_grad_(True)(torch.zeros(2, 40)),
        RuntimeError,
        "weight requires a gradient, expected a frozen base",
    ),
    "unmerge": (lambda: adapted()[0].unmerge(), RuntimeError, "the adapter is not merged, expected merge"),
    "merge twice": (lambda: _merged().merge(), RuntimeError, "merged already, expected unmerge"),
    "merge int8": (lambda: adapted("int8")[0].merge(), RuntimeError, "base_layer is an Int8Linear.*merge before"),
    "save merged": (lambda: _merged().state_dict(), RuntimeError, "base_layer has the adapter merged.*call unmerge"),
    "load merged": (
        lambda: _merged().load_state_dict(adapted()[0].state_dict()),
        RuntimeError,
        r"has its adapter merged: call unmerge\(\) before loading",
    ),
    "double backward": (lambda: _twice(), RuntimeError, "lora_linear has no double backward"),
    "no adapters": (
        lambda: burnish.trainable_only(Net()),
        ValueError,
        "the model has no adapters, expected burnish.swap_",
    ),
}


def _merged() -> LoRALinear:
    layer, _ = adapted()
    layer.merge()
    return layer


def _twice() -> None:
    layer, x = adapted()
    torch.autograd.grad(layer(x).sum(), layer.lora_A, create_graph=True)


@pytest.mark.parametrize("label", BAD_CALLS)
def test_bad_calls_are_refused(label: str) -> None:
    call, kind, match = BAD_CALLS[label]
    with pytest.raises(kind, match=match):
        call()


BAD_STATE = {
    "missing": (lambda s: s.pop("lora_A"), 'Missing key.*"lora_A"'),
    "extra": (lambda s: s.update(lora_C=torch.zeros(1)), 'Unexpected key.*"lora_C"'),
    "shape": (lambda s: s.update(lora_B=s["lora_B"][:, :-1]), "size mismatch for lora_B"),
    "base": (lambda s: s.pop("base_layer.weight"), 'Missing key.*"base_layer.weight"'),
}


@pytest.mark.parametrize("label", BAD_STATE)
def test_bad_state_is_refused(label: str) -> None:
    change, match = BAD_STATE[label]
    state = dict(adapted()[0].state_dict())
    change(state)
    with pytest.raises(RuntimeError, match=match):
        adapted()[0].load_state_dict(state)


def test_state_of_a_newer_version_is_refused() -> None:
    layer, _ = adapted()
    state = layer.state_dict()
    state._metadata[""]["version"] = 2
    with pytest.raises(RuntimeError, match="LoRALinear state of version 2, this burnish reads up to 1"):
        layer.load_state_dict(state)


def _nan(net: Net) -> None:
    with torch.no_grad():
        net.head.weight[0, 0] = float("nan")


PISSA = LoRA(init_lora_weights="pissa")
BAD_SWAPS = {
    "rank of the last layer": ({"up": LoRA(r=20), "head": LoRA(r=20)}, None, "'head': r is 20, .* to 16; .*Keep"),
    "int8 beside it": ({"up": LoRA(), "inner.down": PISSA, "head": Int8()}, _nan, "'head'.*NaN"),
    "pissa on int8": (PISSA, lambda net: swap_(net, {"head": Int8()}), "'head': .*an Int8Linear"),
    "nothing": ({"encoder.*": LoRA()}, None, "rule 'encoder.*' matches nothing"),
    "nothing to adapt": (
        {"*": LoRA()},
        lambda net: [setattr(net, n, nn.Identity()) for n in ("up", "inner", "head")],
        "no layer that can be swapped by LoRA",
    ),
}  # fmt: skip


@pytest.mark.parametrize("label", BAD_SWAPS)
def test_a_bad_swap_changes_nothing(label: str) -> None:
    rules, prepare, match = BAD_SWAPS[label]
    net = Net()
    if prepare is not None:
        prepare(net)
    before = snapshot(net)
    with pytest.raises(SwapError, match=match):
        swap_(net, rules)
    assert same(before, snapshot(net))


def test_a_layer_by_itself_is_refused() -> None:
    with pytest.raises(SwapError, match=r"use burnish.nn.LoRALinear.from_float\(model\)"):
        swap_(nn.Linear(8, 8), LoRA())
