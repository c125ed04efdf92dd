"""swap_ with LowRank: what ranks it takes, what it keeps, the way back, and checkpoints."""

from __future__ import annotations

import json
from pathlib import Path

import burnish
import pytest
import torch
from burnish import CheckpointError, LowRank, swap_
from burnish.kinds import lowrank as kind
from burnish.measure import Times
from burnish.nn import LowRankConv2d, LowRankLinear
from swap_models import IDS, Model, same, snapshot
from torch import nn


class Vision(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 16, 3, stride=2, padding=1)
        self.mid = nn.Conv2d(16, 32, 3, padding="same", groups=2, padding_mode="circular", bias=False)
        self.point = nn.Conv2d(32, 32, 1)
        self.head = nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.mid(torch.relu(self.stem(x))))
        return self.head(torch.relu(self.point(x)).mean((2, 3)))


IMAGES = torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(0))


def tied() -> nn.ModuleList:
    torch.manual_seed(2)
    model = nn.ModuleList([nn.Linear(16, 16), nn.Linear(16, 16), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3, stride=2)])
    model[1].weight, model[3].weight = model[0].weight, model[2].weight
    return model


def test_a_rank_swaps_linear_layers_and_convolutions() -> None:
    model = Vision().eval()
    report = swap_(
        model, {"mid": LowRank(rank=4, conv="tucker2"), "stem": LowRank(rank=6, conv="spatial"), "*": LowRank(rank=5)}
    )
    became = {row.fqn: row.became for row in report.swapped}
    assert became == {
        "stem": "LowRankConv2d r=6", "mid": "LowRankConv2d r=4", "point": "LowRankConv2d r=5",
        "head": "LowRankLinear r=5",
    }  # fmt: skip
    assert [model.stem.scheme, model.mid.scheme, model.point.scheme] == ["spatial", "tucker2", "channel"]
    assert report.bytes_after == sum(p.nbytes for p in model.parameters()) < report.bytes_before
    assert not any(row.frozen for row in report.rows)
    assert "LowRankLinear r=5" in str(report)
    assert all(parameter.requires_grad for parameter in model.parameters())
    model(IMAGES).square().mean().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_revert_puts_the_very_modules_back() -> None:
    for make, x in ((Vision, IMAGES), (Model, IDS)):
        model = make().eval()
        before, expected = snapshot(model), model(x)
        report = swap_(model, LowRank(rank=3))
        assert not same(before, snapshot(model))
        report.revert()
        assert same(before, snapshot(model))
        assert torch.equal(model(x), expected)


def test_revert_follows_dtype_and_mode() -> None:
    model, plain = Vision(), Vision()
    report = swap_(model, LowRank(rank=3))
    for net in (model, plain):
        net.bfloat16().eval()
    report.revert()
    assert torch.equal(model(IMAGES.bfloat16()), plain(IMAGES.bfloat16()))
    assert not any(module.training for module in model.modules())


def test_budgets_choose_the_rank_of_each_layer() -> None:
    model, plain = Model(), Model()
    swap_(model, LowRank(max_error=0.6))
    ranks = set()
    for fqn, layer in model.named_modules():
        if isinstance(layer, LowRankLinear):
            ranks.add(layer.rank)
            weight = plain.get_submodule(fqn).weight.double()
            singular = torch.linalg.svdvals(weight).square()
            errors = [
                float((singular[rank:].sum() / singular.sum()).sqrt().detach()) for rank in (layer.rank - 1, layer.rank)
            ]
            assert errors[1] <= 0.6 < errors[0]
            missed = ((layer.to_float().weight.double() - weight).norm() / weight.norm()).detach()
            assert float(missed) == pytest.approx(errors[1], abs=1e-5)
    assert len(ranks) > 1
    assert model.head.config == LowRank(max_error=0.6)


def test_calibration_decides_what_activation_keeps() -> None:
    torch.manual_seed(0)
    batches = [torch.randn(64, 4) @ torch.randn(4, 48) + 0.01 * torch.randn(64, 48) for _ in range(3)]
    models = [nn.Sequential(nn.Linear(48, 40)) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    expected = models[0](batches[0])
    calibration = burnish.calibrate(models[0], batches)
    swap_(models[0], LowRank(rank=12))
    swap_(models[1], LowRank(rank=12, method="activation"), calibration=calibration)
    plain, aware = (float((model(batches[0]) - expected).norm().detach()) for model in models)
    assert aware < 0.01 * plain
    report = swap_(
        nn.Sequential(nn.Linear(48, 40)), LowRank(max_error=0.05, method="activation"), calibration=calibration
    )
    assert report.swapped[0].became == "LowRankLinear r=12"


def test_a_rank_that_saves_no_weights_keeps_the_layer() -> None:
    model = nn.ModuleDict({"square": nn.Linear(32, 32), "wide": nn.Linear(32, 512), "conv": nn.Conv2d(8, 8, 1)})
    report = swap_(model, {"conv": LowRank(rank=4), "*": LowRank(rank=20)})
    reasons = {row.fqn: row.reason for row in report.kept}
    assert reasons == {
        "square": "rank 20 has more weights than the dense layer: 1280 and 1024",
        "conv": "rank 4 has as many weights as the dense layer: 64 and 64",
    }
    assert type(model["square"]) is nn.Linear
    report = swap_(nn.ModuleList([nn.Linear(32, 32)]), LowRank(energy=0.999))
    assert "more weights than the dense layer" in report.kept[0].reason


class Race:
    """Stands for the clock: low-rank layers up to a rank are faster than the dense layer."""

    def __init__(self, fast: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.fast, self.timed = fast, []
        monkeypatch.setattr(kind.measure, "times", self)
        monkeypatch.setattr(kind, "_found", {})

    def __call__(self, contests):
        results = []
        for contest in contests:
            rank = contest.after.__self__.rank
            self.timed.append((rank, contest.shape))
            results.append(Times(contest.shape[0], 100.0, 50.0 if rank <= self.fast else 200.0))
        return results


@pytest.mark.parametrize(("fast", "expected"), [(48, 48), (100, 96), (9000, 248), (8, 8)])
def test_auto_is_the_largest_candidate_that_is_faster(fast, expected, monkeypatch: pytest.MonkeyPatch) -> None:
    race = Race(fast, monkeypatch)
    model = nn.ModuleList(nn.Linear(512, 512) for _ in range(2))
    report = swap_(model, LowRank(rank="auto"), measure=64)
    assert [layer.rank for layer in model] == [expected, expected]
    assert len(race.timed) <= 5 + 2  # the search, once, and the race of both layers
    assert all(shape == (64, 512) for _, shape in race.timed)
    assert all(layer.config == LowRank(rank="auto") for layer in model)
    assert len(report.swapped) == 2


def test_auto_keeps_a_layer_that_no_rank_beats(monkeypatch: pytest.MonkeyPatch) -> None:
    Race(0, monkeypatch)
    model = nn.ModuleList([nn.Linear(64, 64)])
    report = swap_(model, LowRank(rank="auto"), measure=3)
    assert report.kept[0].reason == "no rank with fewer weights is faster than the dense layer at 3 rows"


def test_auto_takes_convolutions_at_their_images(monkeypatch: pytest.MonkeyPatch) -> None:
    race = Race(9, monkeypatch)
    model = Vision()
    swap_(model, {"mid": LowRank(rank="auto")}, measure=(IMAGES,))
    assert model.mid.rank == 8
    assert {shape for _, shape in race.timed} == {(4, 16, 6, 6)}


def test_measure_on_the_clock_of_this_machine() -> None:
    model = nn.ModuleList([nn.Linear(1024, 1024), nn.Linear(4, 4)])
    report = swap_(model, LowRank(rank=1), measure=256)
    times = {row.fqn: row.times for row in report.rows}
    assert times["0"].after_us < times["0"].before_us
    assert isinstance(model[0], LowRankLinear)
    assert times["1"].rows == 256
    swap_(wide := nn.ModuleList([nn.Linear(1024, 1024)]), LowRank(rank="auto"), measure=256)
    assert isinstance(wide[0], nn.Linear) or 8 <= wide[0].rank < 512


def test_tied_layers_share_their_factors() -> None:
    model = tied()
    report = swap_(model, LowRank(rank=2))
    for first, second in ((0, 1), (2, 3)):
        assert model[first].A is model[second].A
        assert model[first].B is model[second].B
        assert model[first].bias is not model[second].bias
    assert model[3].stride == (2, 2)
    assert [row.tied for row in report.rows] == [None, "0", None, "2"]
    assert report.bytes_after == sum(p.nbytes for p in model.parameters())
    report.revert()
    assert model[1].weight is model[0].weight
    model[3] = nn.Conv2d(16, 8, 3, groups=2)
    model[3].weight = model[2].weight
    report = swap_(model, LowRank(rank=2))
    assert "its weight is tied to Conv2d '3', which splits it into other groups" in {row.reason for row in report.kept}


def test_int8_and_low_rank_share_a_model() -> None:
    model = Model().eval()
    swap_(model, {"blocks.*.mlp.*": burnish.Int8(), "head": burnish.Keep(), "*": LowRank(rank=8)})
    kinds = [type(module).__name__ for module in model.modules()]
    assert kinds.count("Int8Linear") == kinds.count("LowRankLinear") == 6
    assert model(IDS).isfinite().all()


@pytest.mark.parametrize("make", [Vision, Model, tied])
def test_save_and_load(make, tmp_path: Path) -> None:
    model = make().eval()
    swap_(model, {"mid": LowRank(rank=3, conv="tucker2"), "*": LowRank(rank=2)} if make is Vision else LowRank(rank=2))
    model.bfloat16()
    burnish.save(model, tmp_path)
    with torch.device("meta"):
        empty = make()
    for target in (make(), empty, model):
        loaded = burnish.load(target.eval(), tmp_path)
        state = loaded.state_dict()
        assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
        assert [repr(module) for module in loaded.modules()] == [repr(module) for module in model.modules()]
        assert all(parameter.requires_grad for parameter in loaded.parameters())
        if make is tied:
            assert loaded[0].A is loaded[1].A
            assert loaded[2].B is loaded[3].B
        else:
            x = IMAGES.bfloat16() if make is Vision else IDS
            assert torch.equal(loaded(x), model(x))


def test_a_checkpoint_of_other_sizes_is_refused_and_loads_nothing(tmp_path: Path) -> None:
    model = Vision()
    swap_(model, {"mid": LowRank(rank=3, conv="tucker2"), "*": LowRank(rank=2)})
    burnish.save(model, tmp_path)
    recipe = json.loads((tmp_path / "burnish.json").read_text())
    assert recipe["layers"]["mid"]["scheme"] == "tucker2"
    assert recipe["layers"]["head"] == {
        "kind": "LowRankLinear", "config": LowRank(rank=2).to_dict(), "in_features": 32, "out_features": 10,
        "bias": True, "rank": 2,
    }  # fmt: skip
    for change, match in (
        (
            lambda m: setattr(m, "mid", nn.Conv2d(16, 32, 3, groups=2, bias=False)),
            "'mid' has padding .* in the model, same",
        ),
        (lambda m: setattr(m, "head", nn.Linear(32, 11)), "'head' has out_features 11 in the model, 10 in the check"),
        (
            lambda m: setattr(m, "head", LowRankLinear(32, 10, rank=3)),
            "'head' has rank 3 in the model, 2 in the checkpoint",
        ),
        (
            lambda m: setattr(m, "point", LowRankLinear(32, 32, rank=2)),
            "'point' has kind LowRankLinear in the model, Low",
        ),
        (
            lambda m: setattr(m, "head", nn.Conv2d(32, 10, 1)),
            "'head' has kind Conv2d in the model, LowRankLinear in the",
        ),
        (
            lambda m: setattr(m, "point", nn.Linear(32, 32)),
            "'point' has kind Linear in the model, LowRankConv2d in the",
        ),
    ):
        other = Vision()
        change(other)
        before = snapshot(other)
        with pytest.raises(CheckpointError, match=match):
            burnish.load(other, tmp_path)
        assert same(before, snapshot(other))


def test_swapped_model_trains_compiled() -> None:
    torch._dynamo.reset()
    model = Vision()
    swap_(model, LowRank(rank=2))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    mine, theirs = (
        torch.autograd.grad(net(IMAGES).square().mean(), list(model.parameters())) for net in (compiled, model)
    )
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(mine, theirs, strict=True))
    assert isinstance(model.stem, LowRankConv2d)
