"""Beside peft itself: the same function, its layers taken over with their parameters, and its files, both ways."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import burnish
import peft
import pytest
import torch
import transformers
from burnish import CheckpointError, Int8, LoRA, SwapError, swap_
from burnish.nn import LoRALinear
from lora_models import Net, X, base_of
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from swap_models import same, snapshot
from torch import nn

TARGETS = ["up", "down"]


def wrapped(net: nn.Module | None = None, **options) -> PeftModel:
    torch.manual_seed(7)
    config = {"r": 4, "lora_alpha": 6, "target_modules": TARGETS, "init_lora_weights": False, **options}
    return get_peft_model(net if net is not None else Net(), LoraConfig(**config))


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rslora", [False, True])
def test_forward_and_backward_are_pefts(kind: str, dtype: torch.dtype, rslora: bool) -> None:
    theirs = wrapped(
        nn.Sequential(base_of(kind, dtype=dtype)), target_modules=["0"], fan_in_fan_out=kind == "conv1d",
        use_rslora=rslora,
    )  # fmt: skip
    theirs = theirs.base_model.model[0].to(dtype)
    net = nn.Sequential(copy.deepcopy(theirs))
    swap_(net, LoRA())
    mine = net[0]
    assert isinstance(mine, LoRALinear)
    results = []
    for layer, factors in (
        (theirs, [theirs.lora_A.default.weight, theirs.lora_B.default.weight]),
        (mine, [mine.lora_A, mine.lora_B]),
    ):
        x = torch.randn(9, 40, dtype=dtype, generator=torch.Generator().manual_seed(2)).requires_grad_()
        y = layer(x)
        dy = torch.linspace(-1, 1, y.numel()).reshape(y.shape).to(dtype)
        results.append([y, *torch.autograd.grad(y, (x, *factors), dy)])
    exact = nn.Sequential(copy.deepcopy(theirs).double())[0]
    x = x.detach().double().requires_grad_()
    y = exact(x)
    truth = [y, *torch.autograd.grad(y, (x, exact.lora_A.default.weight, exact.lora_B.default.weight), dy.double())]
    for their, my, true in zip(*results, truth, strict=True):
        half_ulp = torch.finfo(dtype).eps / 2 * true.abs().max()
        assert (my - true).abs().max() <= 2 * (their - true).abs().max() + half_ulp


def test_layers_are_taken_over_with_their_parameters_and_given_back() -> None:
    model = wrapped(lora_dropout=0.25, alpha_pattern={"down": 3}, rank_pattern={"down": 2}).eval()
    expected, before = model(X), snapshot(model)
    parameters = {id(p) for p in model.parameters() if p.requires_grad}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    report = swap_(model, LoRA())
    assert [row.became for row in report.swapped] == ["LoRALinear r=4", "LoRALinear r=2"]
    assert {r.fqn: r.reason for r in report.kept} == {
        "base_model.model.head": "peft gave it no adapter; LoRA(r=...) would"
    }
    torch.testing.assert_close(model(X), expected, rtol=1e-5, atol=1e-6)
    net = model.base_model.model
    assert {id(p) for p in model.parameters() if p.requires_grad} == parameters
    assert (net.up.scaling, net.inner["down"].scaling, net.up.lora_dropout) == (1.5, 1.5, 0.25)
    model.train()(X).square().sum().backward()
    optimizer.step()
    assert (model.eval()(X) - expected).abs().max() > 1e-3
    after = model(X)
    report.revert()
    torch.testing.assert_close(model(X), after, rtol=1e-5, atol=1e-6)
    assert {name: entry[0] for name, entry in snapshot(model).items()} == {n: e[0] for n, e in before.items()}


def test_the_base_may_be_int8_and_the_rest_is_shielded() -> None:
    model = wrapped().eval()
    report = swap_(model, Int8())
    assert [row.fqn for row in report.swapped] == [
        "base_model.model.up.base_layer", "base_model.model.inner.down.base_layer", "base_model.model.head"
    ]  # fmt: skip
    assert {row.reason for row in report.kept} == {"it is part of an adapter of peft's", "no int8 form"}
    expected = model(X)
    report = swap_(model, {"*": LoRA()})
    assert [row.became for row in report.swapped] == ["LoRALinear r=4 on Int8Linear"] * 2
    torch.testing.assert_close(model(X), expected, rtol=1e-5, atol=1e-5)


def test_bf16_base_with_fp32_adapters() -> None:
    model = wrapped(Net().bfloat16()).eval()
    expected = model(X.bfloat16())
    report = swap_(model, LoRA())
    assert model.base_model.model.up.lora_A.dtype == torch.float32
    assert (model(X.bfloat16()) - expected).float().norm() <= 0.01 * expected.float().norm()
    report.revert()
    assert torch.equal(model(X.bfloat16()), expected)


@pytest.mark.parametrize(("option", "value", "has"), [
    ("r", 8, "4"), ("lora_alpha", 8, "6"), ("lora_dropout", 0.0, "0.25"), ("use_rslora", True, "False"),
    ("init_lora_weights", "pissa", "has an adapter that has begun"), ("dtype", "bf16", "'fp32'"),
])  # fmt: skip
def test_an_option_that_contradicts_the_adapter_is_refused(option: str, value, has: str) -> None:
    model = wrapped(lora_dropout=0.25)
    before = snapshot(model)
    with pytest.raises(SwapError, match=rf"layer '.*up': the configuration has {option} {value!r}.*{has}"):
        swap_(model, {"*.up": LoRA(**{option: value}), "*.down": LoRA()})
    assert same(before, snapshot(model))
    agreeing = {"r": 4, "lora_alpha": 6, "lora_dropout": 0.25, "use_rslora": False}
    assert len(swap_(model, {"*.up": LoRA(**agreeing)}).swapped) == 1


def _two_active(model: PeftModel) -> None:
    model.add_adapter("other", LoraConfig(r=2, target_modules=TARGETS))
    model.base_model.set_adapter(["default", "other"])


class _Conv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.table = nn.Conv2d(1, 4, 1), nn.Linear(4, 4), nn.Embedding(5, 4)


def _hooked(model: PeftModel) -> None:
    model.base_model.model.up.base_layer.register_forward_hook(lambda *_: None)


KEPT = {
    "DoRA": ({"use_dora": True}, None, "its adapter is no plain LoRA but a DoraLinearVariant"),
    "two": ({}, _two_active, "2 of its adapters are active, not one"),
    "merged": ({}, lambda m: m.merge_adapter(), "its adapter is merged: call peft's unmerge_adapter"),
    "disabled": ({}, lambda m: m.base_model.disable_adapter_layers(), "its adapter is disabled"),
    "bias": ({"lora_bias": True, "target_modules": ["up"]}, None, "its adapter has a bias"),
    "hooks": ({"target_modules": ["up"]}, _hooked, "its base layer has hooks"),
    "fp64": ({"target_modules": ["up"]}, lambda m: m.double(), "its adapter is fp64"),
    "base bias": ({"bias": "lora_only", "target_modules": ["up"]}, None, "the bias of its base layer is trained, too"),
}


@pytest.mark.parametrize("label", KEPT)
def test_what_is_no_plain_lora_is_kept_with_a_reason(label: str) -> None:
    options, prepare, match = KEPT[label]
    model = wrapped(**options)
    if prepare is not None:
        prepare(model)
    before = snapshot(model)
    report = swap_(model, {"*": LoRA()})
    assert not report.swapped
    reasons = {row.fqn: row.reason for row in report.kept}
    assert reasons["base_model.model.up"].startswith(match)
    assert reasons["base_model.model.up.base_layer"] == "it is the base of a layer of peft's that is kept"
    assert reasons["base_model.model.up.lora_A.default"] == "it is part of an adapter of peft's"
    assert same(before, snapshot(model))


def test_embeddings_and_convolutions_are_kept_beside_what_is_swapped() -> None:
    model = wrapped(_Conv(), target_modules=["up", "down", "table"])
    report = swap_(model, LoRA())
    assert [row.fqn for row in report.swapped] == ["base_model.model.down"]
    reasons = {row.fqn: row.reason for row in report.kept}
    assert reasons["base_model.model.up"] == "burnish has no form for peft's Conv2d of peft.tuners.lora.layer"
    assert reasons["base_model.model.table"] == "burnish has no form for peft's Embedding of peft.tuners.lora.layer"


FILES = {
    "plain": {},
    "dropout": {"lora_dropout": 0.1},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"down": 3}, "alpha_pattern": {r"^up": 5}},
    "one": {"target_modules": ["inner.down"]},
    "regex": {"target_modules": r"(inner\.)?(up|down)"},
    "all-linear": {"target_modules": "all-linear"},
    "pissa": {"init_lora_weights": "pissa"},
}


@pytest.mark.parametrize("label", FILES)
def test_files_go_both_ways(label: str, tmp_path: Path) -> None:
    theirs = wrapped(**FILES[label]).eval()
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            p.add_(0.1 * torch.randn_like(p)) if "lora_" in name else None
    theirs.save_pretrained(tmp_path / "theirs")
    mine = Net().eval()
    names = burnish.load_adapter(mine, tmp_path / "theirs")
    assert set(names) == {n for n, m in mine.named_modules() if isinstance(m, LoRALinear)}
    torch.testing.assert_close(mine(X), theirs(X), rtol=1e-5, atol=1e-6)
    burnish.save_adapter(mine, tmp_path / "mine")
    written = load_file(tmp_path / "theirs/adapter_model.safetensors")
    assert _equal(load_file(tmp_path / "mine/adapter_model.safetensors"), written)
    again = PeftModel.from_pretrained(Net(), str(tmp_path / "mine")).eval()
    assert _equal(peft.get_peft_model_state_dict(again), peft.get_peft_model_state_dict(theirs))
    torch.testing.assert_close(again(X), theirs(X), rtol=0, atol=0)
    settings = again.base_model.model.inner["down"], theirs.base_model.model.inner["down"]
    assert len({(m.r["default"], m.scaling["default"], str(m.lora_dropout)) for m in settings}) == 1
    again.save_pretrained(tmp_path / "again")
    other = Net().eval()
    burnish.load_adapter(other, tmp_path / "again")
    assert torch.equal(other(X), mine(X))


def _equal(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(one[k], other[k]) and one[k].dtype == other[k].dtype for k in one
    )


def test_adapters_of_a_swapped_peft_model_are_saved_by_their_plain_names(tmp_path: Path) -> None:
    model = wrapped().eval()
    model.save_pretrained(tmp_path / "theirs")
    swap_(model, LoRA())
    burnish.save_adapter(model, tmp_path / "mine")
    files = [load_file(tmp_path / d / "adapter_model.safetensors") for d in ("theirs", "mine")]
    assert _equal(*files)
    with torch.no_grad():
        for parameter in burnish.trainable_only(model):
            parameter.zero_()
    burnish.load_adapter(model, tmp_path / "theirs")
    assert _equal(burnish.adapter_state_dict(model), _renamed(files[0]))


LEFT = {
    "embedding": (
        {"target_modules": ["down", "table"]},
        "'base_model.model.table' has an adapter of peft's that was not",
    ),
    "whole layer": ({"target_modules": ["down"], "modules_to_save": ["up"]}, "'base_model.model.up' is trained beside"),
    "changed base": ({"target_modules": ["down"], "init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
}


@pytest.mark.parametrize("label", LEFT)
def test_an_adapter_of_more_than_is_swapped_is_not_saved_in_part(label: str, tmp_path: Path) -> None:
    options, match = LEFT[label]
    model = wrapped(_Conv(), **options)
    report = swap_(model, LoRA())
    assert [row.fqn for row in report.swapped] == ["base_model.model.down"]
    with pytest.raises(CheckpointError, match=f"save_adapter: .*{match}"):
        burnish.save_adapter(model, tmp_path / "mine")
    assert not (tmp_path / "mine").exists()


def _renamed(file: dict) -> dict:
    return {key.removesuffix(".weight"): value for key, value in file.items()}


def test_rules_of_a_peft_configuration() -> None:
    config = LoraConfig(
        r=4, target_modules=TARGETS, rank_pattern={"down": 2}, alpha_pattern={"up": 3}, lora_dropout=0.1
    )
    net = Net()
    report = swap_(net, burnish.lora_rules(net, config))
    assert [(row.fqn, row.became) for row in report.swapped] == [
        ("up", "LoRALinear r=4"), ("inner.down", "LoRALinear r=2")
    ]  # fmt: skip
    assert (net.up.scaling, net.inner["down"].scaling, net.up.lora_dropout) == (0.75, 4.0, 0.1)
    assert list(burnish.lora_rules(Net(), {"target_modules": "all-linear", "exclude_modules": ["head"]})) == [
        "re:up", r"re:inner\.down"
    ]  # fmt: skip
    for options, kind, match in (
        ({"target_modules": ["q_proj"]}, ValueError, r"target_modules is \['q_proj'\], which means no layer"),
        ({}, TypeError, "target_modules is None, expected ends of names"),
        ({"target_modules": ["up"], "use_dora": True}, ValueError, "use_dora is True, expected it to be absent"),
        ({"target_modules": ["up"], "layers_to_transform": [1]}, ValueError, r"layers_to_transform is \[1\]"),
        ({"target_modules": ["up"], "r": 0}, ValueError, "lora_rules: LoRA: r is 0, expected"),
    ):
        with pytest.raises(kind, match=match):
            burnish.lora_rules(Net(), options)


def test_a_real_architecture_trains_as_under_peft(tmp_path: Path) -> None:
    def llama() -> nn.Module:
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=50, **sizes))

    ids = torch.arange(24).reshape(2, 12)
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    theirs = get_peft_model(llama(), config)
    theirs.save_pretrained(tmp_path / "start")
    mine = llama()
    swap_(mine, burnish.lora_rules(mine, config))
    assert not isinstance(mine.lm_head, LoRALinear)
    burnish.load_adapter(mine, tmp_path / "start")
    losses: list[list[float]] = []
    for model in (theirs, mine):
        optimizer = torch.optim.AdamW(burnish.trainable_only(model), lr=1e-2)
        losses.append([])
        for _ in range(4):
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0][-1] < losses[0][0]
    burnish.save_adapter(mine, tmp_path / "end")
    assert json.loads((tmp_path / "end/adapter_config.json").read_text())["target_modules"] == [
        "down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"
    ]  # fmt: skip
    loaded = PeftModel.from_pretrained(llama(), str(tmp_path / "end")).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, mine.eval()(ids).logits, rtol=1e-4, atol=1e-5)
