"""Every damaged, foreign or unsavable checkpoint is refused in words, and nothing changes."""

from __future__ import annotations

import hashlib
import json
import random
import resource
import shutil
from collections.abc import Callable
from pathlib import Path

import burnish
import pytest
import torch
from burnish import CheckpointError, Int8
from burnish.durable import encode
from burnish.nn import Int8Linear
from checkpoint_models import IDS, Net, bits, equal, swapped
from safetensors.torch import load_file
from torch import nn


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    burnish.save(swapped(), tmp_path / "model")
    return tmp_path / "model"


def corruptions() -> list[tuple[str, int]]:
    draw = random.Random(2)
    kinds = ("flip payload", "flip recipe", "cut payload", "cut recipe", "grow", "zero page", "swap bytes")
    return [(kinds[index % len(kinds)], draw.randrange(1 << 30)) for index in range(28)]


@pytest.mark.parametrize(("kind", "seed"), corruptions())
def test_random_corruption_is_refused(kind: str, seed: int, saved: Path) -> None:
    draw = random.Random(seed)
    payload = next(saved.glob("*.safetensors"))
    path = saved / "burnish.json" if "recipe" in kind else payload
    data = bytearray(path.read_bytes())
    at = draw.randrange(len(data))
    if kind.startswith("flip"):
        data[at] ^= 1 << draw.randrange(8)
    elif kind.startswith("cut"):
        del data[at:]
    elif kind == "grow":
        data += draw.randbytes(1 + at % 9)
    elif kind == "zero page":
        start = min(at, len(data) - 600)
        data[start : start + 512] = draw.randbytes(512)
    else:
        other = next(i for i in range(len(data)) if data[i] != data[at])
        data[at], data[other] = data[other], data[at]
    path.write_bytes(data)
    model = Net().eval()
    before = bits(model)
    with pytest.raises(CheckpointError, match=r"is damaged|is truncated or changed"):
        burnish.load(model, saved)
    assert equal(before, bits(model))


def rewrite(folder: Path, change: Callable[[dict], object]) -> None:
    """Change the recipe and sign it again, as another version or a forger might."""
    recipe = json.loads((folder / "burnish.json").read_text())
    del recipe["checksum"]
    change(recipe)
    (folder / "burnish.json").write_bytes(encode(recipe))


def _recipe(change: Callable[[dict], object]) -> Callable[[Path], None]:
    return lambda folder: rewrite(folder, change)


def _payload(change: Callable[[Path], object]) -> Callable[[Path], object]:
    return lambda folder: change(next(folder.glob("*.safetensors")))


def _replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


def _replace_folder(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("a file")


BAD_FILES = {
    "no folder": (shutil.rmtree, "model does not exist"),
    "a file": (_replace_folder, "is a file, expected the folder that burnish.save wrote"),
    "no recipe": (lambda f: (f / "burnish.json").unlink(), "holds no burnish.json: it is no checkpoint"),
    "recipe a folder": (lambda f: _replace_by_folder(f / "burnish.json"), "json cannot be read: Is a directory"),
    "recipe unreadable": (lambda f: _loop(f / "burnish.json"), "burnish.json cannot be read: Too many levels"),
    "recipe empty": (lambda f: (f / "burnish.json").write_text(""), "burnish.json is damaged"),
    "recipe a list": (lambda f: (f / "burnish.json").write_text("[]"), "burnish.json is damaged"),
    "recipe binary": (lambda f: (f / "burnish.json").write_bytes(b"\xff\x00" * 40), "burnish.json is damaged"),
    "recipe deep": (lambda f: (f / "burnish.json").write_text("[" * 100000), "burnish.json is damaged"),
    "no payload": (_payload(Path.unlink), "model-.*, which the checkpoint names, is missing"),
    "payload a folder": (_payload(_replace_by_folder), "model-.* cannot be read: Is a directory"),
    "payload unreadable": (_payload(_loop), "model-.* cannot be read: Too many levels"),
    "payload empty": (_payload(lambda p: p.write_bytes(b"")), "has 0 bytes, expected .*truncated or changed"),
    "newer": (_recipe(lambda r: r.update(format=2)), "has format 2, written by burnish .*reads up to format 1"),
    "no format": (_recipe(lambda r: r.pop("format")), "has format None"),
    "no layers": (_recipe(lambda r: r.pop("layers")), "burnish.json is malformed: KeyError"),
    "layers a list": (_recipe(lambda r: r.update(layers=[1])), "burnish.json is malformed"),
    "no tied": (_recipe(lambda r: r.pop("tied")), "burnish.json is malformed"),
    "tied to nothing": (_recipe(lambda r: r["tied"].update(x="y")), "burnish.json is malformed: KeyError"),
    "payload elsewhere": (
        _recipe(lambda r: r["payload"].update(file="../../etc/passwd")), "payload is called '../../etc/passwd'",
    ),
    "config newer": (
        _recipe(lambda r: r["layers"]["mlp.0"]["config"].update(version=9)), "malformed: .*version 9, this burnish",
    ),
    "kind": (_recipe(lambda r: r["layers"]["mlp.0"].update(kind="Int4Linear")), "is a Int4Linear, which this burnish"),
    "activation": (
        _recipe(lambda r: r["layers"]["mlp.0"].update(activation="cube")), "malformed: .*activation is 'cube'",
    ),
    "layer missing": (_recipe(lambda r: r["layers"].pop("mlp.2")), "is of another model.*mlp.2.weight_scale"),
    "not a safetensors": (lambda f: _forge(f, b"not tensors at all"), "cannot be read: .*header"),
    "tensor missing": (lambda f: _drop(f, "mlp.2.bias"), 'is of another model.*Missing key.*"mlp.2.bias"'),
}  # fmt: skip


def _forge(folder: Path, data: bytes) -> None:
    """A payload of other content, with the recipe brought in line."""
    digest = hashlib.sha256(data).hexdigest()
    for old in folder.glob("*.safetensors"):
        old.unlink()
    name = f"model-{digest[:16]}.safetensors"
    (folder / name).write_bytes(data)
    rewrite(folder, lambda r: r.update(payload={"file": name, "sha256": digest, "bytes": len(data)}))


def _drop(folder: Path, key: str) -> None:
    from safetensors.torch import save

    tensors = load_file(next(folder.glob("*.safetensors")))
    del tensors[key]
    _forge(folder, save(tensors))


@pytest.mark.parametrize("label", BAD_FILES)
def test_bad_files_are_refused(label: str, saved: Path) -> None:
    damage, match = BAD_FILES[label]
    damage(saved)
    model = Net().eval()
    before = bits(model)
    with pytest.raises(CheckpointError, match=f"(?s){match}"):
        burnish.load(model, saved)
    assert equal(before, bits(model))


def _small_head() -> Net:
    model = Net()
    model.head = nn.Linear(24, 7, bias=False)
    return model


def _with_extra() -> Net:
    model = Net()
    model.extra = nn.Linear(3, 3)
    return model


def _int8_head() -> Net:
    model = Net()
    model.head = Int8Linear(24, 11, bias=False)
    return model


def _without_mlp() -> Net:
    model = Net()
    model.mlp = nn.Identity()
    return model


def _other_layer() -> Net:
    model = Net()
    model.mlp[0] = nn.Bilinear(24, 24, 40)
    return model


def _other_activation() -> Net:
    return Net(act=nn.ReLU)


def _unbiased() -> Net:
    model = Net()
    model.mlp[0] = nn.Linear(24, 40, bias=False)
    return model


def _parametrized() -> Net:
    model = Net()
    torch.nn.utils.parametrizations.weight_norm(model.mlp[0])
    return model


def _other_epilogue() -> Net:
    return _swapped_as(Net(act=nn.SiLU))


def _swapped_as(model: Net) -> Net:
    burnish.swap_(model, Int8())
    return model


BAD_MODELS = {
    "width": (lambda: Net(width=32), "'mlp.0' has in_features 32 in the model, 24 in the checkpoint"),
    "shape": (_small_head, "size mismatch for head.weight"),
    "extra layer": (_with_extra, 'Missing key.*"extra.weight", "extra.bias"'),
    "int8 where float": (
        _int8_head,
        "the model has Int8Linear at 'head', the checkpoint has a layer there that was not",
    ),
    "no layer": (_without_mlp, "the checkpoint has a layer at 'mlp.0', the model has none there"),
    "other layer": (_other_layer, "has Int8Linear at 'mlp.0', the model a Bilinear"),
    "other activation": (_other_activation, "has fused a gelu at 'mlp.1', the model has ReLU there"),
    "no bias": (_unbiased, "'mlp.0' has bias False in the model, True in the checkpoint"),
    "parametrized": (_parametrized, "'mlp.0' cannot be exchanged: it is parametrized"),
    "other epilogue": (_other_epilogue, "'mlp.0' has activation silu in the model, gelu in the checkpoint"),
}


@pytest.mark.parametrize("label", BAD_MODELS)
def test_checkpoint_of_another_model_is_refused(label: str, saved: Path) -> None:
    make, match = BAD_MODELS[label]
    model = make().eval()
    before = bits(model)
    with pytest.raises(CheckpointError, match=f"(?s){match}"):
        burnish.load(model, saved)
    assert equal(before, bits(model))


def test_model_that_ties_what_the_checkpoint_has_apart_is_refused(tmp_path: Path) -> None:
    model = Net()
    model.head.weight = nn.Parameter(torch.randn(11, 24))
    burnish.save(model, tmp_path)
    fresh = Net()
    before = bits(fresh)
    with pytest.raises(
        CheckpointError, match=r"the model ties 'embed.weight' and 'head.weight', the checkpoint has two"
    ):
        burnish.load(fresh, tmp_path)
    assert equal(before, bits(fresh))


def test_buffer_that_stays_on_meta_is_refused(tmp_path: Path) -> None:
    def make() -> nn.Module:
        model = nn.Sequential(nn.Linear(4, 4))
        model.register_buffer("table", torch.arange(4), persistent=False)
        return model

    burnish.save(make(), tmp_path)
    with torch.device("meta"):
        model = make()
    with pytest.raises(CheckpointError, match="'table' is not in the checkpoint and has no value: build the model on"):
        burnish.load(model, tmp_path)
    assert model[0].weight.is_meta


@pytest.mark.parametrize(("model", "match"), [
    (3, "load: model is a int, expected an nn.Module or a function"),
    (lambda: "net", "load: model is a str, expected an nn.Module or a function"),
])  # fmt: skip
def test_load_wants_a_model(model, match: str, saved: Path) -> None:
    with pytest.raises(TypeError, match=match):
        burnish.load(model, saved)


class Extra(nn.Module):
    def get_extra_state(self) -> dict:
        return {"step": 3}

    def set_extra_state(self, state: dict) -> None:
        raise NotImplementedError


class Tagged(torch.Tensor):
    pass


def _holding(tensor: torch.Tensor) -> nn.Module:
    model = nn.Module()
    model.register_buffer("t", tensor)
    return model


BAD_SAVES = {
    "not a module": (lambda: {"a": 1}, TypeError, "save: model is a dict, expected an nn.Module"),
    "meta": (lambda: nn.Linear(3, 3, device="meta"), CheckpointError, "'weight' is on the meta device and has no data"),
    "extra state": (Extra, CheckpointError, "state '_extra_state' is a dict, expected tensors only"),
    "sparse": (lambda: _holding(torch.eye(3).to_sparse()), CheckpointError, "'t' is not a dense tensor"),
    "subclass": (
        lambda: _holding(torch.ones(3).as_subclass(Tagged)), CheckpointError, "'t' is a Tagged, expected a plain",
    ),
    "complex": (
        lambda: _holding(torch.ones(3, dtype=torch.complex128)), CheckpointError, "'t' is complex128, which safe",
    ),
}  # fmt: skip


@pytest.mark.parametrize("label", BAD_SAVES)
def test_what_cannot_be_saved_is_refused_and_the_old_checkpoint_stays(label: str, saved: Path) -> None:
    make, kind, match = BAD_SAVES[label]
    with pytest.raises(kind, match=match):
        burnish.save(make(), saved)
    assert torch.equal(burnish.load(Net().eval(), saved)(IDS), swapped()(IDS))


def test_save_refuses_a_path_that_is_a_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("mine")
    with pytest.raises(CheckpointError, match=r"save: .*file cannot be written: .*exists"):
        burnish.save(Net(), path)
    assert path.read_text() == "mine"


def test_full_disk_leaves_the_old_checkpoint(saved: Path) -> None:
    """A limit on file size makes the same writes fail that a full disk does."""
    names = sorted(path.name for path in saved.iterdir())
    model = swapped()
    model.register_buffer("large", torch.zeros(1 << 16))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 15, limits[1]))
    try:
        with pytest.raises(CheckpointError, match=r"save: .* cannot be written: .*File too large"):
            burnish.save(model, saved)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(path.name for path in saved.iterdir()) == names
    assert torch.equal(burnish.load(Net().eval(), saved)(IDS), swapped()(IDS))


def test_flush_failure_leaves_the_old_checkpoint(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = sorted(path.name for path in saved.iterdir())
    calls = []

    def full(descriptor: int) -> None:
        calls.append(descriptor)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    model = swapped()
    with torch.no_grad():
        model.mlp[0].bias.zero_()
    with pytest.raises(CheckpointError, match="No space left on device"):
        burnish.save(model, saved)
    assert len(calls) == 1
    assert sorted(path.name for path in saved.iterdir()) == names
