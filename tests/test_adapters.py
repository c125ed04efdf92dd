"""Adapter files: written as a whole, checked when read, refused in words; and training adapters alone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import burnish
import pytest
import torch
from burnish import CheckpointError, Int8, LoRA, durable, swap_
from burnish.nn import LoRALinear
from lora_models import Net, X
from safetensors.torch import load_file, save_file
from swap_models import same, snapshot
from torch import nn

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


def trained(rules=None, **options) -> Net:
    net = Net()
    swap_(net, rules or {"head": burnish.Keep(), "*": LoRA(r=4, lora_alpha=6, **options)})
    torch.manual_seed(9)
    with torch.no_grad():
        for parameter in burnish.trainable_only(net):
            parameter.normal_(std=0.2)
    return net.eval()


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    burnish.save_adapter(trained(), tmp_path / "adapter")
    return tmp_path / "adapter"


def test_trainable_only_freezes_all_else_and_the_state_is_the_adapters() -> None:
    net = Net()
    swap_(net, {"up": LoRA(r=4), "head": LoRA(r=2)})
    parameters = burnish.trainable_only(net)
    names = {"up.lora_A", "up.lora_B", "head.lora_A", "head.lora_B"}
    assert [id(p) for p in parameters] == [id(p) for n, p in net.named_parameters() if n in names]
    assert {n for n, p in net.named_parameters() if p.requires_grad} == names
    state = burnish.adapter_state_dict(net)
    assert state.keys() == names
    assert all(torch.equal(value, net.state_dict()[key]) for key, value in state.items())
    optimizer = torch.optim.AdamW(parameters, lr=0.1)
    frozen = {n: p.clone() for n, p in net.named_parameters() if n not in names}
    net(X).square().sum().backward()
    optimizer.step()
    assert all(torch.equal(p, frozen[n]) for n, p in net.named_parameters() if n in frozen)
    other = Net()
    swap_(other, {"up": LoRA(r=4), "head": LoRA(r=2)})
    other.load_state_dict(burnish.adapter_state_dict(net), strict=False)
    assert torch.equal(other(X), net(X))


@pytest.mark.parametrize("dtype", [None, "bf16", "fp16"])
@pytest.mark.parametrize("base", ["float", "int8"])
def test_round_trip_is_exact_and_keeps_the_objects(dtype: str | None, base: str, tmp_path: Path) -> None:
    net = trained(dtype=dtype, lora_dropout=0.1, use_rslora=True)
    burnish.save_adapter(net, tmp_path)
    assert sorted(os.listdir(tmp_path)) == [CONFIG, TENSORS]
    other = Net().eval()
    if base == "int8":
        swap_(other, {"up": Int8(), "inner.down": Int8()})
    assert burnish.load_adapter(other, tmp_path) == ("inner.down", "up")
    state = burnish.adapter_state_dict(net)
    for _ in range(2):
        found = burnish.adapter_state_dict(other)
        assert all(torch.equal(found[k], v) and found[k].dtype == v.dtype for k, v in state.items())
        assert (other.up.scaling, other.up.lora_dropout, other.up.config.use_rslora) == (3.0, 0.1, True)
        held = [id(p) for p in burnish.trainable_only(other)]
        with torch.no_grad():
            other.up.lora_A.zero_()
        burnish.load_adapter(other, tmp_path)
        assert [id(p) for p in burnish.trainable_only(other)] == held


def test_layers_that_differ_are_described_by_patterns(tmp_path: Path) -> None:
    rules = {"up": LoRA(r=4, lora_alpha=4), "inner.down": LoRA(r=2, use_rslora=True), "head": LoRA(r=4, lora_alpha=4)}
    net = trained(rules)
    burnish.save_adapter(net, tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (4, 4, False)
    assert config["rank_pattern"] == {r"^inner\.down": 2}
    assert config["alpha_pattern"] == {r"^inner\.down": pytest.approx(8 * 2**0.5)}
    other = Net().eval()
    burnish.load_adapter(other, tmp_path)
    torch.testing.assert_close(other(X), net(X), rtol=1e-6, atol=1e-6)


def test_targets_mean_the_adapted_layers_alone(tmp_path: Path) -> None:
    def written(names: list[str]) -> object:
        net = nn.ModuleDict({"a": nn.ModuleDict({"q": nn.Linear(4, 4), "k": nn.Linear(4, 4)}), "q": nn.Linear(4, 4)})
        swap_(net, {f"re:{name}": LoRA(r=1) for name in names})
        burnish.save_adapter(net, tmp_path)
        return json.loads((tmp_path / CONFIG).read_text())["target_modules"]

    assert written(["q", r"a\.q"]) == ["q"]
    assert written([r"a\.q"]) == ["a.q"]
    assert written(["q", r"a\.k"]) == r"a\.k|q"


def _json(**changes):
    def change(folder: Path) -> None:
        config = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps({**config, **changes}))
        _tensors(lambda t: t)(folder)  # without the hashes, as peft writes

    return change


def _tensors(edit):
    def change(folder: Path) -> None:
        tensors = load_file(folder / TENSORS)
        edit(tensors)
        save_file(tensors, folder / TENSORS, {"format": "pt"})

    return change


def _key(name: str = "up", factor: str = "A") -> str:
    return f"base_model.model.{name}.lora_{factor}.weight"


def _bytes(name: str, edit):
    def change(folder: Path) -> None:
        raw = bytearray((folder / name).read_bytes())
        (folder / name).write_bytes(edit(raw))

    return change


def _flipped(raw: bytearray) -> bytearray:
    raw[-3] ^= 4
    return raw


def _move(old: str, new: str, edit=lambda t: t):
    return _tensors(lambda t: t.update({new: edit(t.pop(old)).contiguous()}))


BAD_FILES = {
    "no config": (lambda f: (f / CONFIG).unlink(), f"holds no file {CONFIG}"),
    "no tensors": (lambda f: (f / TENSORS).unlink(), f"holds no file {TENSORS}"),
    "config cut": (_bytes(CONFIG, lambda raw: raw[:40]), "does not belong to"),
    "config is no JSON": (lambda f: (_tensors(lambda t: t)(f), (f / CONFIG).write_text("{")), f"{CONFIG}: Expecting"),
    "config is a list": (lambda f: (_tensors(lambda t: t)(f), (f / CONFIG).write_text("[]")), "is a list, expected"),
    "config of another save": (_bytes(CONFIG, lambda raw: raw.replace(b'"r": 4', b'"r": 5')), "the last save did not"),
    "tensors cut": (_bytes(TENSORS, lambda raw: raw[:-5]), "cannot be read"),
    "tensors empty": (_bytes(TENSORS, lambda raw: b""), "cannot be read"),
    "bit flipped": (_bytes(TENSORS, _flipped), "is damaged: its tensors do not match"),
    "missing": (_tensors(lambda t: t.pop(_key(factor="B"))), f"{_key(factor='B')}' is missing"),
    "all missing": (_tensors(lambda t: t.clear()), "the file has no tensors"),
    "extra": (_move(_key(), "base_model.model.up.lora_magnitude_vector"), "lora_magnitude_vector', expected base"),
    "bias": (_move(_key(), "base_model.model.up.lora_B.bias"), "lora_B.bias', expected base_model.model.<layer>"),
    "no prefix": (_move(_key(), "up.lora_A.weight"), "'up.lora_A.weight', expected base_model.model.<layer>"),
    "no layer": (
        _tensors(lambda t: t.update({_key("side", f): t.pop(_key("up", f)) for f in "AB"})),
        "side.lora_A.weight': the model has no layer 'side'",
    ),
    "no linear layer": (
        _tensors(lambda t: t.update({_key("inner", f): t.pop(_key("up", f)) for f in "AB"})),
        "ModuleDict 'inner' is refused: it is no linear layer",
    ),
    "wrong shape": (_move(_key(), _key(), lambda v: v[:, :-1]), r"shape \(4, 31\), expected \(4, 32\) for"),
    "wrong rows": (_move(_key(factor="B"), _key(factor="B"), lambda v: v[1:]), r"\(47, 4\), expected \(48, 4\)"),
    "wrong rank": (_move(_key(), _key(), lambda v: v[:3]), r"\(3, 32\), of rank 3, expected rank 4 as adapter"),
    "rank in config": (_json(r=5), r"of rank 4, expected rank 5 as adapter_config.json says"),
    "rank pattern": (_json(rank_pattern={"up": 2}), "up.lora_A.weight' has shape .*of rank 4, expected rank 2"),
    "three dimensions": (_move(_key(), _key(), lambda v: v[None]), r"is fp32 \(1, 4, 32\), expected a matrix of fp32"),
    "dtype": (_move(_key(), _key(), lambda v: v.double()), r"is fp64 \(4, 32\), expected a matrix of fp32"),
    "mixed dtypes": (_move(_key(), _key(), lambda v: v.half()), "lora_B.weight' is fp32, expected fp16 as lora_A is"),
    "peft type": (_json(peft_type="LOHA"), "peft_type is 'LOHA', expected 'LORA'"),
    "DoRA": (_json(use_dora=True), "use_dora is True, expected it to be absent"),
    "modules_to_save": (_json(modules_to_save=["head"]), r"modules_to_save is \['head'\], expected it to be absent"),
    "biases": (_json(bias="lora_only"), "bias is 'lora_only', expected 'none'"),
    "lora_bias": (_json(lora_bias=True), "lora_bias is True, expected it to be absent"),
    "newer option": (_json(use_tomorrow="yes"), "use_tomorrow is 'yes', expected it to be absent"),
    "changed base": (_json(init_lora_weights="olora"), "init_lora_weights is 'olora', which changes the base"),
    "bad r": (_json(r="4"), "LoRA: r is '4', expected an integer"),
    "bad alpha": (_json(lora_alpha=-1), "LoRA: lora_alpha is -1, expected a finite number above 0"),
    "bad dropout": (_json(lora_dropout=2), "LoRA: lora_dropout is 2, expected a probability"),
    "bad pattern": (_json(rank_pattern={"(": 2}), r"rank_pattern has the key '\(', which is not a regular expression"),
    "pattern list": (_json(alpha_pattern=["up"]), r"alpha_pattern is \['up'\], expected an object"),
    "pattern value": (_json(alpha_pattern={"up": 0}), "lora_alpha is 0, expected a finite number above 0"),
}  # fmt: skip


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("label", BAD_FILES)
def test_bad_files_are_refused_and_the_model_stays(label: str, adapted: bool, saved: Path) -> None:
    change, match = BAD_FILES[label]
    change(saved)
    if adapted and label in ("no layer", "no linear layer"):
        match = "' is no LoRALinear layer here"
    net = trained() if adapted else Net()
    before = snapshot(net)
    with pytest.raises(CheckpointError, match=f"load_adapter: .*{match}"):
        burnish.load_adapter(net, saved)
    assert same(before, snapshot(net))


def _merged() -> Net:
    net = trained()
    net.up.merge()
    return net


def _fused() -> nn.Module:
    net = Net()
    net.up = burnish.nn.Int8Linear(32, 48, activation="gelu")
    return net


def _double() -> nn.Module:
    net = Net()
    net.inner.double()
    return net


OTHER_MODELS = {
    "fewer": (lambda: trained({"up": LoRA(r=4, lora_alpha=6)}), "lora_A.weight': 'inner.down' is no LoRALinear layer"),
    "more": (
        lambda: trained({"*": LoRA(r=4, lora_alpha=6)}),
        "head.lora_A.weight' is missing: the model has that layer",
    ),
    "rank": (lambda: trained({"up": LoRA(r=4, lora_alpha=6), "*.down": LoRA(r=2)}), r"\(4, 48\), expected|has r 2"),
    "scaling": (lambda: trained(use_rslora=True), "'inner.down' has scaling 3.0 in the model, 1.5 in the file"),
    "dtype": (lambda: trained(dtype="bf16"), "'inner.down' has dtype 'bf16' in the model, 'fp32' in the file"),
    "init": (
        lambda: trained(init_lora_weights="pissa"),
        "has init_lora_weights 'pissa' in the model, 'default' in the",
    ),
    "merged": (_merged, r"'up' has its adapter merged: call unmerge\(\) first"),
    "fused": (_fused, "Int8Linear 'up' is refused: it is an Int8Linear that computes gelu"),
    "fp64": (_double, "Linear 'inner.down' is refused: its weight is fp64"),
    "meta": (lambda: Net().to("meta"), "is on meta: load the model's own values first"),
    "meta adapter": (lambda: trained().to("meta"), "is sharded or on meta, expected plain parameters"),
}


@pytest.mark.parametrize("label", OTHER_MODELS)
def test_another_model_is_refused_and_stays(label: str, saved: Path) -> None:
    build, match = OTHER_MODELS[label]
    net = build()
    before = {n: (id(t), t._version, t.requires_grad) for n, t in net.named_parameters()}
    modules = {n: id(m) for n, m in net.named_modules()}
    with pytest.raises(CheckpointError, match=f"load_adapter: .*{match}"):
        burnish.load_adapter(net, saved)
    assert before == {n: (id(t), t._version, t.requires_grad) for n, t in net.named_parameters()}
    assert modules == {n: id(m) for n, m in net.named_modules()}


BAD_CALLS = {
    "no layers": (lambda f: burnish.save_adapter(Net(), f), CheckpointError, "the model has no LoRALinear layers"),
    "no module": (
        lambda f: burnish.save_adapter({}, f),
        TypeError,
        "save_adapter: model is a dict, expected an nn.Module",
    ),
    "nor here": (lambda f: burnish.load_adapter(None, f), TypeError, "load_adapter: model is a NoneType, expected"),
    "meta": (
        lambda f: burnish.save_adapter(trained().to("meta"), f),
        CheckpointError,
        "is on the meta device and has no",
    ),
    "dropouts": (
        lambda f: burnish.save_adapter(trained({"up": LoRA(lora_dropout=0.1), "head": LoRA()}), f),
        CheckpointError,
        "the layers differ in lora_dropout: 0.1 in 'up', 0.0 in 'head'",
    ),
    "inits": (
        lambda f: burnish.save_adapter(trained({"up": LoRA(init_lora_weights="pissa"), "head": LoRA()}), f),
        CheckpointError,
        "the layers differ in init",
    ),
    "a file": (
        lambda f: (f.write_text("x"), burnish.save_adapter(trained(), f)),
        CheckpointError,
        "save_adapter: .* cannot be written",
    ),
    "reads a file": (
        lambda f: (f.write_text("x"), burnish.load_adapter(Net(), f)),
        CheckpointError,
        "load_adapter: .* is a file, expected the folder that save_adapter or peft's save_pretrained wrote",
    ),
    "nowhere": (lambda f: burnish.load_adapter(Net(), f / "x"), CheckpointError, "load_adapter: .* does not exist"),
}


@pytest.mark.parametrize("label", BAD_CALLS)
def test_bad_calls_are_refused(label: str, tmp_path: Path) -> None:
    call, kind, match = BAD_CALLS[label]
    with pytest.raises(kind, match=match):
        call(tmp_path / "adapter")


@pytest.mark.parametrize("failing", ["write", "rename of the tensors", "rename of the configuration"])
def test_a_save_that_fails_leaves_what_loads_or_says_so(failing: str, saved: Path, monkeypatch) -> None:
    before = {name: (saved / name).read_bytes() for name in os.listdir(saved)}
    replace = os.replace
    calls = []

    def fail(source: object, target: object) -> None:
        calls.append(target)
        if failing == "rename of the tensors" or (failing != "write" and len(calls) == 2):
            raise OSError(28, "No space left on device")
        replace(source, target)

    if failing == "write":
        monkeypatch.setattr(
            durable, "_flush", lambda path: (_ for _ in ()).throw(OSError(28, "No space left on device"))
        )
    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(CheckpointError, match=r"save_adapter: .*No space left"):
        burnish.save_adapter(trained({"head": LoRA(r=2)}), saved)
    monkeypatch.undo()
    net = Net()
    if failing == "rename of the configuration":
        with pytest.raises(CheckpointError, match="the last save did not come to its end"):
            burnish.load_adapter(net, saved)
        assert not [m for m in net.modules() if isinstance(m, LoRALinear)]
    else:
        assert {name: (saved / name).read_bytes() for name in os.listdir(saved)} == before
        burnish.load_adapter(net, saved)
    burnish.save_adapter(trained({"head": LoRA(r=2)}), saved)
    assert burnish.load_adapter(Net(), saved) == ("head",)
    assert sorted(os.listdir(saved)) == [CONFIG, TENSORS]


_FOREVER = """
import sys, burnish, torch
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_adapters import trained
torch.set_num_threads(1)
net = trained()
for number in range(1, 10**9):
    with torch.no_grad():
        for parameter in burnish.trainable_only(net):
            parameter.fill_(number)
    burnish.save_adapter(net, sys.argv[1])
    print(number, flush=True)
"""


def test_killed_while_saving_the_adapter_loads(tmp_path: Path) -> None:
    command = [sys.executable, "-c", _FOREVER, str(tmp_path), str(Path(__file__).parent)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    for _ in range(5):
        committed = int(child.stdout.readline())
    child.send_signal(signal.SIGKILL)
    committed = max([committed, *map(int, child.stdout.read().split())])
    child.wait()
    net = Net()
    burnish.load_adapter(net, tmp_path)
    values = {v for t in burnish.adapter_state_dict(net).values() for v in t.unique().tolist()}
    assert values in ({committed}, {committed + 1})
