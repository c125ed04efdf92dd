"""Masks last, through training, copies, checkpoints, compilers and processes; torch.nn.utils.prune's count too."""

from __future__ import annotations

import copy
from pathlib import Path

import burnish
import pair
import prune_workers
import pytest
import torch
from burnish import prune
from burnish.prune.masking import parameter_of
from swap_models import IDS, Model
from torch import nn
from torch.nn.utils import prune as torch_prune


def pruned(pattern: prune.Pattern | None = None) -> Model:
    model = Model()
    prune.Pruner(model, prune.Magnitude(), pattern or prune.Unstructured(), 0.5).step()
    return model


def zeros(weight: torch.Tensor, mask: torch.Tensor) -> bool:
    """Whether the weight is zero, and positive, where it is masked, and nowhere else."""
    return bool(((weight == 0) == ~mask).all()) and not bool(weight[~mask].signbit().any())


OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=0.1),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1),
}


@pytest.mark.parametrize("early", [True, False])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_hundred_steps_move_no_mask(name: str, early: bool) -> None:
    model = Model()
    parameters = dict(model.named_parameters())
    optimizer = OPTIMIZERS[name](model.parameters()) if early else None
    if early:  # momentum that points at what is masked later
        model(IDS).square().mean().backward()
        optimizer.step()
    prune.Pruner(model, prune.Magnitude(), prune.Unstructured(), 0.5).step()
    assert {id(p) for p in model.parameters()} == {id(p) for p in parameters.values()}
    optimizer = optimizer or OPTIMIZERS[name](model.parameters())
    masks = prune.masks(model)
    before = {fqn: model.get_submodule(fqn).weight.detach().clone() for fqn in masks}
    target = torch.randn(4, 10, 50)
    for _ in range(100):
        optimizer.zero_grad()
        (model(IDS) - target).square().mean().backward()
        for fqn, mask in masks.items():
            grad = parameter_of(model.get_submodule(fqn)).grad
            assert not grad[~mask].any()
            assert grad[mask].any()
        optimizer.step()
    after = prune.masks(model)
    for fqn, mask in masks.items():
        weight = model.get_submodule(fqn).weight.detach()
        assert torch.equal(after[fqn], mask)
        assert zeros(weight, mask)
        assert not torch.equal(weight, before[fqn])


@pytest.mark.parametrize("pattern", [prune.TwoFour(), prune.Block(16)], ids=str)
def test_patterns_hold_after_training(pattern) -> None:
    model = Model()
    prune.Pruner(model, prune.Magnitude(), pattern, 0.5).step()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    for _ in range(5):
        optimizer.zero_grad()
        model(IDS).square().mean().backward()
        optimizer.step()
    for fqn in prune.masks(model):
        assert pattern.violation(model.get_submodule(fqn).weight) is None


def test_infinite_gradients_and_values_beneath_stay_beneath() -> None:
    model = pruned()
    layer, mask = model.head, prune.masks(model)["head"]
    with torch.no_grad():
        parameter_of(layer)[~mask] = float("nan")
    assert layer.weight.isfinite().all()
    (layer.weight * float("inf")).sum().backward()
    assert not parameter_of(layer).grad[~mask].any()


def test_assigned_weights_are_masked() -> None:
    model = pruned()
    mask, fresh = prune.masks(model)["head"], torch.randn(50, 32)
    model.head.weight = fresh
    assert torch.equal(model.head.weight, torch.where(mask, fresh, 0))


def test_copies_are_independent() -> None:
    model = pruned()
    model(IDS).sum().backward()
    twin = copy.deepcopy(model)
    assert torch.equal(twin(IDS), model(IDS))
    expected = model(IDS)
    prune.remove_(twin)  # which must not take the property off the class that both have
    assert not prune.masks(twin)
    assert torch.equal(model(IDS), expected)
    assert torch.equal(twin(IDS), expected)
    assert prune.masks(model).keys() == {row.fqn for row in prune.report(model).rows}


def test_state_dicts_go_round(tmp_path: Path) -> None:
    model = pruned()
    torch.save(model.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    fresh = Model()
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.zero_()
    prune.mask_(fresh, prune.masks(state))
    fresh.load_state_dict(state)
    assert torch.equal(fresh(IDS), model(IDS))
    for fqn, mask in prune.masks(model).items():
        assert torch.equal(prune.masks(fresh)[fqn], mask)
    root = nn.Linear(4, 4)
    prune.Pruner(root, prune.Magnitude(), prune.Unstructured(), 0.5).step()
    assert torch.equal(prune.masks(root.state_dict())[""], prune.masks(root)[""])


def test_a_schedule_is_resumed() -> None:
    def run(stop: int | None) -> Model:
        model = Model()
        pruner = prune.Pruner(model, prune.Magnitude(), prune.Unstructured(), 0.8, schedule=prune.Gradual(0, 6, 2))
        for step in range(9):
            if step == stop:
                state, steps = model.state_dict(), pruner.state_dict()
                model = Model()
                pruner = prune.Pruner(
                    model, prune.Magnitude(), prune.Unstructured(), 0.8, schedule=prune.Gradual(0, 6, 2)
                )
                prune.mask_(model, prune.masks(state))
                model.load_state_dict(state)
                pruner.load_state_dict(steps)
            for layer in (m for m in model.modules() if isinstance(m, nn.Linear)):
                with torch.no_grad():
                    noise = torch.randn(layer.weight.shape, generator=torch.Generator().manual_seed(step))
                    parameter_of(layer).add_(noise)
            pruner.step()
        return model

    whole, resumed = run(None), run(3)
    assert whole.state_dict().keys() == resumed.state_dict().keys()
    for key, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key])


def test_masks_move_and_convert_with_the_model() -> None:
    model = pruned().to(torch.bfloat16)
    for fqn, mask in prune.masks(model).items():
        assert zeros(model.get_submodule(fqn).weight, mask)
        assert model.get_submodule(fqn).weight.dtype == torch.bfloat16
    assert all(mask.is_meta for mask in prune.masks(pruned().to("meta")).values())


def test_removing_leaves_ordinary_layers() -> None:
    model, plain = pruned(), Model()
    expected, masks = model(IDS), prune.masks(model)
    parameters = {id(parameter_of(model.get_submodule(fqn))) for fqn in masks}
    assert prune.remove_(model) is model
    assert not prune.masks(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert torch.equal(model(IDS), expected)
    assert {id(model.get_submodule(fqn).weight) for fqn in masks} == parameters
    for fqn, mask in masks.items():
        assert zeros(model.get_submodule(fqn).weight, mask)
    prune.Pruner(model, prune.Magnitude(), prune.Unstructured(), 0.75).step()  # and on from there
    for fqn, mask in prune.masks(model).items():
        assert not (mask & ~masks[fqn]).any()


def test_models_that_torch_pruned_are_accepted() -> None:
    model = Model()
    torch_prune.global_unstructured(
        [(m, "weight") for m in model.modules() if isinstance(m, nn.Linear)], torch_prune.L1Unstructured, amount=0.4
    )
    torch_prune.l1_unstructured(model.head, "weight", 0.5)  # two masks in a container
    torch_prune.random_unstructured(model.head, "bias", 0.3)
    expected = model(IDS)
    masks = prune.masks(model)
    assert len(masks) == 13
    for fqn, mask in masks.items():
        assert torch.equal(mask, model.get_submodule(fqn).weight_mask.bool())
        assert torch.equal(prune.masks(model.state_dict())[fqn], mask)
    assert prune.report(model).rows[-1].sparsity > 0.5
    ours = Model()
    prune.mask_(ours, masks)
    with torch.no_grad():
        ours.head.bias.copy_(model.head.bias)
    torch.testing.assert_close(ours(IDS), expected)
    with torch.no_grad():
        model.blocks[0].q.weight_orig[~masks["blocks.0.q"]] = float("nan")
    prune.remove_(model)
    assert not prune.masks(model)
    assert model.state_dict().keys() == Model().state_dict().keys()
    torch.testing.assert_close(model(IDS), expected)
    for fqn, mask in masks.items():
        assert zeros(model.get_submodule(fqn).weight, mask)


def test_parents_that_read_a_childs_weight_see_the_mask() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    x = torch.randn(3, 5, 16)
    prune.Pruner(layer, prune.Magnitude(), prune.TwoFour()).step()
    assert set(prune.masks(layer)) == {"self_attn.out_proj", "linear1", "linear2"}
    trained = layer(x)
    with torch.no_grad():
        fast = layer.eval()(x)
    torch.testing.assert_close(fast, trained)
    prune.remove_(layer)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), fast)


def test_calibration_autocast_and_frozen_weights() -> None:
    model = pruned().requires_grad_(False)
    calibration = burnish.calibrate(model, [IDS])
    assert set(calibration) == set(prune.masks(model))
    with torch.autocast("cpu", torch.bfloat16):
        assert model(IDS).dtype == torch.bfloat16


def test_compilers_and_export_see_one_graph() -> None:
    model = pruned(prune.Block(16))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(IDS), model(IDS))
    compiled(IDS).sum().backward()
    mask = prune.masks(model)["head"]
    assert not parameter_of(model.head).grad[~mask].any()
    exported = torch.export.export(model, (IDS,)).module()
    torch.testing.assert_close(exported(IDS), model(IDS))


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_processes_train_what_one_trains(kind: str, tmp_path: Path) -> None:
    pair.run(prune_workers.distributed, kind, str(tmp_path))
    alone = prune_workers.model()
    prune_workers.train(alone, pruner=prune_workers.gradual(alone) if kind == "ddp" else None)
    (state, masks), (_, others) = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    assert state.keys() == alone.state_dict().keys()
    for key, value in alone.state_dict().items():
        torch.testing.assert_close(state[key], value, rtol=0, atol=1e-6)
    expected = prune.masks(alone)
    assert masks.keys() == others.keys() == expected.keys()
    assert len(expected) == (3 if kind == "ddp" else 2)
    for fqn, mask in expected.items():
        assert torch.equal(masks[fqn], mask)
        assert torch.equal(others[fqn], mask)
