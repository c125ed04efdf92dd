"""Whole channels go by torch-pruning: what goes together goes, what leaves the model stays, failures change nothing."""

from __future__ import annotations

import copy
import math
import sys
from typing import Any

import burnish
import pytest
import torch
from burnish import prune
from swap_models import IDS, Model, same, snapshot
from torch import nn

needs_package = pytest.mark.usefixtures("package")


@pytest.fixture
def package() -> None:
    pytest.importorskip("torch_pruning", reason="torch-pruning is not installed")


class Net(nn.Module):
    """A residual sum, a batch norm, a mean over pixels."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a = nn.Conv2d(3, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.b = nn.Conv2d(16, 16, 3, padding=1)
        self.c = nn.Conv2d(16, 32, 3)
        self.head = nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.relu(self.norm(self.a(x)))
        return self.head(torch.relu(self.c(h + self.b(h))).mean((2, 3)))


X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@needs_package
@pytest.mark.parametrize("example", [X, (X,), {"x": X}], ids=["tensor", "tuple", "mapping"])
def test_layers_become_smaller_together(example: Any) -> None:
    model = Net()
    model.norm.eval()
    report = prune.channels_(model, example, 0.5)
    assert [(row.fqn, row.after) for row in report.rows] == [
        ("a", (8, 3, 3, 3)), ("b", (8, 8, 3, 3)), ("c", (16, 8, 3, 3)), ("head", (10, 16)),
    ]  # fmt: skip
    assert report.parameters_after == sum(p.numel() for p in model.parameters()) < report.parameters_before / 3
    assert model.norm.num_features == 8
    assert not model.norm.running_mean.any()  # the passes that trace leave no trace
    assert model.training
    assert not model.norm.training
    model(X).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert "c      32x16x3x3 -> 16x8x3x3" in str(report)
    assert report.to_dict()["rows"][0]["before"] == (16, 3, 3, 3)


@needs_package
def test_the_least_channels_go() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    small = [1, 4, 6]
    with torch.no_grad():
        model[0].weight[small] *= 1e-3
        model[2].weight[:, small] *= 1e-3
    expected = copy.deepcopy(model)
    keep = [n for n in range(8) if n not in small]
    prune.channels_(model, torch.randn(2, 6), 0.375)
    assert torch.equal(model[0].weight, expected[0].weight[keep])
    assert torch.equal(model[0].bias, expected[0].bias[keep])
    assert torch.equal(model[2].weight, expected[2].weight[:, keep])


@needs_package
def test_options() -> None:
    model = Net()
    report = prune.channels_(model, X, 0.4, round_to=8, filter_fn=lambda _, fqn: fqn != "a")
    assert {row.fqn for row in report.rows} == {"c", "head"}  # a and b go together
    assert model.c.out_channels == 16
    model = Net()
    with torch.no_grad():
        model.c.weight.mul_(100)
        model.head.weight.mul_(100)
    ours = prune.channels_(model, X, 0.3, scope="global", criterion=prune.Magnitude(p=1))
    assert ours.parameters_after < ours.parameters_before
    frozen = Net().requires_grad_(False)
    frozen.c.weight.requires_grad_(True)
    prune.channels_(frozen, X, 0.5)
    assert [name for name, p in frozen.named_parameters() if p.requires_grad] == ["c.weight"]


@needs_package
def test_encoders_are_pruned_and_then_swapped() -> None:
    model = Model()
    prune.channels_(model, IDS, 0.5)
    assert model.head.weight.shape == (50, 16)
    assert model(IDS).shape == (4, 10, 50)
    burnish.swap_(model, burnish.Int8())
    assert model(IDS).shape == (4, 10, 50)
    with pytest.raises(ValueError, match=r"layers are swapped, 'blocks\.0\.q' to Int8Linear: prune before"):
        prune.channels_(model, IDS, 0.5)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    burnish.swap_(model, {"0": burnish.Int8()})
    with pytest.raises(ValueError, match="layer '0' is a Int8Linear: take channels before swapping"):
        prune.channels_(model, torch.randn(2, 8), 0.5)


def with_nan(model: Net) -> Net:
    with torch.no_grad():
        model.c.weight[0, 0, 0, 0] = math.nan
    return model


def masked(model: Net) -> Net:
    prune.Pruner(model, prune.Magnitude(), prune.TwoFour()).step()
    return model


BAD = {
    "model": (lambda m: prune.channels_(3, X, 0.5), TypeError, "model is a int, expected an nn.Module"),
    "share": (lambda m: prune.channels_(m, X, 1.0), ValueError, r"sparsity is 1.0, expected a share of zeros in \[0,"),
    "share kind": (lambda m: prune.channels_(m, X, None), TypeError, r"sparsity is None, expected a number in \[0, 1"),
    "criterion": (
        lambda m: prune.channels_(m, X, 0.5, criterion=prune.Wanda()), TypeError, r"criterion is Wanda\(\), expected",
    ),
    "scope": (lambda m: prune.channels_(m, X, 0.5, scope=0), ValueError, "scope is 0, expected 'local' or 'global'"),
    "round": (lambda m: prune.channels_(m, X, 0.5, round_to=0), ValueError, "round_to is 0, expected a whole number"),
    "filter": (lambda m: prune.channels_(m, X, 0.5, filter_fn=lambda *_: 0), ValueError, "accepts none of 4 layers"),
    "no layers": (lambda m: prune.channels_(nn.ReLU(), X, 0.5), ValueError, "no linear or convolution layer"),
    "nothing": (lambda m: prune.channels_(m, X, 0.0), ValueError, "no layer has channels to take at sparsity 0.0 and"),
    "only outputs": (lambda m: prune.channels_(m.head, X[0, 0, :, :4].reshape(1, 32), 0.5), ValueError, "no layer has"),
    "inputs": (lambda m: prune.channels_(m, X[:, :2], 0.5), ValueError, "torch-pruning cannot take this model apart: "),
    "nan": (lambda m: prune.channels_(m, X, 0.5), ValueError, "layer 'c' has NaN or infinite weights"),
    "masked": (lambda m: prune.channels_(m, X, 0.5), ValueError, r"layer 'a' has a mask: call burnish.prune.remove_"),
    "meta": (lambda m: prune.channels_(m, X, 0.5), ValueError, "layer 'a' is on the meta device and has no values"),
}  # fmt: skip
PREPARED = {"nan": with_nan, "masked": masked, "meta": lambda m: m.to("meta")}


@needs_package
@pytest.mark.parametrize("label", BAD)
def test_bad_input_is_refused_and_changes_nothing(label: str) -> None:
    call, kind, match = BAD[label]
    model = PREPARED.get(label, lambda m: m)(Net())
    model.b.eval()
    before = snapshot(model)
    with pytest.raises(kind, match=match):
        call(model)
    if label != "meta":
        assert same(before, snapshot(model))


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(ModuleNotFoundError, match="channels_ needs torch-pruning: pip install torch-pruning"):
        prune.channels_(Net(), X, 0.5)
