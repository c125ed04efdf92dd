"""What is fused is proved to be the same function; what is measured is kept where it wins."""

from __future__ import annotations

import copy

import pytest
import torch
from burnish import Int8, Keep, swap_
from burnish.nn import Int8Linear
from swap_models import IDS, Model, same, snapshot
from torch import nn


def test_keep_rule_protects_an_activation_from_fusion() -> None:
    report = swap_(model := Model(), {"blocks.0.mlp.1": Keep(), "*": Int8()})
    assert report.fused == ("blocks.1.mlp.1", "blocks.2.mlp.1")
    assert type(model.blocks[0].mlp[1]) is nn.GELU


class Gate(nn.Module):
    """LLaMA's shape: the activation is followed by a product, which must not matter."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down, self.act = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.SiLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.act(self.gate(x)) * self.up(x))


class Twice(Gate):
    """The activation serves two layers: taking it away would break the other."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.act(self.gate(x)) + self.act(self.up(x)))


class Between(Gate):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.act(self.gate(x) + x) * self.up(x))


class Leaks(Gate):
    """The pre-activation is used twice."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gated = self.gate(x)
        return self.down(self.act(gated) * gated)


class Returns(Gate):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gated = self.gate(x)
        return self.act(gated), gated


class Global(Gate):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.act(torch.relu(self.gate(x))))


@pytest.mark.parametrize(("kind", "fused"), [
    (Gate, ("0.act",)), (Twice, ()), (Between, ()), (Leaks, ()), (Returns, ()), (Global, ()),
])  # fmt: skip
def test_fusion_needs_proof_that_nothing_is_in_between(kind: type, fused: tuple) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(kind())
    plain = copy.deepcopy(model)
    x = torch.randn(4, 8)
    report = swap_(model, Int8())
    swap_(plain, Int8(fuse_activation=False))
    assert report.fused == fused
    for mine, theirs in zip(
        torch.utils._pytree.tree_leaves(model(x)), torch.utils._pytree.tree_leaves(plain(x)), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-2, atol=1e-2)


FOLLOWERS = {
    "relu": (nn.ReLU(), "relu"),
    "relu in place": (nn.ReLU(inplace=True), "relu"),
    "gelu": (nn.GELU(), "gelu"),
    "gelu tanh": (nn.GELU(approximate="tanh"), "gelu_tanh"),
    "silu": (nn.SiLU(), "silu"),
    "relu6": (nn.ReLU6(), None),
    "tanh": (nn.Tanh(), None),
    "leaky": (nn.LeakyReLU(), None),
    "mish": (nn.Mish(), None),
    "subclass": (type("Mine", (nn.ReLU,), {})(), None),
    "dropout": (nn.Dropout(), None),
}


@pytest.mark.parametrize("label", FOLLOWERS)
def test_only_the_same_function_is_fused(label: str) -> None:
    follower, expected = FOLLOWERS[label]
    model = nn.Sequential(nn.Linear(16, 16), follower).eval()
    x = torch.randn(5, 16)
    plain = copy.deepcopy(model)
    report = swap_(model, Int8())
    swap_(plain, Int8(fuse_activation=False))
    assert report.fused == (("1",) if expected else ())
    assert model[0].activation == (expected or "none")
    torch.testing.assert_close(model(x), plain(x))
    report.revert()
    assert model[1] is follower


@pytest.mark.parametrize("position", [0, 1])
def test_a_hook_on_either_side_prevents_fusion(position: int) -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU())
    model[position].register_forward_hook(lambda module, args, output: None)
    assert swap_(model, Int8()).fused == ()


def test_a_subclass_of_sequential_with_its_own_forward_is_not_trusted() -> None:
    class Backwards(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in reversed(list(self)):
                x = layer(x)
            return x

    assert swap_(Backwards(nn.Linear(8, 8), nn.ReLU()), Int8()).fused == ()


def test_measure_keeps_the_original_where_it_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model()
    seen = []

    def clock(call, x: torch.Tensor, wait) -> float:
        """int8 wins on wide outputs alone."""
        layer = getattr(call, "__self__", None)
        seen.append((tuple(x.shape), x.dtype))
        return 1e-6 if isinstance(layer, Int8Linear) and layer.out_features == 64 else 2e-6

    monkeypatch.setattr("burnish.measure._clock", clock)
    report = swap_(model, Int8(), measure=7)
    assert [row.fqn for row in report.swapped] == [f"blocks.{i}.mlp.0" for i in range(3)]
    assert report.fused == tuple(f"blocks.{i}.mlp.1" for i in range(3))
    times = {row.fqn: row.times for row in report.rows if row.times}
    assert len(times) == 13
    assert (times["head"].rows, round(times["head"].before_us), round(times["head"].after_us)) == (7, 2, 2)
    assert "int8 is not faster here; 2 -> 2 us at 7 rows" in str(report)
    assert "2 -> 1 us at 7 rows" in str(report)
    assert {shape for shape, _ in seen} == {(7, 32), (7, 64)}
    assert report.to_dict()["rows"][-1]["times"]["rows"] == 7


@pytest.mark.parametrize("example", [IDS, (IDS,), {"ids": IDS}])
def test_measure_learns_the_rows_from_an_example(example, monkeypatch: pytest.MonkeyPatch) -> None:
    def clock(call, x: torch.Tensor, wait) -> float:
        return 1.0 if isinstance(getattr(call, "__self__", None), Int8Linear) else 2.0

    monkeypatch.setattr("burnish.measure._clock", clock)
    model = Model()
    unused = model.blocks[0]
    unused.extra = nn.Linear(4, 4)
    before = snapshot(model)
    report = swap_(model, Int8(), measure=example)
    assert {row.times.rows for row in report.rows if row.times} == {40}
    assert next(row for row in report.rows if row.fqn == "blocks.0.extra").times is None
    report.revert()
    assert same(before, snapshot(model))


def test_real_clock_prefers_int8_where_it_is_much_less_work() -> None:
    big = nn.ModuleList([nn.Linear(2048, 2048)])
    row = swap_(big, Int8(), measure=16).rows[0]
    assert row.times.rows == 16
    assert row.times.before_us > 0
    assert (row.became is not None) == (row.times.after_us < row.times.before_us)


class Around(nn.Module):
    """An nn.Sequential by its name, for code that uses it in one way or another."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8))
        nn.init.zeros_(self.layers[2].bias)  # a constructor may look at the layers

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


class Indexes(Around):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.layers[0](x)
        return self.layers[2](self.layers[1](hidden)) + hidden


class Slices(Around):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers[:1](x) + self.layers[1:](x)


class Loops(Around):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([x := layer(x) for layer in self.layers])


class Hands(Around):
    """A helper, which has the property's value, sees the layers one by one."""

    @property
    def parts(self) -> list[nn.Module]:
        return list(self.layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.parts[0](x)


class Reaches(nn.Module):
    """A module further up takes the sequence apart."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Around()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.block.layers[0](x)


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.outer = nn.Sequential(nn.Sequential(nn.Linear(8, 8), nn.ReLU()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.outer[0][0](x)


@pytest.mark.parametrize("kind", [Indexes, Slices, Loops, Hands, Reaches, Nested])
def test_a_sequence_that_is_taken_apart_is_not_fused(kind: type) -> None:
    torch.manual_seed(0)
    model, x = kind(), torch.randn(4, 8)
    before = model(x)
    report = swap_(model, Int8())
    assert report.swapped
    assert not report.fused
    torch.testing.assert_close(model(x), before, rtol=0, atol=0.1)


@pytest.mark.parametrize("wrap", [lambda model: model, lambda model: nn.ModuleList([model]), nn.Sequential])
def test_a_sequence_that_is_called_whole_is_fused(wrap) -> None:
    model = nn.ModuleDict({"inside": wrap(Around())})
    assert len(swap_(model, Int8()).fused) == 1
