"""calibrate gathers the second moments of layers' inputs, and leaves the model as it was, whatever happens."""

from __future__ import annotations

import copy
import math
import pickle
import sys

import burnish
import pytest
import torch
from burnish import Calibration, calibrate
from swap_models import IDS, Model, same, snapshot
from torch import nn


class Watched(nn.Module):
    """Remembers what its linear layers were given."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(6, 10)
        self.drop = nn.Dropout(0.5)
        self.second = nn.Linear(10, 4)
        self.given: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        h = self.drop(torch.relu(self.first(scale * x)))
        self.given.append(h.detach().reshape(-1, 10))
        return self.second(input=h)


def moment(rows: torch.Tensor) -> torch.Tensor:
    rows = rows.double()
    return (rows.T @ rows / len(rows)).float()


def test_moments_are_those_of_all_rows_of_all_batches() -> None:
    model = Watched()
    batches = [torch.randn(rows, 3, 6) for rows in (2, 5, 1)]
    calibration = calibrate(model, batches)
    assert list(calibration) == ["first", "second"]
    rows = torch.cat([batch.reshape(-1, 6) for batch in batches])
    torch.testing.assert_close(calibration["first"].moment, moment(rows))
    torch.testing.assert_close(calibration["first"].diagonal, rows.square().mean(0))
    torch.testing.assert_close(calibration["second"].moment, moment(torch.cat(model.given)))
    assert calibration["first"].rows == calibration["second"].rows == 24
    assert calibration["first"].moment.dtype == torch.float32


def test_batches_are_called_as_the_model_takes_them_and_read_once() -> None:
    x = torch.randn(4, 6)
    expected = calibrate(Watched(), [2 * x])["first"].moment
    for batch in ((x, 2.0), [x, 2.0], {"x": x, "scale": 2.0}):
        assert torch.equal(calibrate(Watched(), iter([batch]))["first"].moment, expected)
    read = []

    def stream():
        for number in range(5):
            read.append(number)
            yield x

    calibrate(Watched(), stream())
    assert read == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_are_fp32_whatever_the_model_runs_in(dtype: torch.dtype) -> None:
    x = torch.randn(512, 6).to(dtype)
    taken = calibrate(Watched().to(dtype), [x])["first"].moment
    torch.testing.assert_close(taken, moment(x.float()), rtol=1e-5, atol=1e-6)
    with torch.autocast("cpu", dtype):
        taken = calibrate(Watched(), [x.float()])["first"].moment
    torch.testing.assert_close(taken, moment(x.float()), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", [
    {}, {"padding": 1, "groups": 2}, {"stride": (2, 1), "dilation": (1, 2), "padding": "valid"},
    {"padding": "same", "padding_mode": "circular"}, {"padding": (2, 1), "padding_mode": "reflect", "stride": 2},
])  # fmt: skip
def test_patches_of_a_convolution_give_its_outputs(options: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    conv = nn.Conv2d(4, 6, (3, 2), bias=False, **options)
    x = torch.randn(3, 4, 9, 8)
    taken = calibrate(nn.Sequential(conv), [x, x[0]])["0"]
    y = torch.cat([conv(x).transpose(0, 1).flatten(1), conv(x[:1]).transpose(0, 1).flatten(1)], 1)
    assert taken.rows == y.shape[1]
    W = conv.weight.detach().unflatten(0, (conv.groups, -1)).flatten(2)
    mean_square = ((W @ taken.moment) * W).sum(-1).flatten()
    torch.testing.assert_close(mean_square, y.square().mean(1), rtol=1e-4, atol=1e-5)
    monkeypatch.setattr(burnish.calibration, "_CHUNK", 1)
    torch.testing.assert_close(calibrate(nn.Sequential(conv), [x, x[0]])["0"].moment, taken.moment)


def test_empty_batches_and_layers_without_inputs_add_nothing() -> None:
    x = torch.randn(5, 6)
    calibration = calibrate(Watched(), [x[:0], x])
    assert calibration["first"].rows == 5
    torch.testing.assert_close(calibration["first"].moment, moment(x))
    images = torch.randn(2, 4, 5, 5)
    assert calibrate(nn.Sequential(nn.Conv2d(4, 2, 3)), [images[:0], images])["0"].rows == 18
    assert not calibrate(nn.Sequential(nn.Linear(0, 3)), [x[:, :0]])["0"].moment.numel()


def test_layers_that_no_batch_reaches_are_absent_and_shared_ones_are_there_twice() -> None:
    model = nn.ModuleDict({"used": nn.Linear(6, 6), "idle": nn.Linear(6, 6)})
    model["again"] = model["used"]
    model.forward = lambda x: model["again"](model["used"](x))
    calibration = calibrate(model, [torch.randn(5, 6)])
    assert set(calibration) == {"used", "again"}
    assert calibration["used"] is calibration["again"]
    assert calibration["used"].rows == 10


def test_conv1d_and_filter() -> None:
    from transformers.pytorch_utils import Conv1D

    model = nn.Sequential(Conv1D(5, 6), nn.Linear(5, 3))
    x = torch.randn(7, 6)
    torch.testing.assert_close(calibrate(model, [x])["0"].moment, moment(x))
    assert list(calibrate(model, [x], filter_fn=lambda module, fqn: isinstance(module, nn.Linear))) == ["1"]


def test_calibrations_pickle_and_move() -> None:
    calibration = calibrate(Watched(), [torch.randn(5, 6)])
    again = pickle.loads(pickle.dumps(calibration))
    assert torch.equal(again["first"].moment, calibration["first"].moment)
    assert isinstance(again, Calibration)
    assert calibration.to("meta")["second"].moment.is_meta
    assert repr(calibration).startswith("Calibration(2 layers, ")


def test_the_model_is_as_it_was() -> None:
    model = Model()
    model.blocks[1].eval()
    before = snapshot(model)
    calibrate(model, [IDS, IDS])
    assert same(before, snapshot(model))
    assert model.training
    assert not model.blocks[1].training


def test_a_bar_shows_the_batches(capsys: pytest.CaptureFixture[str]) -> None:
    calibrate(Watched(), [torch.randn(5, 6)] * 3, progress=True)
    assert "calibrating" in capsys.readouterr().out


def _raising():
    yield IDS
    raise OSError("the disk is gone")


def _poisoned() -> Model:
    model = Model()
    with torch.no_grad():
        model.embed.weight[3, 1] = math.inf
    return model


BAD = {
    "model": (lambda m: calibrate("model", [IDS]), TypeError, "model is a str, expected an nn.Module"),
    "no layers": (lambda m: calibrate(nn.ReLU(), [IDS]), ValueError, "the model has no linear layer or 2-d conv"),
    "filter": (lambda m: calibrate(m, [IDS], filter_fn=lambda *_: False), ValueError, "that filter_fn accepts"),
    "one tensor": (lambda m: calibrate(m, IDS), TypeError, r"batches is a Tensor, expected an iterable of batches"),
    "one mapping": (lambda m: calibrate(m, {"ids": IDS}), TypeError, "batches is a dict, expected an iterable"),
    "a number": (lambda m: calibrate(m, 3), TypeError, "batches is a int, expected an iterable"),
    "empty": (lambda m: calibrate(m, []), ValueError, "batches is empty, expected at least one batch"),
    "empty stream": (lambda m: calibrate(m, iter(())), ValueError, "batches is empty, expected at least one batch"),
    "device": (
        lambda m: calibrate(m, [IDS, IDS.to("meta")]), ValueError, "batch 2 has a tensor on meta, expected cpu as the",
    ),
    "device keyword": (lambda m: calibrate(m, [{"ids": IDS.to("meta")}]), ValueError, "batch 1 has a tensor on meta"),
    "meta model": (lambda m: calibrate(Model().to("meta"), [IDS]), ValueError, "the model is on the meta device"),
    "stream raises": (lambda m: calibrate(m, _raising()), OSError, "the disk is gone"),
    "model raises": (lambda m: calibrate(m, [IDS, IDS.float()]), RuntimeError, "Long, Int"),
    "wrong keywords": (lambda m: calibrate(m, [{"x": IDS}]), TypeError, "unexpected keyword argument 'x'"),
    "labels": (
        lambda m: calibrate(m, [IDS, (IDS, IDS)]), TypeError,
        r"(?s)raised TypeError at batch 2: .*takes 2 positional arguments but 3 were given. The batch is a tuple of 2, "
        r"and its items are the model's arguments: .* calibrate\(model, \(x for x, label in loader\)\)",
    ),
    "more keywords": (
        lambda m: calibrate(m, [{"ids": IDS, "labels": IDS}]), TypeError,
        r"The batch is a mapping, and its keys \(ids, labels\) are the model's keywords: leave the others out",
    ),
    "infinite": (
        lambda m: calibrate(_poisoned(), [IDS]), ValueError, "layer 'blocks.0.q' was given a NaN, an infinity",
    ),
}  # fmt: skip


@pytest.mark.parametrize("label", BAD)
def test_bad_input_is_refused_and_leaves_nothing_behind(label: str) -> None:
    call, kind, match = BAD[label]
    model = Model()
    model.head.eval()
    before = snapshot(model)
    with pytest.raises(kind, match=match):
        call(model)
    assert same(before, snapshot(model))


def test_a_model_that_has_run_compiled_is_watched_all_the_same() -> None:
    torch._dynamo.reset()
    plain = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 4)).eval()
    model, x = torch.compile(plain, backend="eager"), torch.randn(5, 6)
    with torch.no_grad():
        model(x)
    assert [inputs.rows for inputs in calibrate(model, [x]).values()] == [5, 5]
    assert all(row.times for row in burnish.swap_(model, burnish.Int8(), measure=x).rows)


def test_batches_of_a_loader_go_in_without_their_labels() -> None:
    data = torch.utils.data.TensorDataset(torch.randn(8, 6), torch.arange(8))
    loader = torch.utils.data.DataLoader(data, batch_size=4)
    with pytest.raises(TypeError, match=r"a list of 2, and its items are the model's arguments") as caught:
        calibrate(nn.Sequential(nn.Linear(6, 4)), loader)
    assert isinstance(caught.value.__cause__, TypeError)
    assert calibrate(nn.Sequential(nn.Linear(6, 4)), (x for x, _ in loader))["0"].rows == 8


def test_a_bar_without_rich_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rich.progress", None)
    model = copy.deepcopy(Model())
    before = snapshot(model)
    with pytest.raises(ModuleNotFoundError, match="progress=True needs rich"):
        calibrate(model, [IDS], progress=True)
    assert same(before, snapshot(model))
