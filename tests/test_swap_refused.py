"""What cannot be swapped is kept with its reason, bad input is refused, and a failure changes nothing."""

from __future__ import annotations

import json
import re

import pytest
import torch
from burnish import Int8, Keep, SwapError, swap_
from swap_models import IDS, Model, same, snapshot
from torch import nn


class Own(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 2


class Tagged(nn.Linear):
    pass


class Reading(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, self.inner.weight, self.inner.bias)


class ReadingFurtherOn(Reading):
    """Not in forward itself, and in one of its branches."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._fast(x) if x.is_cuda else self.inner(x)

    def _fast(self, x: torch.Tensor) -> torch.Tensor:
        parts = [x @ row for row in self._rows]
        return torch.stack(parts, -1)

    @property
    def _rows(self) -> torch.Tensor:
        return self.inner.weight.unbind(0)


class Asking(Reading):
    """What it does with the weight needs no values, or is over before anything is swapped."""

    def __init__(self) -> None:
        super().__init__()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.inner.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if isinstance(self.inner.weight, torch.Tensor) and self.inner.weight.dtype == x.dtype:
            x = x.expand(-1, self.inner.weight.size(1))
        return self.inner(x.to(self.inner.weight.device))


def _pruned() -> nn.Module:
    from torch.nn.utils import prune

    return prune.l1_unstructured(nn.Linear(8, 8), "weight", 0.5)


def _patched() -> nn.Module:
    linear = nn.Linear(8, 8)
    linear.forward = lambda x: nn.Linear.forward(linear, x)
    return linear


def _with_state_hook() -> nn.Module:
    linear = nn.Linear(8, 8)
    linear.register_state_dict_post_hook(lambda *args: None)
    return linear


def _with_buffer() -> nn.Module:
    linear = nn.Linear(8, 8)
    linear.register_buffer("count", torch.zeros(1))
    return linear


KEPT = {
    "own forward": (lambda: Own(8, 8), "Own is a subclass of Linear with its own forward"),
    "parametrized": (
        lambda: torch.nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)),
        "it is parametrized: remove the parametrization first",
    ),
    "pruned": (_pruned, "its weight has a pruning mask: call torch.nn.utils.prune.remove first"),
    "weight norm": (
        lambda: torch.nn.utils.weight_norm(nn.Linear(8, 8)),
        r"its weight is computed by a hook \(weight or spectral norm\): remove that first",
    ),
    "lazy": (lambda: nn.LazyLinear(8), "it is lazy and has no shape yet: run one batch first"),
    "patched": (_patched, "its forward was replaced on the instance"),
    "state hook": (_with_state_hook, "it has state_dict hooks, which expect a float weight"),
    "double": (lambda: nn.Linear(8, 8).double(), "its weight is fp64; int8 has kernels for fp32, bf16 and fp16"),
    "complex": (lambda: nn.Linear(8, 8, dtype=torch.complex64), "its weight is complex64; int8 has kernels"),
    "no outputs": (lambda: nn.Linear(8, 0), "it has no outputs"),
    "too wide": (
        lambda: nn.Linear(131073, 1, device="meta"),
        "it has 131073 inputs; int32 sums are exact up to 131072",
    ),
    "buffer": (_with_buffer, "it holds more than a linear layer does: count"),
    "attention": (lambda: nn.MultiheadAttention(8, 2), "MultiheadAttention reads its weight directly"),
    "encoder layer": (
        lambda: nn.TransformerEncoderLayer(8, 2, 16),
        "TransformerEncoderLayer reads its weight directly",
    ),
    "read": (Reading, "Reading reads its weight directly"),
    "read further on": (ReadingFurtherOn, "ReadingFurtherOn reads its weight directly"),
}


@pytest.mark.parametrize("label", KEPT)
@pytest.mark.filterwarnings("ignore")
def test_layers_that_cannot_be_swapped_are_kept_with_the_reason(label: str) -> None:
    make, reason = KEPT[label]
    model = nn.ModuleDict({"odd": make(), "fine": nn.Linear(8, 8)})
    kinds = [type(m) for m in model["odd"].modules()]
    report = swap_(model, Int8())
    assert [row.fqn for row in report.swapped] == ["fine"]
    assert any(re.match(reason, row.reason) for row in report.kept), [row.reason for row in report.kept]
    assert [type(m) for m in model["odd"].modules()] == kinds


def test_plain_subclass_is_swapped() -> None:
    assert len(swap_(nn.ModuleList([Tagged(8, 8)]), Int8()).swapped) == 1


def test_a_layer_that_is_asked_about_its_weight_is_swapped() -> None:
    assert len(swap_(Asking(), Int8()).swapped) == 1


def test_transformer_encoder_still_runs_its_fast_path() -> None:
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    model = nn.Sequential(nn.TransformerEncoder(layer, 2), nn.Linear(32, 8)).eval()
    swap_(model, Int8())
    with torch.no_grad():
        assert model(torch.randn(2, 5, 32)).shape == (2, 5, 8)


def _nan_model() -> Model:
    model = Model()
    with torch.no_grad():
        model.blocks[2].mlp[2].weight[3, 1] = float("nan")
    return model


def _raising(module: nn.Module, fqn: str) -> bool:
    raise KeyError(fqn)


BAD = {
    "model": (lambda: swap_("model", Int8()), TypeError, "model is a str, expected an nn.Module"),
    "rules class": (lambda: swap_(Model(), Int8), TypeError, "rules is the class Int8, expected a configuration"),
    "rules list": (lambda: swap_(Model(), [Int8()]), TypeError, "rules is .*list, expected a configuration"),
    "rules None": (lambda: swap_(Model(), None), TypeError, "rules is None of type NoneType"),
    "empty": (lambda: swap_(Model(), {}), SwapError, "rules is empty, expected at least one pattern"),
    "key": (lambda: swap_(Model(), {3: Int8()}), TypeError, "a rule's key is 3 of type int, expected a glob"),
    "value": (lambda: swap_(Model(), {"*": "int8"}), TypeError, r"rule '\*' gives 'int8' of type str, expected"),
    "value class": (lambda: swap_(Model(), {"*": Int8}), TypeError, r"rule '\*' gives the class Int8, expected"),
    "regex": (lambda: swap_(Model(), {"re:(": Int8()}), SwapError, r"rule 're:\(' is not a regular expression"),
    "typo": (
        lambda: swap_(Model(), {"blocks.0.w": Int8()}),
        SwapError,
        "rule 'blocks.0.w' matches nothing; layers that come near: .*'blocks.0.[qk]'",
    ),
    "typo glob": (
        lambda: swap_(Model(), {"*.mpl.*": Int8()}),
        SwapError,
        r"rule '\*.mpl.\*' matches nothing; layers that come near: 'blocks.0.mlp.0'",
    ),
    "typo regex": (lambda: swap_(Model(), {"re:block\\.0": Int8()}), SwapError, "matches nothing; layers that come"),
    "typo keep": (lambda: swap_(Model(), {"haed": Keep(), "*": Int8()}), SwapError, "rule 'haed' .*near: 'head'"),
    "container": (
        lambda: swap_(Model(), {"blocks.0.mlp": Int8()}),
        SwapError,
        r"only e.g. Sequential 'blocks.0.mlp'; for the layers inside it write 'blocks.0.mlp.\*'",
    ),
    "not a layer": (
        lambda: swap_(Model(), {"embed": Int8()}),
        SwapError,
        "rule 'embed' matches no layer that can be swapped, only e.g. Embedding 'embed'",
    ),
    "shadowed": (
        lambda: swap_(Model(), {"*": Int8(), "head": Keep()}),
        SwapError,
        r"rule 'head' decides nothing: rule '\*' comes first and matches 'head' too",
    ),
    "no linear": (lambda: swap_(nn.Sequential(nn.ReLU()), Int8()), SwapError, "the model has no layer that can be"),
    "root": (lambda: swap_(nn.Linear(8, 8), Int8()), SwapError, r"use burnish.nn.Int8Linear.from_float\(model\)"),
    "filter": (
        lambda: swap_(Model(), Int8(), filter_fn=lambda module, fqn: False),
        SwapError,
        "filter_fn accepts none of the 13 layers",
    ),
    "measure zero": (lambda: swap_(Model(), Int8(), measure=0), TypeError, "measure is 0, expected a positive number"),
    "measure bool": (lambda: swap_(Model(), Int8(), measure=True), TypeError, "measure is True, expected a positive"),
    "measure text": (lambda: swap_(Model(), Int8(), measure="x"), TypeError, "measure is 'x', expected a positive"),
    "measure list": (lambda: swap_(Model(), Int8(), measure=[torch.ones(2)]), TypeError, "measure is a list, expected"),
    "measure meta": (
        lambda: swap_(Model().to("meta"), Int8(), measure=3), SwapError, "layer .* is on the meta device and cannot be",
    ),
    "ddp": (lambda: swap_(_Wrapped(), Int8()), SwapError, "is wrapped in _Wrapped: swap before wrapping"),
    "config": (lambda: Int8(fuse_activation=1), TypeError, "fuse_activation is 1, expected True or False"),
    "config name": (lambda: Int8.from_dict({"name": "Int9"}), ValueError, "unknown configuration 'Int9', expected one"),
    "config kind": (lambda: Int8.from_dict(Keep().to_dict()), ValueError, "the data describes 'Keep'"),
    "config newer": (
        lambda: Int8.from_dict({"name": "Int8", "version": 2}), ValueError, "version 2, this burnish reads up to 1",
    ),
    "config option": (
        lambda: Int8.from_dict({**Int8().to_dict(), "bits": 4}), ValueError, "unknown options: bits",
    ),
    "config data": (lambda: Int8.from_dict("Int8"), ValueError, "a mapping with a 'name', got 'Int8'"),
}  # fmt: skip


class FullyShardedDataParallel(nn.Module):
    """Has the name of torch's wrapper, which needs a process group to exist."""


class _Wrapped(FullyShardedDataParallel):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)


@pytest.mark.parametrize("label", BAD)
def test_bad_input_is_refused(label: str) -> None:
    call, kind, match = BAD[label]
    with pytest.raises(kind, match=match):
        call()


def test_configs_are_values() -> None:
    assert Int8() == Int8(fuse_activation=True) != Int8(fuse_activation=False)
    assert Int8.from_dict(json.loads(json.dumps(Int8(fuse_activation=False).to_dict()))) == Int8(fuse_activation=False)
    assert Keep.from_dict(Keep().to_dict()) == Keep()
    with pytest.raises(AttributeError):
        Int8().fuse_activation = False


FAILING = {
    "NaN": (lambda m: swap_(m, Int8()), SwapError, r"layer 'blocks.2.mlp.2': the weight has NaN or Inf in 1 of 32"),
    "rule": (lambda m: swap_(m, {"blocks.*": Int8(), "haed": Int8()}), SwapError, "rule 'haed'"),
    "filter raises": (lambda m: swap_(m, Int8(), filter_fn=_raising), KeyError, "blocks.0.q"),
    "example without rows": (
        lambda m: swap_(m, Int8(), measure=(IDS[:0],)), SwapError, "measure is an example that gives .* no rows",
    ),
    "example raises": (
        lambda m: swap_(m, {"blocks.0.*": Int8()}, measure=(torch.zeros(2, 2),)), RuntimeError, "Long|Int|indices",
    ),
}  # fmt: skip


@pytest.mark.parametrize("label", FAILING)
def test_a_failed_swap_leaves_the_model_exactly_as_it_was(label: str) -> None:
    call, kind, match = FAILING[label]
    model = _nan_model()
    before = snapshot(model)
    with pytest.raises(kind, match=match):
        call(model)
    assert same(before, snapshot(model))


def test_an_interruption_in_the_middle_of_the_exchange_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    from burnish.report import Slot

    model = Model()
    before = snapshot(model)
    put, calls = Slot.put, []

    def interrupted(slot: Slot, module: nn.Module) -> None:
        calls.append(slot)
        if len(calls) == 7:
            raise KeyboardInterrupt
        put(slot, module)

    monkeypatch.setattr(Slot, "put", interrupted)
    with pytest.raises(KeyboardInterrupt):
        swap_(model, Int8())
    assert len(calls) > 7
    assert same(before, snapshot(model))
