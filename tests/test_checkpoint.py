"""save and load: exact, canonical, tied tensors once, files replaced as a whole."""

from __future__ import annotations

import copy
import hashlib
import json
from pathlib import Path

import burnish
import pytest
import torch
from burnish import Int8
from burnish.nn import Fused, Int8Linear
from checkpoint_models import IDS, Net, swapped
from safetensors.torch import load_file
from torch import nn


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    burnish.save(swapped(), tmp_path / "model")
    return tmp_path / "model"


def test_round_trip_is_exact(saved: Path) -> None:
    model = swapped()
    loaded = burnish.load(lambda: Net().eval(), saved)
    assert torch.equal(loaded(IDS), model(IDS))
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key
    assert isinstance(loaded.mlp[0], Int8Linear)
    assert loaded.mlp[0].activation == "gelu"
    assert loaded.mlp[0].config == Int8()
    assert isinstance(loaded.mlp[1], Fused)
    assert loaded.head.weight is loaded.embed.weight
    assert [name for name, p in loaded.named_parameters() if p.requires_grad] == [
        n for n, _ in model.named_parameters()
    ]


def test_loading_into_a_swapped_model_and_loading_twice(saved: Path) -> None:
    model = swapped()
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.zero_()
    for _ in range(2):
        burnish.load(model, saved)
        assert torch.equal(model(IDS), swapped()(IDS))


def test_parameters_stay_the_objects_that_optimizers_hold(saved: Path) -> None:
    model = Net().eval()
    bias = model.mlp[0].bias
    held = {name: p for name, p in model.named_parameters() if name not in ("mlp.0.weight", "mlp.2.weight")}
    burnish.load(model, saved)
    assert all(p is held[name] for name, p in model.named_parameters())
    assert model.mlp[0].bias is bias
    assert model.head.weight is model.embed.weight


def test_dtype_is_the_saved_one(tmp_path: Path) -> None:
    model = swapped().bfloat16()
    burnish.save(model, tmp_path)
    loaded = burnish.load(Net().eval(), tmp_path)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert loaded.mlp[0].weight_scale.dtype == torch.float32
    assert loaded.mlp[0].dtype == torch.bfloat16
    assert torch.equal(loaded(IDS), model(IDS))


def test_meta_model_loads(saved: Path) -> None:
    with torch.device("meta"):
        model = Net()
    loaded = burnish.load(model.eval(), saved)
    assert torch.equal(loaded(IDS), swapped()(IDS))
    assert loaded.head.weight is loaded.embed.weight
    loaded = burnish.load(lambda: Net().eval().to("meta"), saved, device="cpu")
    assert torch.equal(loaded(IDS), swapped()(IDS))


def test_model_without_swapped_layers_is_saved_too(tmp_path: Path) -> None:
    burnish.save(Net(), tmp_path)
    model = Net()
    with torch.no_grad():
        model.mlp[0].weight.zero_()
    assert torch.equal(burnish.load(model, tmp_path).mlp[0].weight, Net().mlp[0].weight)


def test_int8_layers_that_share_a_weight_do_so_after_loading(tmp_path: Path) -> None:
    def make() -> nn.Module:
        model = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))
        model[2].weight = model[0].weight
        return model

    model = make()
    burnish.swap_(model, Int8())
    burnish.save(model, tmp_path)
    assert json.loads((tmp_path / "burnish.json").read_text())["tied"] == {
        "2.weight": "0.weight",
        "2.weight_scale": "0.weight_scale",
    }
    loaded = burnish.load(make, tmp_path)
    assert loaded[2].weight_packed is loaded[0].weight_packed
    assert loaded[2].weight_scale is loaded[0].weight_scale
    assert torch.equal(loaded[1].weight, model[1].weight)
    untied = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))
    assert burnish.load(untied, tmp_path)[2].weight_packed is untied[0].weight_packed


def test_files_are_plain(saved: Path) -> None:
    assert sorted(path.name for path in saved.iterdir())[0] == "burnish.json"
    recipe = json.loads((saved / "burnish.json").read_text())
    payload = saved / recipe["payload"]["file"]
    assert [path.name for path in saved.iterdir() if path.suffix != ".json"] == [payload.name]
    assert hashlib.sha256(payload.read_bytes()).hexdigest() == recipe["payload"]["sha256"]
    assert recipe["layers"]["mlp.0"]["activation"] == "gelu"
    assert recipe["fused"] == {"mlp.1": {"activation": "gelu", "into": "mlp.0"}}
    assert recipe["tied"] == {"head.weight": "embed.weight"}
    tensors = load_file(payload)
    assert tensors["mlp.0.weight"].dtype == torch.int8
    assert tuple(tensors["mlp.0.weight"].shape) == (40, 24)
    assert "head.weight" not in tensors


def test_saving_again_replaces_and_cleans_up(saved: Path) -> None:
    first = sorted(saved.iterdir())
    (saved / ".burnish-999999").mkdir()
    (saved / ".burnish-999999" / "payload").write_bytes(b"left by a killed process")
    (saved / "notes.txt").write_text("not ours")
    model = swapped()
    with torch.no_grad():
        model.mlp[0].bias.zero_()
    burnish.save(model, saved)
    names = {path.name for path in saved.iterdir()}
    assert len(names) == 3
    assert "notes.txt" in names
    assert {path.name for path in first} != names - {"notes.txt"}
    assert not burnish.load(Net(), saved).mlp[0].bias.any()


def test_empty_and_scalar_tensors(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(0, 3), nn.BatchNorm1d(3))
    model.register_buffer("none", torch.empty(0, 4))
    burnish.save(model, tmp_path)
    fresh = copy.deepcopy(model)
    with torch.no_grad():
        fresh[0].bias.zero_()
    assert torch.equal(burnish.load(fresh, tmp_path)[0].bias, model[0].bias)


@pytest.mark.parametrize("saved_compiled", [True, False, "by its wrapper's names"])
@pytest.mark.parametrize("loaded_compiled", [True, False])
def test_a_compiled_model_and_a_plain_one_have_one_checkpoint(
    saved_compiled: bool | str, loaded_compiled: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch._dynamo.reset()

    def compiled(model: nn.Module, wanted: bool) -> nn.Module:
        return torch.compile(model, backend="eager") if wanted else model

    model = swapped()
    with monkeypatch.context() as patched:
        if isinstance(saved_compiled, str):
            patched.setattr(burnish.checkpoint, "_uncompiled", lambda model: model)
        burnish.save(compiled(model, bool(saved_compiled)), tmp_path)
    given = compiled(Net().eval(), loaded_compiled)
    given(IDS)
    assert burnish.load(given, tmp_path) is given
    assert torch.equal(given(IDS), model(IDS))
