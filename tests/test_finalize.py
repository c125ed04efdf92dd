"""finalize_: masks become the layers that are fast for them, or zeros; measured, reported, taken back."""

from __future__ import annotations

import copy

import burnish
import pytest
import torch
from burnish import BlockSparse, Sparse, Sparse24, SwapError, prune
from burnish import measure as timing
from burnish.measure import Times
from burnish.nn import BlockSparseLinear, Sparse24Linear, SparseConv2d, SparseLinear
from sparse_models import mask_for
from swap_models import same, snapshot
from torch import nn


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(16, 64, 3, padding=1)
        self.group = nn.Conv2d(64, 64, 3, groups=4)
        self.block = nn.Linear(64, 128)
        self.pair = nn.Linear(128, 64)
        self.any = nn.Linear(64, 64)
        self.out = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.group(torch.relu(self.conv(x)))).mean((2, 3))
        return self.out(self.any(torch.relu(self.pair(torch.relu(self.block(x))))))


IMAGES = torch.randn(3, 16, 6, 6, generator=torch.Generator().manual_seed(0))
MASKS = {"conv": BlockSparse(16), "group": Sparse(), "block": BlockSparse(32), "pair": Sparse24(), "any": Sparse()}


def masked(by: str = "burnish") -> Net:
    model = Net().eval()
    torch.manual_seed(3)
    masks = {}
    for fqn, config in MASKS.items():
        weight = model.get_submodule(fqn).weight
        masks[fqn] = mask_for(config, len(weight), weight[0].numel(), 0.2).view_as(weight)
    if by == "burnish":
        prune.mask_(model, masks)
    else:
        for fqn, mask in masks.items():
            nn.utils.prune.custom_from_mask(model.get_submodule(fqn), "weight", mask)
    return model


class Race:
    """Stands for the clock: these classes win."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *winners: type) -> None:
        self.winners, self.runs = winners, []
        monkeypatch.setattr(timing, "times", self)

    def __call__(self, contests):
        self.runs.append([type(contest.after.__self__) for contest in contests])
        return [
            Times(contest.shape[0], 100.0, 40.0 if isinstance(contest.after.__self__, self.winners) else 250.0)
            for contest in contests
        ]


@pytest.mark.parametrize("by", ["burnish", "torch"])
def test_each_mask_becomes_its_layer(by: str) -> None:
    model = masked(by)
    expected, before = model(IMAGES), snapshot(model)
    masks = prune.masks(model)
    report = prune.finalize_(model)
    kinds = {fqn: type(model.get_submodule(fqn)) for fqn in (*MASKS, "out")}
    assert kinds == {
        "conv": SparseConv2d, "group": nn.Conv2d, "block": BlockSparseLinear, "pair": Sparse24Linear,
        "any": SparseLinear, "out": nn.Linear,
    }  # fmt: skip
    assert model.conv.config == BlockSparse(16)
    assert model.block.config == BlockSparse(32)
    torch.testing.assert_close(model(IMAGES), expected, rtol=1e-4, atol=1e-5)
    assert not prune.masks(model)
    assert not any("mask" in key or "parametrizations" in key for key in model.state_dict())
    for fqn, mask in masks.items():
        module = model.get_submodule(fqn)
        dense = module.to_dense() if fqn != "group" else module.weight
        assert not dense[~mask].any()
        assert not dense[~mask].signbit().any()
        assert (dense[mask] != 0).all()
    reasons = {row.fqn: row.reason for row in report.kept}
    assert reasons == {
        "group": "its mask makes no pattern that a convolution has a sparse form for; its zeros are permanent now",
        "out": "it has no mask",
    }
    assert {row.was for row in report.swapped} == {
        "Conv2d 16->64 3x3 fp32, masked", "Linear 64->128 fp32, masked", "Linear 128->64 fp32, masked",
        "Linear 64->64 fp32, masked",
    }  # fmt: skip
    assert report.bytes_after == sum(t.nbytes for t in (*model.parameters(), *model.buffers())) < report.bytes_before
    assert "SparseConv2d 16x16 blocks" in str(report)
    model(IMAGES).square().mean().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    report.revert()
    assert same(before, snapshot(model))
    assert torch.equal(model(IMAGES), expected)


def test_the_slower_stay_dense_with_their_zeros(monkeypatch: pytest.MonkeyPatch) -> None:
    race = Race(monkeypatch, Sparse24Linear, SparseConv2d)
    model = masked()
    expected, before = model(IMAGES), snapshot(model)
    report = prune.finalize_(model, measure=IMAGES)
    assert race.runs == [[SparseConv2d, BlockSparseLinear, Sparse24Linear, SparseLinear]]
    assert {row.fqn for row in report.swapped} == {"conv", "pair"}
    rows = {row.fqn: row for row in report.rows}
    assert rows["block"].reason == "block-sparse is not faster here; its zeros are permanent now"
    assert (rows["block"].times.before_us, rows["block"].times.after_us, rows["block"].times.rows) == (100, 250, 3)
    assert rows["conv"].times.after_us == 40
    assert "100 -> 250 us at 3 rows" in str(report)
    assert type(model.block) is type(model.any) is nn.Linear
    assert (model.block.weight == 0).float().mean() > 0.5
    assert rows["block"].bytes_after == model.block.weight.nbytes + model.block.bias.nbytes
    torch.testing.assert_close(model(IMAGES), expected, rtol=1e-4, atol=1e-5)
    assert model.block.weight.requires_grad
    report.revert()
    assert same(before, snapshot(model))


def test_a_layer_that_was_compiled_in_place_and_stays_dense_is_called_itself() -> None:
    torch._dynamo.reset()
    model = masked()
    model.group.compile(backend="eager")
    expected = model(IMAGES)
    prune.finalize_(model)
    assert type(model.group) is nn.Conv2d
    torch.testing.assert_close(model(IMAGES), expected, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        model.group.weight.zero_()
        assert torch.equal(model.group(torch.ones(1, 64, 3, 3)).flatten(), model.group.bias)


def tied(*masks: torch.Tensor | None) -> nn.Sequential:
    """Linear layers of one weight, each under a mask of its own that torch put there, or none."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(32, 32) for _ in masks))
    for layer in model:
        layer.weight = model[0].weight
    for layer, mask in zip(model, masks, strict=True):
        if mask is not None:
            nn.utils.prune.custom_from_mask(layer, "weight", mask)
    return model


@pytest.mark.parametrize("second", [mask_for(Sparse(), 32, 32, 0.4), None], ids=["another mask", "no mask"])
@pytest.mark.parametrize("by", ["finalize_", "swap_"])
def test_layers_of_one_weight_under_different_masks_keep_their_own(by: str, second: torch.Tensor | None) -> None:
    first, x = mask_for(Sparse(), 32, 32, 0.4), torch.randn(3, 32)
    model = tied(first, second, first)
    expected, before = model(x), snapshot(model)
    report = prune.finalize_(model) if by == "finalize_" else burnish.swap_(model, Sparse())
    assert not report.swapped
    assert "its weight is tied to Linear '1', which " in report.rows[0].reason
    torch.testing.assert_close(model(x), expected)
    if by == "finalize_":
        assert not prune.masks(model)
        assert model[0].weight is model[2].weight is not model[1].weight
        assert [row.reason.endswith("permanent now, in a weight of its own") for row in report.rows] == [
            True, second is not None, True,
        ]  # fmt: skip
    report.revert()
    assert same(before, snapshot(model))


@pytest.mark.parametrize("winner", [nn.Linear, SparseLinear])
def test_layers_of_one_weight_and_mask_share_what_becomes_of_it(monkeypatch: pytest.MonkeyPatch, winner: type) -> None:
    mask, x = mask_for(Sparse(), 32, 32, 0.4), torch.randn(3, 32)
    Race(monkeypatch, winner)
    model = tied(mask, mask)
    expected, before = model(x), snapshot(model)
    report = prune.finalize_(model, measure=3)
    assert type(model[0]) is type(model[1]) is winner
    name = "weight" if winner is nn.Linear else "values"
    assert model[0].get_parameter(name) is model[1].get_parameter(name)
    torch.testing.assert_close(model(x), expected)
    report.revert()
    assert same(before, snapshot(model))


def test_measured_on_the_clock_of_this_machine() -> None:
    model = nn.Sequential(nn.Linear(256, 256), nn.Linear(256, 256))
    prune.Pruner(model, prune.Magnitude(), prune.Block(16), 0.9).step()
    report = prune.finalize_(model, measure=8)
    for row, module in zip(report.rows, model, strict=True):
        assert row.times.rows == 8
        assert (row.became is not None) == (row.times.after_us < row.times.before_us)
        assert type(module) is (nn.Linear if row.became is None else BlockSparseLinear)


def test_int8_values_where_there_are_kernels() -> None:
    model = masked()
    report = prune.finalize_(model, values="int8")
    assert [model.get_submodule(fqn).values.dtype for fqn in ("conv", "block", "pair", "any")] == [
        torch.int8, torch.int8, torch.int8, torch.float32,
    ]  # fmt: skip
    assert [row.fqn for row in report.rows if row.frozen] == ["conv", "block", "pair"]
    assert model(IMAGES).isfinite().all()


@pytest.mark.parametrize("sides", [(16, 16), (32, 32), (64, 64), (128, 128), (1, 16), (4, 16)])
def test_the_blocks_of_a_mask_are_found(sides: tuple[int, int]) -> None:
    model = nn.Sequential(nn.Linear(256, 256))
    prune.mask_(model, {"0": mask_for(BlockSparse(sides), 256, 256)})
    prune.finalize_(model)
    assert model[0].config.sides == sides


def test_few_weights_take_no_more_than_their_bytes() -> None:
    model = nn.Sequential(nn.Linear(256, 256, bias=False))
    prune.Pruner(model, prune.Magnitude(), prune.Unstructured(), 0.999).step()
    assert prune.TwoFour().violation(prune.masks(model)["0"]) is None
    prune.finalize_(model)
    assert (type(model[0]), model[0].nnz) == (SparseLinear, 66)


def test_ragged_layers_and_layers_of_zeros() -> None:
    model = nn.Sequential(nn.Linear(100, 90), nn.Linear(90, 41))
    masks = {"0": mask_for(BlockSparse(32), 90, 100, 0.3), "1": torch.zeros(41, 90, dtype=torch.bool)}
    prune.mask_(model, masks)
    x = torch.randn(3, 100)
    expected = model(x)
    prune.finalize_(model)
    assert model[0].config == BlockSparse(32)
    assert (type(model[1]), model[1].nnz) == (BlockSparseLinear, 0)
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(model[1](model[0](x)), model[1].bias.expand(3, -1))


def test_a_trained_mask_stays_through_training_and_checkpoints(tmp_path) -> None:
    model = masked()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=0.01)
    for step in range(8):
        if step == 4:
            report = prune.finalize_(model)
            report.release()
            dense = {fqn: model.get_submodule(fqn).to_dense() for fqn in ("conv", "block", "pair", "any")}
            optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=0.01)
        optimizer.zero_grad()
        model(IMAGES).square().mean().backward()
        optimizer.step()
    for fqn, weight in dense.items():
        trained = model.get_submodule(fqn).to_dense()
        assert torch.equal(trained != 0, weight != 0), fqn
        assert not torch.equal(trained, weight)
    burnish.save(model, tmp_path)
    loaded = burnish.load(Net().eval(), tmp_path)
    assert torch.equal(loaded(IMAGES), model(IMAGES))


def test_no_mask_can_change_afterwards() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    pruner = prune.Pruner(model, prune.Magnitude(), prune.Block(16), 0.8, schedule=prune.Gradual(0, 4, 1))
    pruner.step()
    pruner.step()
    report = prune.finalize_(model)
    before, steps = snapshot(model), pruner.steps
    with pytest.raises(
        ValueError, match="layer '0' is a BlockSparseLinear now, not the layer that was there: after finali"
    ):
        pruner.step()
    with pytest.raises(ValueError, match="mask_: the model has no linear or convolution layer '0'"):
        prune.mask_(model, {"0": torch.ones(64, 64, dtype=torch.bool)})
    with pytest.raises(SwapError, match="finalize_: the model has no masks"):
        prune.finalize_(model)
    assert same(before, snapshot(model))
    report.revert()
    assert pruner.steps == steps
    pruner.step()
    assert prune.masks(model)["0"].float().mean() < 1


class Shard(nn.Parameter):
    """Stands for a DTensor."""


def sharded() -> nn.Module:
    model = nn.Sequential(nn.Linear(64, 64))
    prune.mask_(model, {"0": torch.rand(64, 64) < 0.5})
    model[0].parametrizations.weight.original = Shard(torch.zeros(64, 64))
    return model


def twice() -> nn.Module:
    model = masked()
    nn.utils.parametrize.register_parametrization(model.any, "bias", nn.Identity())
    return model


def spoiled() -> nn.Module:
    model = masked()
    with torch.no_grad():
        model.any.parametrizations.weight.original[prune.masks(model)["any"].nonzero()[0].unbind()] = torch.nan
    return model


def root() -> nn.Module:
    linear = nn.Linear(64, 64)
    prune.mask_(linear, {"": torch.rand(64, 64) < 0.5})
    return linear


REFUSED = {
    "no masks": (Net, {}, SwapError, "finalize_: the model has no masks, expected some of burnish.prune or torch"),
    "no module": (lambda: 3, {}, TypeError, "finalize_: model is a int, expected an nn.Module"),
    "values": (masked, {"values": "int4"}, ValueError, "finalize_: values is 'int4', expected one of: float, int8"),
    "measure": (masked, {"measure": 0}, TypeError, "finalize_: measure is 0, expected a positive number of rows or"),
    "rows of images": (masked, {"measure": 8}, SwapError, "finalize_: measure is a number of rows and layer 'conv' is"),
    "two parametrizations": (twice, {}, SwapError, "layer 'any' cannot lose its mask: it has another parametr"),
    "NaN": (spoiled, {}, SwapError, "finalize_: layer 'any': the weight has NaN or Inf in 1 of 4096 places"),
    "root": (root, {}, SwapError, "finalize_: the model itself is a masked layer, which cannot be exchanged in place"),
    "sharded": (sharded, {}, SwapError, "the weight of layer '0' is a Shard, expected a plain parameter"),
    "example": (masked, {"measure": torch.zeros(3, 4, 6, 6)}, RuntimeError, "channels"),
}  # fmt: skip


@pytest.mark.parametrize("label", REFUSED)
def test_what_cannot_be_done_changes_nothing(label: str) -> None:
    make, options, kind, match = REFUSED[label]
    model = make()
    before = snapshot(model) if isinstance(model, nn.Module) else None
    with pytest.raises(kind, match=match):
        prune.finalize_(model, **options)
    if before is not None:
        assert same(before, snapshot(model))


def test_what_happens_to_hooks_attributes_and_attention() -> None:
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(64, 2), "plain": nn.Linear(64, 64)})
    prune.mask_(
        model,
        {"attention.out_proj": mask_for(Sparse24(), 64, 64), "plain": mask_for(Sparse24(), 64, 64)},
    )
    seen = []
    handle = model["plain"].register_forward_hook(lambda *args: seen.append(1))
    model["plain"].note = "kept"
    x = torch.randn(5, 1, 64)
    expected = model["attention"](x, x, x)[0]
    report = prune.finalize_(model)
    assert [row.fqn for row in report.swapped] == ["plain"]
    assert {row.fqn: row.reason for row in report.kept}["attention.out_proj"] == (
        "MultiheadAttention reads its weight directly; its zeros are permanent now"
    )
    assert torch.equal(model["attention"](x, x, x)[0], expected)
    model["plain"](x)
    handle.remove()
    model["plain"](x)
    assert (seen, model["plain"].note) == ([1], "kept")
    assert copy.deepcopy(model)["plain"].config == Sparse24()
