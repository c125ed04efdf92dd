"""swap_ and checkpoints with LoRA: adapters around float and int8 layers, reported, undone, saved and loaded."""

from __future__ import annotations

from pathlib import Path

import burnish
import pytest
import torch
from burnish import Int8, Keep, LoRA, swap_
from burnish.nn import Int8Linear, LoRALinear
from lora_models import Net, X
from swap_models import same, snapshot
from torch import nn


def trained(net: nn.Module) -> nn.Module:
    """With adapters that are not zero."""
    torch.manual_seed(4)
    for layer in net.modules():
        if isinstance(layer, LoRALinear):
            nn.init.normal_(layer.lora_B, std=0.2)
    return net


@pytest.mark.parametrize("options", [{}, {"init_lora_weights": "pissa"}])
def test_swap_keeps_the_modules_and_revert_restores_everything(options: dict) -> None:
    net = Net().eval()
    expected, before = net(X), snapshot(net)
    up = net.up
    report = swap_(net, {"head": Keep(), "*": LoRA(r=4, **options)})
    assert [row.became for row in report.swapped] == ["LoRALinear r=4"] * 2
    torch.testing.assert_close(net(X), expected, rtol=1e-5, atol=1e-5)
    assert (net.up.base_layer is up) == (not options)
    assert not net.up.training
    held = sum(t.nbytes for t in net.parameters())
    assert report.bytes_after == held
    assert sum(row.bytes_after - row.bytes_before for row in report.rows) == held - report.bytes_before
    assert "frozen now" not in str(report)
    assert [n for n, p in net.named_parameters() if p.requires_grad] == [
        "up.lora_A", "up.lora_B", "inner.down.lora_A", "inner.down.lora_B", "head.weight", "head.bias"
    ]  # fmt: skip
    trained(net)
    net.up.merge()
    report.revert()
    assert same(before, snapshot(net))
    assert torch.equal(net(X), expected)


def test_int8_layers_get_adapters_and_adapted_layers_are_left() -> None:
    net = Net()
    swap_(net, {"up": Int8(), "inner.down": Int8()})
    packed, expected = net.up.weight_packed, net(X)
    report = swap_(net, LoRA(r=4))
    assert [row.became for row in report.swapped] == ["LoRALinear r=4 on Int8Linear"] * 2 + ["LoRALinear r=4"]
    torch.testing.assert_close(net(X), expected, rtol=1e-6, atol=1e-6)
    assert net.up.base_layer.weight_packed is packed
    assert "up.base_layer" not in {row.fqn for row in report.rows}
    again = swap_(trained(net), {"*": LoRA(r=2)})
    assert {row.reason for row in again.kept} == {"already swapped"}
    assert [row.fqn for row in again.rows] == ["up", "inner.down", "head"]
    later = swap_(net, Int8())
    assert {row.reason for row in later.kept} == {"already swapped"}
    report.revert()
    assert isinstance(net.up, Int8Linear)


def test_fused_and_tied_layers() -> None:
    net = nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 16))
    swap_(net, {"0": Int8()})
    report = swap_(net, LoRA(r=2))
    assert report.kept[0].reason == "it is an Int8Linear that computes gelu, expected one without activation"
    tied = nn.ModuleDict({"embed": nn.Embedding(20, 16), "head": nn.Linear(16, 20, bias=False)})
    tied["head"].weight = tied["embed"].weight
    swap_(tied, LoRA(r=2))
    assert tied["head"].base_layer.weight is tied["embed"].weight
    trained(tied)["head"].merge()
    assert tied["head"].weight is not tied["embed"].weight


def test_hooks_and_handles_go_on() -> None:
    net, seen = Net(), []
    handle = net.up.register_forward_hook(lambda module, args, output: seen.append(type(module)))
    swap_(net, LoRA(r=2))
    net(X)
    net.up.merge()
    net(X)
    assert seen == [LoRALinear, LoRALinear]
    handle.remove()
    net(X)
    assert len(seen) == 2


@pytest.mark.parametrize("quantised", [(), ("up",), ("up", "inner.down", "head")])
@pytest.mark.parametrize("target", ["float", "same", "meta", "int8"])
def test_checkpoints_hold_adapters_and_what_they_sit_on(quantised: tuple, target: str, tmp_path: Path) -> None:
    def built() -> Net:
        net = Net()
        if quantised:
            swap_(net, {name: Int8() for name in quantised})
        swap_(net, {"up": LoRA(r=4, lora_alpha=3, lora_dropout=0.1), "head": LoRA(r=2, use_rslora=True, dtype="bf16")})
        return net

    net = trained(built())
    burnish.save(net, tmp_path)
    with torch.device("meta" if target == "meta" else "cpu"):
        other = built() if target == "same" else Net()
    if target == "int8" and quantised:
        swap_(other, {name: Int8() for name in quantised})
    held = dict(other.named_parameters())
    burnish.load(other, tmp_path)
    assert torch.equal(other.eval()(X), net.eval()(X))
    assert {n: (p.requires_grad, p.dtype) for n, p in other.named_parameters()} == {
        n: (p.requires_grad, p.dtype) for n, p in net.named_parameters()
    }
    assert (other.up.config, other.head.scaling) == (net.up.config, net.head.scaling)
    if target == "same":
        assert all(p is held[n] for n, p in other.named_parameters())


def test_checkpoint_of_pissa_holds_the_rest(tmp_path: Path) -> None:
    net = Net()
    swap_(net, LoRA(r=4, init_lora_weights="pissa"))
    burnish.save(net, tmp_path)
    other = burnish.load(Net, tmp_path)
    assert torch.equal(other(X), net(X))
    assert other.up.config.init_lora_weights == "pissa"


def _other_size() -> Net:
    net = Net()
    net.head = nn.Linear(32, 17)
    return net


def _ranked() -> Net:
    net = Net()
    swap_(net, {"up": LoRA(r=3), "head": LoRA(r=4)})
    return net


MISFITS = {
    "size": (_other_size, "'head' has out_features 17 in the model, 16 in the checkpoint"),
    "rank": (_ranked, "'up' has r 3 in the model, 4 in the checkpoint"),
    "no layer": (lambda: nn.Sequential(nn.Linear(32, 48)), "the checkpoint has a layer at 'up', the model has none"),
}


@pytest.mark.parametrize("label", MISFITS)
def test_a_checkpoint_of_another_model_changes_nothing(label: str, tmp_path: Path) -> None:
    build, match = MISFITS[label]
    net = Net()
    swap_(net, {"up": LoRA(r=4), "head": LoRA(r=4)})
    burnish.save(net, tmp_path)
    other = build()
    before = snapshot(other)
    with pytest.raises(burnish.CheckpointError, match=match):
        burnish.load(other, tmp_path)
    assert same(before, snapshot(other))


def test_a_load_that_fails_late_leaves_the_model_trainable(tmp_path: Path) -> None:
    net = Net()
    swap_(net, {"up": LoRA(r=4)})
    burnish.save(net, tmp_path)
    other = Net()
    other.head = nn.Linear(32, 16, bias=False)
    before = snapshot(other)
    with pytest.raises(burnish.CheckpointError, match="of another model"):
        burnish.load(other, tmp_path)
    assert same(before, snapshot(other))


def test_measuring_leaves_an_adapter_where_it_is_put() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 8))
    swap_(model, {"0": Int8()})
    report = swap_(model, LoRA(r=2), measure=4)
    assert [row.became for row in report.rows] == ["LoRALinear r=2 on Int8Linear", "LoRALinear r=2"]
