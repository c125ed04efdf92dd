"""swap_ exchanges what the rules say, as a whole or not at all, reports everything, and can be undone."""

from __future__ import annotations

import json
import re

import burnish
import pytest
import torch
from burnish import BlockSparse, Int8, Keep, LoRA, LowRank, Sparse, Sparse24, SwapError, swap_
from burnish.nn import Fused, Int8Linear
from swap_models import IDS, Model, same, snapshot
from torch import nn


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


def test_revert_follows_where_the_bias_comes_before_the_weight() -> None:
    """As it does in a layer whose mask was removed; the bias goes along by itself, for the stand-in holds it too."""
    model, plain = Model(), Model()
    for net in (model, plain):
        net.head._parameters = {name: net.head._parameters[name] for name in ("bias", "weight")}
    report = swap_(model, Int8())
    for net in (model, plain):
        net.bfloat16()
    report.revert()
    assert torch.equal(model(IDS), plain(IDS))
    report = swap_(model, Int8())
    model.to("meta")
    report.revert()
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


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


class ByName(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.fc = nn.Conv2d(16, 16, 3, padding=1), nn.Linear(64, 64)
        with torch.no_grad():  # zeros in which each pattern is there
            self.conv.weight[:, 4:] = 0
            self.fc.weight[32:] = self.fc.weight[:, 1::2] = 0

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.fc(input=self.conv(input=image).flatten(2))


CONFIGS = [Int8(), LowRank(rank=4), LoRA(r=4), BlockSparse(16), Sparse24(), Sparse()]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_a_model_swapped_in_inference_mode_is_trained_and_loaded_into(config) -> None:
    model, image = ByName(), torch.randn(2, 16, 8, 8)
    with torch.inference_mode():
        swap_(model, config, measure=image)
        swap_(model, config)
    model(image.requires_grad_()).sum().backward()
    assert image.grad is not None
    model.load_state_dict(model.state_dict())
    assert not any(tensor.is_inference() for tensor in (*model.parameters(), *model.buffers()))


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_layers_know_their_input_by_the_name_that_torch_gives_it(config) -> None:
    model, image = ByName(), torch.randn(2, 16, 8, 8)
    report = swap_(model, config)
    convolutions = ["conv"] if isinstance(config, LowRank | BlockSparse) else []
    assert [row.fqn for row in report.swapped] == [*convolutions, "fc"]
    assert torch.equal(model(image), model.fc(model.conv(image).flatten(2)))
    report.revert()
    timed = [row.fqn for row in swap_(model, config, measure=image).rows if row.times]
    assert timed == ([] if isinstance(config, LoRA) else [row.fqn for row in report.swapped])


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_a_layer_that_was_compiled_in_place_is_called_itself(config, monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    model, image = ByName(), torch.randn(2, 16, 8, 8)
    model.fc.compile(backend="eager")
    model(image)
    report = swap_(model, config)
    with monkeypatch.context() as patched:
        patched.setattr(type(model.fc), "forward", lambda self, input: "its own")
        assert model(image) == "its own"
    report.revert()
    assert model.fc._compiled_call_impl is not None


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
