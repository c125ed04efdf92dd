"""Bad state and bad calls of Int8Linear: each is one exception that says what came and what was expected."""

from __future__ import annotations

import pytest
import torch
from burnish.nn import Int8Linear
from torch import nn


def test_to_double_is_refused_in_words() -> None:
    layer, x = Int8Linear(70, 33), torch.randn(6, 70)
    with pytest.raises(RuntimeError, match="int8_linear: x is fp64, expected fp32, bf16 or fp16"):
        layer.double()(x.double())


def _without(key: str):
    return lambda state: state.pop(key)


def _with(key: str, change):
    return lambda state: state.update({key: change(state.get(key))})


BAD_STATE = {
    "missing weight": (_without("weight"), 'Missing key.*"weight"'),
    "missing scale": (_without("weight_scale"), 'Missing key.*"weight_scale"'),
    "missing bias": (_without("bias"), 'Missing key.*"bias"'),
    "extra key": (_with("weight_zero", lambda v: torch.zeros(3)), 'Unexpected key.*"weight_zero"'),
    "float weight": (_with("weight", lambda v: v.float()), r"weight is fp32 .*expected int8.*before swapping"),
    "weight shape": (_with("weight", lambda v: v[:-1]), r"weight is int8 \(32, 70\), expected int8 \(33, 70\)"),
    "weight is text": (_with("weight", lambda v: "x"), "weight is x, expected int8"),
    "scale shape": (_with("weight_scale", lambda v: v[:-1]), r"weight_scale is fp32 \(32,\), expected fp32 \(33,\)"),
    "scale dtype": (_with("weight_scale", lambda v: v.half()), "weight_scale is fp16 .*expected fp32"),
    "scale NaN": (_with("weight_scale", lambda v: v * float("nan")), "weight_scale has values that are NaN"),
    "scale Inf": (_with("weight_scale", lambda v: v / 0.0), "weight_scale has values that are NaN, Inf"),
    "scale zero": (_with("weight_scale", lambda v: v * 0), "weight_scale has .*zero or negative"),
    "scale negative": (_with("weight_scale", lambda v: -v), "weight_scale has .*zero or negative"),
    "bias shape": (_with("bias", lambda v: v[:-1]), "size mismatch for bias"),
}


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("label", BAD_STATE)
def test_bad_state_is_refused(label: str, assign: bool) -> None:
    change, match = BAD_STATE[label]
    state = dict(Int8Linear(70, 33).state_dict())
    change(state)
    with pytest.raises(RuntimeError, match=match):
        Int8Linear(70, 33).load_state_dict(state, assign=assign)


def test_state_of_a_newer_version_is_refused() -> None:
    state = Int8Linear(70, 33).state_dict()
    assert state._metadata[""]["version"] == 1
    state._metadata[""]["version"] = 2
    with pytest.raises(RuntimeError, match="state of version 2, this burnish reads up to 1"):
        Int8Linear(70, 33).load_state_dict(state)


def _linear(change) -> nn.Linear:
    linear = nn.Linear(8, 4)
    with torch.no_grad():
        change(linear.weight)
    return linear


BAD_CALLS = {
    "in_features": (lambda: Int8Linear(-1, 4), ValueError, "in_features is -1, expected an integer of at least 0"),
    "in_features float": (lambda: Int8Linear(8.0, 4), ValueError, "in_features is 8.0, expected an integer"),
    "in_features huge": (lambda: Int8Linear(131073, 1, device="meta"), ValueError, "in_features is 131073.*131072"),
    "out_features": (lambda: Int8Linear(8, 0), ValueError, "out_features is 0, expected an integer of at least 1"),
    "activation": (lambda: Int8Linear(8, 4, activation="tanh"), ValueError, "activation is 'tanh', expected one of"),
    "dtype": (lambda: Int8Linear(8, 4, dtype=torch.float64), TypeError, "dtype is fp64, expected fp32, bf16 or fp16"),
    "module": (
        lambda: Int8Linear.from_float(nn.Conv2d(3, 3, 1)),
        TypeError,
        "the module is Conv2d, expected nn.Linear",
    ),
    "twice": (lambda: Int8Linear.from_float(Int8Linear(8, 4)), TypeError, "the module is Int8Linear, expected"),
    "double": (lambda: Int8Linear.from_float(nn.Linear(8, 4).double()), TypeError, "dtype is fp64, expected fp32"),
    "NaN": (
        lambda: Int8Linear.from_float(_linear(lambda w: w[2, 3].fill_(float("nan")))),
        ValueError,
        "the weight has NaN or Inf in 1 of 4 output channels, first in channel 2",
    ),
    "Inf": (
        lambda: Int8Linear.from_float(_linear(lambda w: w[1:].fill_(float("inf")))),
        ValueError,
        "the weight has NaN or Inf in 3 of 4 output channels, first in channel 1",
    ),
    "x width": (lambda: Int8Linear(64, 4)(torch.zeros(2, 80)), RuntimeError, r"x has shape \(2, 80\), expected .*64"),
    "x narrow": (lambda: Int8Linear(64, 4)(torch.zeros(2, 63)), RuntimeError, r"x has shape \(2, 63\), expected .*64"),
    "x int": (lambda: Int8Linear(8, 4)(torch.zeros(2, 8).int()), RuntimeError, "int8_linear: x is int32, expected"),
    "x scalar": (lambda: Int8Linear(8, 4)(torch.zeros(())), RuntimeError, r"x has shape \(\), expected .*8"),
    "weight set": (lambda: setattr(Int8Linear(8, 4), "weight", nn.Parameter(torch.zeros(4, 8))), KeyError, "exists"),
}


@pytest.mark.parametrize("label", BAD_CALLS)
def test_bad_calls_are_refused(label: str) -> None:
    call, kind, match = BAD_CALLS[label]
    with pytest.raises(kind, match=match):
        call()
