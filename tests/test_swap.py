"""swap_ exchanges what the rules say, as a whole or not at all, reports everything, and can be undone."""

from __future__ import annotations

import copy
import json
import re

import burnish
import pytest
import torch
from burnish import Int8, Keep, SwapError, swap_
from burnish.nn import Fused, Int8Linear
from torch import nn


class Block(nn.Module):
    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(width, width, bias=False)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.norm = nn.LayerNorm(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x + self.mlp(torch.relu(self.q(x)) + self.k(x)))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(50, 32)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(32, 50)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


IDS = torch.arange(40).reshape(4, 10)


def snapshot(model: nn.Module) -> dict:
    """Everything a failed swap must leave alone: the objects, their bits, flags, hooks and attributes."""
    return {
        fqn: (
            id(module),
            module.training,
            {
                name: (id(t), t.clone(), t.requires_grad, t._version)
                for name, t in (*module._parameters.items(), *module._buffers.items())
                if t is not None
            },
            len(module._forward_hooks) + len(module._forward_pre_hooks),
            sorted(vars(module)),
        )
        for fqn, module in model.named_modules(remove_duplicate=False)
    }


def same(before: dict, after: dict) -> bool:
    def plain(taken: dict) -> dict:
        return {
            fqn: (ident, training, {n: (i, grad, v) for n, (i, _, grad, v) in tensors.items()}, hooks, names)
            for fqn, (ident, training, tensors, hooks, names) in taken.items()
        }

    return plain(before) == plain(after) and all(
        torch.equal(value[1].view(torch.uint8), after[fqn][2][name][1].view(torch.uint8))
        for fqn, entry in before.items()
        for name, value in entry[2].items()
    )


def test_a_config_alone_swaps_every_linear() -> None:
    model = Model().eval()
    expected = model(IDS)
    report = swap_(model, Int8())
    assert len(report.swapped) == 13
    assert not [m for m in model.modules() if isinstance(m, nn.Linear)]
    assert (model(IDS) - expected).norm() <= 0.03 * expected.norm()
    assert [row.fqn for row in report.kept] == ["embed", *(f"blocks.{i}.norm" for i in range(3))]
    assert {row.reason for row in report.kept} == {"no int8 form"}
    assert report.fused == tuple(f"blocks.{i}.mlp.1" for i in range(3))
    assert all(type(block.mlp[1]) is Fused and isinstance(block.mlp[1], nn.Identity) for block in model.blocks)
    assert all(not m.training for m in model.modules())


def test_report_counts_bytes_as_the_model_holds_them() -> None:
    model = nn.Sequential(nn.Linear(512, 1024), nn.LayerNorm(1024), nn.Linear(1024, 512))
    held = sum(t.nbytes for t in model.parameters())
    report = swap_(model, Int8())
    assert report.bytes_before == held
    assert report.bytes_after == sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    totals = report.to_dict()
    assert totals["swapped_bytes_after"] <= 0.27 * totals["swapped_bytes_before"]
    assert report.bytes_before - report.bytes_after == totals["swapped_bytes_before"] - totals["swapped_bytes_after"]
    assert json.loads(json.dumps(totals)) == totals
    assert [row["fqn"] for row in totals["rows"]] == ["0", "1", "2"]


def test_report_prints_an_aligned_table() -> None:
    model = Model()
    text = str(swap_(model, {"head": Keep(), "*": Int8()}))
    lines = text.splitlines()
    row = next(line for line in lines if line.startswith("blocks.{0..2}.mlp.0"))
    assert re.search(r"x3 +Linear 32->64 fp32 +Int8Linear \+ gelu +8\.25 KiB -> 2\.\d+ KiB +takes in '1'", row)
    assert re.search(r"head +Linear 32->50 fp32 +kept +6\.45 KiB +kept by rule 'head'", text)
    assert "12 layers swapped" in text
    assert "3 activations fused" in text
    assert "12 weights could be trained before and are frozen now" in text
    columns = {line.index(word) for line in lines for word in ("Linear 32", "Embedding", "LayerNorm") if word in line}
    assert len(columns) == 1


def test_rules_match_in_order() -> None:
    model = Model()
    report = swap_(model, {"re:blocks\\.(0|2)\\.[qk]": Int8(), "blocks.*.mlp.*": Int8(fuse_activation=False)})
    assert [row.fqn for row in report.swapped] == [
        *("blocks.0.q", "blocks.0.k", "blocks.0.mlp.0", "blocks.0.mlp.2"),
        *("blocks.1.mlp.0", "blocks.1.mlp.2"),
        *("blocks.2.q", "blocks.2.k", "blocks.2.mlp.0", "blocks.2.mlp.2"),
    ]
    assert report.fused == ()
    assert {row.fqn: row.reason for row in report.kept}["blocks.1.q"] == "no rule matches it"
    assert model.blocks[0].mlp[0].config == Int8(fuse_activation=False)
    model = Model()
    report = swap_(model, {"embed": Keep(), "blocks.1.*": Keep(), "*": Int8()})
    assert {row.fqn for row in report.swapped} & {"blocks.1.q"} == set()
    assert {row.fqn: row.reason for row in report.kept}["blocks.1.norm"] == "kept by rule 'blocks.1.*'"


def test_filter_fn_has_the_last_word() -> None:
    model = Model()
    asked = []
    report = swap_(model, Int8(), filter_fn=lambda module, fqn: asked.append(fqn) or module.out_features == 64)
    assert [row.fqn for row in report.swapped] == [f"blocks.{i}.mlp.0" for i in range(3)]
    assert len(asked) == 13
    assert {row.fqn: row.reason for row in report.kept}["head"] == "filter_fn said no"


def test_keep_rule_protects_an_activation_from_fusion() -> None:
    report = swap_(model := Model(), {"blocks.0.mlp.1": Keep(), "*": Int8()})
    assert report.fused == ("blocks.1.mlp.1", "blocks.2.mlp.1")
    assert type(model.blocks[0].mlp[1]) is nn.GELU


def test_revert_puts_the_very_modules_back() -> None:
    model = Model().eval()
    before, expected = snapshot(model), model(IDS)
    report = swap_(model, Int8())
    assert not same(before, snapshot(model))
    report.revert()
    assert same(before, snapshot(model))
    assert torch.equal(model(IDS), expected)
    with pytest.raises(SwapError, match="revert: this report was reverted already"):
        report.revert()


def test_revert_follows_dtype_and_mode() -> None:
    model, plain = Model(), Model()
    report = swap_(model, Int8())
    for net in (model, plain):
        net.bfloat16().eval()
    report.revert()
    assert torch.equal(model(IDS), plain(IDS))
    assert not any(m.training for m in model.modules())


def test_revert_refuses_when_the_model_was_changed_since() -> None:
    model = Model()
    report = swap_(model, Int8())
    model.blocks[1].q = stranger = nn.Linear(32, 32)
    before = snapshot(model)
    with pytest.raises(SwapError, match=r"another module was put at 'blocks.1.q' since the swap; nothing was changed"):
        report.revert()
    assert same(before, snapshot(model))
    assert model.blocks[1].q is stranger


def test_release_frees_the_originals() -> None:
    import gc
    import weakref

    model = Model()
    watched = weakref.ref(model.head)
    report = swap_(model, Int8())
    gc.collect()
    assert watched() is not None
    report.release()
    gc.collect()
    assert watched() is None
    with pytest.raises(SwapError, match="revert: this report was released already"):
        report.revert()


def test_swapping_twice_says_so() -> None:
    model = Model()
    first = swap_(model, {"blocks.0.*": Int8()})
    second = swap_(model, Int8())
    assert [row.reason for row in second.rows if row.fqn == "blocks.0.q"] == ["already swapped"]
    second.revert()
    first.revert()
    assert [type(m) for m in model.modules()] == [type(m) for m in Model().modules()]


def test_tied_layers_stay_tied() -> None:
    model = nn.ModuleDict({name: nn.Linear(64, 64) for name in "abc"})
    model["b"].weight = model["a"].weight
    report = swap_(model, Int8())
    a, b, c = (model[name] for name in "abc")
    assert a.weight_packed is b.weight_packed
    assert a.weight_scale is b.weight_scale
    assert a.weight_packed is not c.weight_packed
    rows = {row.fqn: row for row in report.rows}
    assert rows["b"].tied == "a"
    assert rows["b"].bytes_after == b.bias.nbytes
    assert report.bytes_after == sum({id(t): t.nbytes for t in (*model.parameters(), *model.buffers())}.values())
    assert "shares the weight of a" in str(report)
    report.revert()
    assert model["b"].weight is model["a"].weight


@pytest.mark.parametrize("rules", [{"head": Int8()}, {"*": Int8()}])
def test_layer_tied_to_an_embedding_is_kept(rules: dict) -> None:
    model = Model()
    model.head.weight = model.embed.weight
    report = swap_(model, rules | {})
    row = next(row for row in report.rows if row.fqn == "head")
    assert row.reason == "its weight is tied to Embedding 'embed', which is kept"
    assert model.head.weight is model.embed.weight


def test_tie_to_a_layer_that_a_rule_keeps_keeps_both() -> None:
    model = Model()
    model.blocks[1].q.weight = model.blocks[0].q.weight
    model.blocks[2].q.weight = model.blocks[0].q.weight
    report = swap_(model, {"blocks.0.q": Keep(), "*": Int8()})
    reasons = {row.fqn: row.reason for row in report.kept}
    assert reasons["blocks.1.q"] == reasons["blocks.2.q"] == "its weight is tied to Linear 'blocks.0.q', which is kept"


def test_module_in_two_places_is_swapped_in_both() -> None:
    model = nn.ModuleList([nn.Linear(8, 8), nn.ReLU()])
    model.append(model[0])
    report = swap_(model, Int8())
    assert model[0] is model[2]
    assert isinstance(model[0], Int8Linear)
    assert len(report.swapped) == 1
    report.revert()
    assert type(model[0]) is nn.Linear
    assert model[0] is model[2]


class Own(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 2


class Tagged(nn.Linear):
    pass


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
    "attention": (lambda: nn.MultiheadAttention(8, 2), "nn.MultiheadAttention reads its weight directly"),
    "encoder layer": (
        lambda: nn.TransformerEncoderLayer(8, 2, 16),
        "nn.TransformerEncoderLayer's fast path reads its weight directly",
    ),
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


def test_transformer_encoder_still_runs_its_fast_path() -> None:
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    model = nn.Sequential(nn.TransformerEncoder(layer, 2), nn.Linear(32, 8)).eval()
    swap_(model, Int8())
    with torch.no_grad():
        assert model(torch.randn(2, 5, 32)).shape == (2, 5, 8)


def test_hooks_flags_and_attributes_move_to_the_new_layer() -> None:
    model = Model()
    seen = []
    handle = model.head.register_forward_hook(lambda module, args, output: seen.append(module))
    model.head.note = "mine"
    model.head.bias.requires_grad_(False)
    report = swap_(model, Int8())
    model(IDS)
    assert seen == [model.head]
    assert isinstance(model.head, Int8Linear)
    assert model.head.note == "mine"
    assert not model.head.bias.requires_grad
    handle.remove()
    model(IDS)
    assert len(seen) == 1
    report.revert()
    assert not model.head._forward_hooks


def test_trained_biases_survive_the_way_back() -> None:
    model = Model()
    report = swap_(model, {"head": Int8()})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = model.head.bias.clone()
    model(IDS).square().mean().backward()
    optimizer.step()
    report.revert()
    assert not torch.equal(model.head.bias, before)
    assert model.head.bias in set(optimizer.param_groups[0]["params"])


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
def test_measure_learns_the_rows_from_an_example(example) -> None:
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


def test_meta_model_is_swapped_and_loaded_later() -> None:
    source = Model()
    swap_(source, Int8())
    with torch.device("meta"):
        model = Model()
    swap_(model, Int8())
    model.load_state_dict(source.state_dict(), assign=True)
    assert torch.equal(model.eval()(IDS), source.eval()(IDS))


def test_swapped_model_compiles_whole() -> None:
    torch._dynamo.reset()
    model = Model().eval().requires_grad_(False)
    swap_(model, Int8())
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    for rows in (2, 4, 9):
        ids = torch.randint(0, 50, (rows, 10))
        torch.testing.assert_close(compiled(ids), model(ids), rtol=2e-2, atol=2e-2)


def test_burnish_exports_the_names() -> None:
    assert {"Int8", "Keep", "Report", "swap_", "save", "load", "nn", "SwapError"} <= set(burnish.__all__)
    assert type(swap_(Model(), Int8())) is burnish.Report
