"""swap_ with sparse configurations: what goes, what is kept and why, the way back, and checkpoints."""

from __future__ import annotations

import json
from pathlib import Path

import burnish
import pytest
import torch
from burnish import BlockSparse, CheckpointError, Sparse, Sparse24, SwapError, prune, swap_
from burnish import measure as timing
from burnish.measure import Times
from burnish.nn import BlockSparseLinear, Sparse24Linear, SparseConv2d, SparseLinear
from burnish.prune.masking import parameter_of
from safetensors.torch import load_file
from sparse_models import mask_for
from swap_models import IDS, Model, same, snapshot
from torch import nn


class Vision(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 32, 3, stride=2, padding=1)
        self.mid = nn.Conv2d(32, 64, 3, padding="same", padding_mode="circular", bias=False)
        self.group = nn.Conv2d(64, 64, 3, groups=2)
        self.head = nn.Linear(64, 48)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.mid(torch.relu(self.stem(x))))
        return self.head(torch.relu(self.group(x)).mean((2, 3)))


IMAGES = torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(0))
RULES = {"stem": BlockSparse((1, 16)), "mid": BlockSparse(16), "head": Sparse24()}


def zeroed(model: nn.Module, rules: dict, density: float = 0.2) -> nn.Module:
    """The model with the zeros that its rules need."""
    torch.manual_seed(1)
    with torch.no_grad():
        for fqn, config in rules.items():
            weight = model.get_submodule(fqn).weight
            weight.masked_fill_(~mask_for(config, len(weight), weight[0].numel(), density).view_as(weight), 0)
    return model.eval()


def vision() -> nn.Module:
    return zeroed(Vision(), RULES)


TEXT = {f"blocks.{i}.mlp.{j}": config for i in range(3) for j, config in ((0, Sparse24()), (2, Sparse()))}


def text() -> nn.Module:
    return zeroed(Model(), TEXT)


def test_pruned_layers_go_and_compute_the_same() -> None:
    for make, rules, x in ((vision, RULES, IMAGES), (text, TEXT, IDS)):
        model, expected = make(), make()(x)
        report = swap_(model, rules)
        assert {row.fqn for row in report.swapped} == set(rules)
        torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
        assert (
            report.bytes_after == sum(t.nbytes for t in (*model.parameters(), *model.buffers())) < report.bytes_before
        )
        assert not any(row.frozen for row in report.rows)
        assert [repr(model.get_submodule(fqn).config) for fqn in rules] == [repr(config) for config in rules.values()]
        model(x).square().mean().backward()
        assert all(p.grad is not None for fqn in rules for p in model.get_submodule(fqn).parameters())
    assert "SparseLinear any, 20" in str(report)
    assert "Sparse24Linear 2:4, 50 % kept" in str(report)


def test_revert_puts_the_very_modules_back() -> None:
    model = vision()
    before, expected = snapshot(model), model(IMAGES)
    report = swap_(model, {"mid": BlockSparse(16, values="int8"), "head": Sparse24("int8")})
    assert [row.frozen for row in report.rows if row.became] == [True, True]
    assert "2 weights could be trained before and are frozen now" in str(report)
    report.revert()
    assert same(before, snapshot(model))
    assert torch.equal(model(IMAGES), expected)
    report = swap_(model, RULES)
    model.bfloat16()
    report.revert()
    assert model(IMAGES.bfloat16()).dtype == torch.bfloat16


def test_layers_without_the_pattern_are_kept_with_the_place() -> None:
    model = vision()
    with torch.no_grad():
        model.head.weight[3, 28:31] = 1
    reasons = {row.fqn: row.reason for row in swap_(model, Sparse24()).kept}
    assert reasons["head"] == (
        "not 2:4 along K: row 3, group 7 has 3 non-zeros, 1 of 768 groups have more than two; prune it first with "
        "burnish.prune"
    )
    assert reasons["mid"] == "no 2:4 form"
    report = swap_(model, {"group": BlockSparse(), "head": BlockSparse(32), "mid": BlockSparse(16, density=0.1)})
    reasons = {row.fqn: row.reason for row in report.kept}
    assert reasons["group"] == "it has 2 groups; block-sparse has kernels for one"
    assert reasons["head"].startswith("BlockSparseLinear 32x32 blocks, 100 % kept, it would take 16")
    assert "of its blocks have non-zeros, more than the density of 10 %" in reasons["mid"]
    assert not report.swapped
    kept = swap_(Model(), Sparse()).kept[1]
    assert kept.reason.endswith("it has too few zeros or is too small; prune it further with burnish.prune")


def test_masks_of_torch_and_of_burnish_are_taken_over() -> None:
    for mask in ("torch", "burnish"):
        model, plain = vision(), vision()
        mask24 = model.head.weight != 0
        with torch.no_grad():
            plain.head.weight.copy_(model.head.weight.uniform_(-1, 1) * mask24)
        if mask == "torch":
            nn.utils.prune.custom_from_mask(model.head, "weight", mask24)
        else:
            prune.mask_(model, {"head": mask24})
        with torch.no_grad():
            parameter_of(model.head).add_(torch.where(mask24, 0.0, 7.0))  # what lies beneath is not read
        before = snapshot(model)
        report = swap_(model, {"head": Sparse24()})
        (row,) = report.swapped
        assert row.was == "Linear 64->48 fp32, masked"
        assert type(model.head) is Sparse24Linear
        assert torch.equal(model.head.to_dense(), plain.head.weight)
        assert not hasattr(model.head, "weight_mask")
        assert not model.head._forward_pre_hooks
        torch.testing.assert_close(model(IMAGES), plain(IMAGES), rtol=1e-5, atol=1e-5)
        report.revert()
        assert same(before, snapshot(model))


def test_an_odd_mask_keeps_the_layer() -> None:
    model = nn.ModuleDict({name: nn.Linear(64, 64) for name in ("hook", "bias", "both", "fine")})
    for module in model.values():
        nn.utils.prune.random_unstructured(module, "weight", 0.8)
    model["hook"].register_forward_pre_hook(lambda module, args: None)
    nn.utils.prune.random_unstructured(model["bias"], "bias", 0.5)
    nn.utils.parametrizations.weight_norm(nn.utils.prune.remove(model["both"], "weight"))
    report = swap_(model, Sparse())
    assert [row.fqn for row in report.swapped] == ["fine"]
    reasons = {row.fqn: row.reason for row in report.kept}
    assert reasons["hook"].startswith("it has forward pre-hooks beside its mask's")
    assert reasons["bias"].startswith("its bias has a pruning mask")
    assert reasons["both"].startswith("it is parametrized")
    assert "it is parametrized" in swap_(masked_model(), burnish.Int8()).kept[0].reason


def masked_model() -> nn.Module:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    prune.Pruner(model, prune.Magnitude(), prune.Unstructured(), 0.8, filter_fn=lambda m, fqn: fqn == "0").step()
    return model


def test_a_nan_calls_the_swap_off_and_names_the_layer() -> None:
    model = text()
    with torch.no_grad():
        model.blocks[2].mlp[2].weight[3, 1] = torch.nan
    before = snapshot(model)
    with pytest.raises(
        SwapError, match=r"layer 'blocks.2.mlp.2': the weight has NaN or Inf in 1 of 2048 places, first"
    ):
        swap_(model, TEXT)
    assert same(before, snapshot(model))
    with pytest.raises(SwapError, match="the weight is on the meta device"):
        swap_(nn.ModuleList([nn.Linear(64, 64, device="meta")]), Sparse())


def test_measure_keeps_the_dense_layer_where_it_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    def times(contests):
        assert all(contest.before.__self__.weight.shape == (64, 64) for contest in contests)
        return [
            Times(contest.shape[0], 100.0, 50.0 if isinstance(contest.after.__self__, Sparse24Linear) else 200.0)
            for contest in contests
        ]

    monkeypatch.setattr(timing, "times", times)
    model = zeroed(
        nn.Sequential(*(nn.Linear(64, 64) for _ in range(3))), {"0": Sparse24(), "1": Sparse(), "2": Sparse()}
    )
    prune.mask_(model, {"2": model[2].weight != 0})
    report = swap_(model, {"0": Sparse24(), "*": Sparse()}, measure=7)
    assert [row.became is None for row in report.rows] == [False, True, True]
    assert report.rows[1].reason == "sparse is not faster here"
    assert "100 -> 200 us at 7 rows" in str(report)
    assert "parametrizations.2.weight" not in model.state_dict()
    assert prune.masks(model).keys() == {"2"}


def test_measure_on_the_clock_of_this_machine() -> None:
    model = nn.Sequential(nn.Linear(2048, 2048), nn.Linear(2048, 4))
    with torch.no_grad():
        model[0].weight.zero_()[:64, :64] = 1
    report = swap_(model, {"0": BlockSparse(32)}, measure=(torch.randn(64, 2048),))
    times = report.rows[0].times
    assert times.rows == 64
    assert times.after_us < times.before_us
    assert isinstance(model[0], BlockSparseLinear)


def tied() -> nn.ModuleList:
    torch.manual_seed(2)
    model = nn.ModuleList([nn.Linear(64, 64), nn.Linear(64, 64), nn.Conv2d(16, 16, 3), nn.Conv2d(16, 16, 3, stride=2)])
    model[1].weight, model[3].weight = model[0].weight, model[2].weight
    return zeroed(model, {"0": BlockSparse(16), "2": BlockSparse(16)})


@pytest.mark.parametrize("values", ["float", "int8"])
def test_tied_layers_share_their_values_and_index(values: str, tmp_path: Path) -> None:
    model = tied()
    report = swap_(model, BlockSparse(16, values=values))
    model.bfloat16()
    burnish.save(model, tmp_path)
    for net in (model, burnish.load(tied(), tmp_path)):
        for first, second in ((0, 1), (2, 3)):
            for name in ("values", "crow_indices", "col_indices", "transposed_index", "scale"):
                assert getattr(net[first], name) is getattr(net[second], name), name
            assert net[first].bias is not net[second].bias
    assert [row.tied for row in report.rows] == [None, "0", None, "2"]


@pytest.mark.parametrize(("make", "rules"), [(vision, RULES), (text, TEXT)])
def test_save_and_load(make, rules, tmp_path: Path) -> None:
    model = make()
    x = IMAGES.bfloat16() if make is vision else IDS
    swap_(model, rules)
    model.bfloat16()
    burnish.save(model, tmp_path)
    with torch.device("meta"):
        empty = Vision() if make is vision else Model()
    masked = (Vision if make is vision else Model)()
    fqn = next(iter(rules))
    prune.mask_(masked, {fqn: torch.rand_like(masked.get_submodule(fqn).weight) < 0.5})
    for target in ((Vision if make is vision else Model)(), empty, masked, model):
        loaded = burnish.load(target.eval(), tmp_path)
        state = loaded.state_dict()
        assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
        assert [repr(module) for module in loaded.modules()] == [repr(module) for module in model.modules()]
        assert all(parameter.requires_grad for parameter in loaded.parameters())
        assert torch.equal(loaded(x), model(x))


SIZES = {
    "block": (BlockSparse(32), 0.1, 0.1),
    "block int8": (BlockSparse(32, values="int8"), 0.1, 0.05),
    "2:4": (Sparse24(), 0.5, 0.5 + 1 / 16),
    "2:4 int8": (Sparse24("int8"), 0.5, 0.25 + 1 / 16),
    "any": (Sparse(), 0.1, 0.1 + 1 / 16),
}


@pytest.mark.parametrize("label", SIZES)
def test_checkpoints_hold_the_compressed_form(label: str, tmp_path: Path) -> None:
    config, density, factor = SIZES[label]

    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(512, 512, bias=False, dtype=torch.bfloat16))

    model = make()
    with torch.no_grad():
        if isinstance(config, Sparse24):
            mask = mask_for(config, 512, 512)
        else:
            side = 32 if isinstance(config, BlockSparse) else 1
            units = torch.randperm((512 // side) ** 2).view(512 // side, -1) < round(density * (512 // side) ** 2)
            mask = units.repeat_interleave(side, 0).repeat_interleave(side, 1)
        model[0].weight.masked_fill_(~mask, 0)
    swap_(model, config)
    burnish.save(model, tmp_path)
    (payload,) = tmp_path.glob("*.safetensors")
    size = payload.stat().st_size / (512 * 512 * 2)
    assert factor - 0.002 < size < factor + 0.03, size
    tensors = load_file(payload)
    assert set(tensors) == {f"0.{key}" for key in model[0].state_dict()}
    loaded = burnish.load(make(), tmp_path)
    assert torch.equal(loaded[0].to_dense(), model[0].to_dense())


def test_a_checkpoint_of_other_sizes_is_refused_and_loads_nothing(tmp_path: Path) -> None:
    model = vision()
    swap_(model, RULES)
    burnish.save(model, tmp_path)
    recipe = json.loads((tmp_path / "burnish.json").read_text())
    assert recipe["layers"]["head"] == {
        "kind": "Sparse24Linear", "config": Sparse24().to_dict(), "in_features": 64, "out_features": 48, "bias": True,
        "nnz": 1536,
    }  # fmt: skip
    assert recipe["layers"]["mid"]["kernel_size"] == [3, 3]
    nnz = model.mid.nnz
    for name, layer, match in (
        ("head", nn.Linear(64, 47), "'head' has out_features 47 in the model, 48 in the checkpoint"),
        ("mid", nn.Conv2d(32, 64, 3, bias=False), "'mid' has padding .* in the model, same"),
        ("mid", nn.Linear(288, 64), "'mid' has kind Linear in the model, SparseConv2d in the checkpoint"),
        ("head", SparseLinear(64, 48, density=0.5), "has Sparse24Linear at 'head', the model a SparseLinear"),
        (
            "mid", SparseConv2d(32, 64, 3, padding="same", padding_mode="circular", bias=False, density=1, block=16),
            f"'mid' has nnz 72 in the model, {nnz} in the checkpoint",
        ),
    ):  # fmt: skip
        other = Vision()
        setattr(other, name, layer)
        before = snapshot(other)
        with pytest.raises(CheckpointError, match=match):
            burnish.load(other, tmp_path)
        assert same(before, snapshot(other))
