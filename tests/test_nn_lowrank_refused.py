"""Bad calls, configurations and states of low-rank layers: one exception that says what came and what was meant."""

from __future__ import annotations

import json
import math

import burnish
import pytest
import torch
from burnish import LowRank, SwapError, swap_
from burnish.nn import Int8Linear, LowRankConv2d, LowRankLinear
from swap_models import IDS, Model, same, snapshot
from torch import nn


def spoiled(make=lambda: nn.Linear(8, 4), value: float = math.nan) -> nn.Module:
    module = make()
    with torch.no_grad():
        module.weight.flatten()[5] = value
    return module


def conv() -> nn.Conv2d:
    return nn.Conv2d(4, 8, 3)


LINEAR, CONV = LowRankLinear.from_float, LowRankConv2d.from_float
AWARE = LowRank(rank=2, method="activation")

BAD_CALLS = {
    "in_features": (lambda: LowRankLinear(0, 4, rank=1), ValueError, "in_features is 0, expected an integer of at lea"),
    "out_features": (lambda: LowRankLinear(4, 2.0, rank=1), ValueError, "out_features is 2.0, expected an integer"),
    "rank missing": (lambda: LowRankLinear(4, 4), TypeError, "rank"),
    "rank zero": (lambda: LowRankLinear(8, 4, rank=0), ValueError, "rank is 0, expected an integer from 1 to 4"),
    "rank negative": (lambda: LowRankLinear(8, 4, rank=-2), ValueError, "rank is -2, expected an integer from 1 to 4"),
    "rank large": (lambda: LowRankLinear(8, 4, rank=5), ValueError, "rank is 5, expected an integer from 1 to 4"),
    "rank float": (lambda: LowRankLinear(8, 4, rank=2.0), TypeError, "rank is 2.0, expected an integer from 1 to 4"),
    "rank bool": (lambda: LowRankLinear(8, 4, rank=True), TypeError, "rank is True, expected an integer"),
    "dtype": (lambda: LowRankLinear(8, 4, rank=1, dtype=torch.double), TypeError, "dtype is fp64, expected fp32, bf16"),
    "module": (lambda: LINEAR(conv(), LowRank(rank=1)), TypeError, "the module is Conv2d, expected nn.Linear"),
    "twice": (
        lambda: LINEAR(LowRankLinear(8, 4, rank=2), LowRank(rank=1)), TypeError, "the module is LowRankLinear, exp",
    ),
    "config": (lambda: LINEAR(nn.Linear(8, 4), 3), TypeError, "config is 3, expected a burnish.LowRank"),
    "other config": (lambda: LINEAR(nn.Linear(8, 4), burnish.Int8()), TypeError, "config is Int8.*expected a burni"),
    "from rank large": (
        lambda: LINEAR(nn.Linear(8, 4), LowRank(rank=5)), ValueError, "from_float: rank is 5, expected .* from 1 to 4",
    ),
    "double": (lambda: LINEAR(nn.Linear(8, 4).double(), LowRank(rank=1)), TypeError, "dtype is fp64, expected fp32"),
    "NaN": (lambda: LINEAR(spoiled(), LowRank(rank=1)), ValueError, "the weight has NaN or Inf in 1 of 32 places"),
    "Inf": (
        lambda: LINEAR(spoiled(value=math.inf), LowRank(energy=0.9)), ValueError, "the weight has NaN or Inf in 1 o",
    ),
    "auto": (lambda: LINEAR(nn.Linear(8, 4), LowRank(rank="auto")), ValueError, "rank is 'auto', which needs measu"),
    "no moment": (lambda: LINEAR(nn.Linear(8, 4), AWARE), ValueError, "needs the second moment of the layer's inputs"),
    "moment shape": (
        lambda: LINEAR(nn.Linear(8, 4), AWARE, moment=torch.eye(4)), ValueError, r"moment has shape \(4, 4\), expected",
    ),
    "moment device": (
        lambda: LINEAR(nn.Linear(8, 4), AWARE, moment=torch.eye(8, device="meta")), ValueError, "the moment is on meta",
    ),
    "meta budget": (
        lambda: LINEAR(nn.Linear(8, 4, device="meta"), LowRank(energy=0.5)), ValueError, "the weight is on the meta",
    ),
    "x width": (lambda: LowRankLinear(8, 4, rank=2)(torch.zeros(2, 9)), RuntimeError, r"A has shape \(2, 8\), exp"),
    "x int": (lambda: LowRankLinear(8, 4, rank=2)(torch.zeros(2, 8).int()), RuntimeError, "x is int32, expected fp32"),
    "x double": (lambda: LowRankLinear(8, 4, rank=2)(torch.zeros(2, 8).double()), RuntimeError, "x is fp64, expected"),
    "conv rank zero": (lambda: LowRankConv2d(4, 8, 3, rank=0), ValueError, "rank is 0, expected .* from 1 to 8"),
    "conv rank large": (
        lambda: LowRankConv2d(4, 8, 3, rank=13, scheme="spatial"), ValueError, "rank is 13, expected .* from 1 to 12",
    ),
    "conv groups rank": (
        lambda: LowRankConv2d(4, 8, 3, groups=4, rank=3), ValueError, "rank is 3, expected an integer from 1 to 2",
    ),
    "conv rank float": (lambda: LowRankConv2d(4, 8, 3, rank=1.5), TypeError, "rank is 1.5, expected an integer"),
    "conv scheme": (lambda: LowRankConv2d(4, 8, 3, rank=1, scheme="cp"), ValueError, "scheme is 'cp', expected one of"),
    "conv groups": (lambda: LowRankConv2d(4, 8, 3, groups=3, rank=1), ValueError, "divisible by groups"),
    "conv dtype": (lambda: LowRankConv2d(4, 8, 3, rank=1, dtype=torch.double), TypeError, "dtype is fp64, expected"),
    "conv module": (lambda: CONV(nn.Linear(8, 4), LowRank(rank=1)), TypeError, "module is Linear, expected nn.Conv2d"),
    "conv NaN": (lambda: CONV(spoiled(conv), LowRank(rank=1)), ValueError, "NaN or Inf in 1 of 288 places"),
    "conv large": (lambda: CONV(conv(), LowRank(rank=9)), ValueError, "rank is 9, expected an integer from 1 to 8"),
    "conv moment": (lambda: CONV(conv(), AWARE), ValueError, "needs the second moment of the layer's inputs"),
    "conv moment shape": (
        lambda: CONV(conv(), AWARE, moment=torch.eye(4)), ValueError, r"has shape \(4, 4\), expected \(1, 36, 36\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("label", BAD_CALLS)
def test_bad_calls_are_refused(label: str) -> None:
    call, kind, match = BAD_CALLS[label]
    with pytest.raises(kind, match=match):
        call()


BAD_CONFIGS = {
    "none": ({}, ValueError, "LowRank: nothing given, expected exactly one of rank, energy and max_error"),
    "two": ({"rank": 3, "energy": 0.5}, ValueError, "rank and energy given, expected exactly one"),
    "budgets": ({"energy": 0.5, "max_error": 0.5}, ValueError, "energy and max_error given, expected exactly one"),
    "rank zero": ({"rank": 0}, ValueError, "rank is 0, expected an integer of at least 1 or 'auto'"),
    "rank negative": ({"rank": -4}, ValueError, "rank is -4, expected an integer of at least 1"),
    "rank fraction": ({"rank": 0.25}, TypeError, "rank is 0.25, expected an integer of at least 1 or 'auto'"),
    "rank whole float": ({"rank": 16.0}, TypeError, "rank is 16.0, expected an integer"),
    "rank bool": ({"rank": True}, TypeError, "rank is True, expected an integer"),
    "rank text": ({"rank": "full"}, TypeError, "rank is 'full', expected an integer of at least 1 or 'auto'"),
    "energy zero": ({"energy": 0}, ValueError, "energy is 0, expected 0 < energy <= 1"),
    "energy above": ({"energy": 1.01}, ValueError, "energy is 1.01, expected 0 < energy <= 1"),
    "energy percent": ({"energy": 95}, ValueError, "energy is 95, expected 0 < energy <= 1"),
    "energy NaN": ({"energy": math.nan}, ValueError, "energy is nan, expected 0 < energy <= 1"),
    "energy text": ({"energy": "most"}, TypeError, "energy is 'most', expected a number"),
    "error zero": ({"max_error": 0.0}, ValueError, "max_error is 0.0, expected 0 < max_error < 1"),
    "error one": ({"max_error": 1.0}, ValueError, "max_error is 1.0, expected 0 < max_error < 1"),
    "error NaN": ({"max_error": math.nan}, ValueError, "max_error is nan, expected 0 < max_error < 1"),
    "error bool": ({"max_error": True}, TypeError, "max_error is True, expected a number"),
    "method": ({"rank": 1, "method": "qr"}, ValueError, "method is 'qr', expected one of: svd, activation"),
    "conv": ({"rank": 1, "conv": "cp"}, ValueError, "conv is 'cp', expected one of: channel, spatial, tucker2"),
    "pair": ({"rank": 1, "method": "activation", "conv": "spatial"}, ValueError, "only conv='channel' sees whole"),
}  # fmt: skip


@pytest.mark.parametrize("label", BAD_CONFIGS)
def test_bad_configurations_are_refused(label: str) -> None:
    options, kind, match = BAD_CONFIGS[label]
    with pytest.raises(kind, match=match):
        LowRank(**options)


def test_configurations_are_values() -> None:
    for config in (LowRank(rank=4), LowRank(rank="auto"), LowRank(energy=0.9, method="activation"), LowRank(energy=1)):
        assert LowRank.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(ValueError, match="unknown options: ratio"):
        LowRank.from_dict({**LowRank(rank=4).to_dict(), "ratio": 2})


def test_state_of_another_shape_or_a_newer_version_is_refused() -> None:
    for make in (lambda rank: LowRankLinear(8, 6, rank=rank), lambda rank: LowRankConv2d(8, 6, 1, rank=rank)):
        layer, state = make(2), make(3).state_dict()
        with pytest.raises(RuntimeError, match="size mismatch for A"):
            layer.load_state_dict(state)
        with pytest.raises(RuntimeError, match=r'Missing key.*"A", "B".*\n.*Unexpected key.*"weight"'):
            layer.load_state_dict(layer.to_float().state_dict())
        state = layer.state_dict()
        state._metadata[""]["version"] = 2
        with pytest.raises(RuntimeError, match="state of version 2, this burnish reads up to 1"):
            layer.load_state_dict(state)


def broken() -> Model:
    """Its last layer cannot be factorised."""
    model = Model()
    with torch.no_grad():
        model.head.weight[3, 1] = math.nan
    return model


def calibrated(model: nn.Module | None = None) -> burnish.Calibration:
    return burnish.calibrate(model or Model(), [IDS])


class Wider(Model):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(32, 40)
        self.blocks[2].mlp = nn.Sequential(nn.Linear(32, 80), nn.GELU(), nn.Linear(80, 32))


FAILING = {
    "NaN": (LowRank(rank=4), {}, r"layer 'head': the weight has NaN or Inf in 1 of 1600 places"),
    "rank": (
        {"head": LowRank(rank=33)}, {},
        r"'head': rank is 33, expected an integer from 1 to 32; a rule with burnish.Keep\(\) leaves the layer out",
    ),
    "no calibration": (AWARE, {}, "layer 'blocks.0.q': method is 'activation', which needs the second moment"),
    "part of a model": (
        {"blocks.0.*": AWARE, "head": AWARE},
        {"calibration": burnish.calibrate(Model(), [IDS], filter_fn=lambda module, fqn: fqn.startswith("blocks"))},
        "layer 'head': method is 'activation', which needs the second moment",
    ),
    "another model": (
        AWARE, {"calibration": calibrated(Wider())}, r"layer 'blocks.2.mlp.2': the moment has shape \(80, 80\), exp",
    ),
    "another device": (
        AWARE, {"calibration": calibrated().to("meta")}, "layer 'blocks.0.q': the moment is on meta, expected cpu",
    ),
    "auto": (LowRank(rank="auto"), {}, "layer 'blocks.0.q': rank is 'auto', which needs measurements"),
}  # fmt: skip


@pytest.mark.parametrize("label", FAILING)
def test_a_failed_swap_names_the_layer_and_leaves_the_model_as_it_was(label: str) -> None:
    rules, options, match = FAILING[label]
    model = broken()
    before = snapshot(model)
    with pytest.raises(SwapError, match=match):
        swap_(model, rules, **options)
    assert same(before, snapshot(model))


@pytest.mark.parametrize("value", [{}, {"blocks.0.q": torch.eye(32)}, "cal"])
def test_a_calibration_of_another_type_is_refused(value) -> None:
    with pytest.raises(
        TypeError, match=r"swap_: calibration is a (dict|str), expected the result of burnish.calibrate"
    ):
        swap_(Model(), LowRank(rank=4), calibration=value)


class OwnConv(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight * 2, bias)


class Holding(nn.Conv2d):
    def __init__(self) -> None:
        super().__init__(4, 4, 3)
        self.register_buffer("count", torch.zeros(1))


KEPT = {
    "own forward": (lambda: OwnConv(4, 4, 3), "OwnConv is a subclass of Conv2d with its own forward"),
    "parametrized": (lambda: nn.utils.parametrizations.weight_norm(conv()), "it is parametrized: remove"),
    "lazy": (lambda: nn.LazyConv2d(4, 3), "it is lazy and has no shape yet: run one batch first"),
    "lazy linear": (lambda: nn.LazyLinear(4), "it is lazy and has no shape yet: run one batch first"),
    "double": (lambda: conv().double(), "its weight is fp64; low-rank has kernels for fp32, bf16 and fp16"),
    "buffer": (Holding, "it holds more than a convolution does: count"),
    "no inputs": (lambda: nn.Linear(0, 4), "it has no inputs"),
    "attention": (lambda: nn.MultiheadAttention(8, 2), "MultiheadAttention reads its weight directly"),
    "int8": (lambda: Int8Linear(8, 8), "already swapped"),
    "low-rank": (lambda: LowRankConv2d(8, 8, 3, rank=2), "already swapped"),
    "other convolution": (lambda: nn.Conv1d(4, 4, 3), "no low-rank form"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("label", KEPT)
def test_layers_that_cannot_be_swapped_are_kept_with_the_reason(label: str) -> None:
    make, reason = KEPT[label]
    model = nn.ModuleDict({"odd": make(), "fine": nn.Linear(8, 8)})
    kinds = [type(module) for module in model["odd"].modules()]
    report = swap_(model, LowRank(rank=1))
    assert [row.fqn for row in report.swapped] == ["fine"]
    assert any(row.reason.startswith(reason) for row in report.kept), [row.reason for row in report.kept]
    assert [type(module) for module in model["odd"].modules()] == kinds
