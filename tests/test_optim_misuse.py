"""What careless and unlucky programs do to an optimizer: it goes on as torch.optim would, or says what is wrong, and in
neither case is half of a step or of a load done."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from burnish import optim
from optimizers import OPTIMIZERS, TWINS
from torch import Tensor, nn


def parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    draw = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=draw).to(dtype)) for shape in ((4, 3), (300,), (2, 5))]


def push(params: list[nn.Parameter], step: int, scale: float = 1.0) -> None:
    draw = torch.Generator().manual_seed(100 + step)
    for parameter in params:
        parameter.grad = scale * torch.randn(parameter.shape, generator=draw).to(parameter.dtype)


def averaging(steps: int = 2) -> tuple[optim.FusedOptimizer, list[nn.Parameter], list[Tensor]]:
    """An optimizer with averages, its parameters and copies of those."""
    params = parameters()
    optimizer = optim.AdamW(params, lr=0.1, ema_decay=0.9, state_dtype="int8")
    for step in range(steps):
        push(params, step)
        optimizer.step()
    return optimizer, params, [parameter.detach().clone() for parameter in params]


def same(ones: Any, others: Any) -> bool:
    return all(torch.equal(*pair) for pair in zip(ones, others, strict=True))


AMID_AVERAGES: dict[str, Any] = {
    "a copy": copy.deepcopy,
    "a copy pickled": lambda optimizer: pickle.dumps(optimizer),
    "load_state_dict": lambda optimizer: optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict())),
    "step": lambda optimizer: optimizer.step(),
}


@pytest.mark.parametrize("what", AMID_AVERAGES)
def test_averages_are_not_taken_for_parameters(what: str) -> None:
    optimizer, params, before = averaging()
    match = f"AdamW: {what.removesuffix(' pickled')} inside swap_ema"
    with optimizer.swap_ema(), pytest.raises(RuntimeError, match=match):
        AMID_AVERAGES[what](optimizer)
    assert same(params, before)
    AMID_AVERAGES[what](optimizer)


def test_a_closure_cannot_step_averages() -> None:
    optimizer, params, before = averaging()
    averages = optimizer.swap_ema()
    with pytest.raises(RuntimeError, match="step inside swap_ema"):
        optimizer.step(averages.__enter__)
    averages.__exit__(None, None, None)
    assert same(params, before)


def test_a_group_may_come_and_state_be_saved_amid_averages() -> None:
    optimizer, params, before = averaging()
    with optimizer.swap_ema():
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))]})
        saved = copy.deepcopy(optimizer.state_dict())
    assert same(params, before)
    assert same(saved["state"][0].values(), optimizer.state_dict()["state"][0].values())


def test_a_parameter_that_changes_its_shape_amid_averages_is_the_only_one_lost() -> None:
    optimizer, params, before = averaging()
    with (
        pytest.raises(RuntimeError, match="1 of the parameters changed their shape inside swap_ema"),
        optimizer.swap_ema(),
    ):
        params[0].data = torch.zeros(7)
    assert same(params[1:], before[1:])
    params[0].data = before[0].clone()
    optimizer.step()
    assert not same(params, before)


@pytest.mark.parametrize("groups", [1, 2])
def test_state_that_inference_mode_made_is_ordinary(groups: int) -> None:
    results = []
    for inference in (True, False):
        params = parameters()
        optimizer = optim.AdamW([{"params": params[:1]}, {"params": params[1:]}] if groups == 2 else params, lr=0.1)
        push(params, 0)
        with torch.inference_mode(inference):
            optimizer.step()
        assert not any(value.is_inference() for state in optimizer.state.values() for value in state.values())
        push(params, 1)
        optimizer.step()
        results.append([*params, *(state["exp_avg"] for state in optimizer.state.values())])
    assert same(*results)


def test_a_closure_that_raises_does_nothing() -> None:
    optimizer, params, before = averaging()
    state = copy.deepcopy(optimizer.state_dict())

    def closure() -> float:
        push(params, 3)
        raise KeyError("loss")

    with pytest.raises(KeyError, match="loss"):
        optimizer.step(closure)
    assert same(params, before)
    assert state["param_groups"] == optimizer.state_dict()["param_groups"]
    assert all(same(one.values(), optimizer.state_dict()["state"][key].values()) for key, one in state["state"].items())
    optimizer.step()
    assert not same(params, before)


def mask(optimizer: Any, parameter: nn.Parameter) -> None:
    optimizer.masks = {parameter: torch.ones(4, 3, dtype=torch.bool)}
    optimizer.masks[parameter].set_(torch.ones(5, dtype=torch.bool))


#: what is wrong with the last group: done to it, the error, and its words
LAST: dict[str, tuple[Any, type[Exception], str]] = {
    "betas": (
        lambda o, p: o.param_groups[-1].update(betas=(2.0, 0.9)),
        ValueError,
        "Invalid beta parameter at index 0",
    ),
    "rate": (lambda o, p: o.param_groups[-1].update(lr=float("nan")), ValueError, "Invalid learning rate: nan"),
    "words": (lambda o, p: o.param_groups[-1].update(lr="0.1"), ValueError, r"Invalid learning rate: 0\.1"),
    "format": (lambda o, p: o.param_groups[-1].update(state_dtype="fp8"), ValueError, "AdamW: state_dtype is 'fp8'"),
    "decay": (lambda o, p: o.param_groups[-1].update(ema_decay=1.5), ValueError, r"AdamW: ema_decay is 1\.5"),
    "other format": (
        lambda o, p: o.param_groups[-1].update(state_dtype="bf16"),
        RuntimeError,
        "AdamW: state of parameter 0 of group 1: exp_avg is fp32, expected bf16",
    ),
    "moment": (
        lambda o, p: o.state[p].update(exp_avg=torch.ones(7)),
        RuntimeError,
        r"AdamW: state of parameter 0 of group 1: exp_avg has the shape \(7,\), expected \(4, 3\)",
    ),
    "other moment": (
        lambda o, p: o.state[p].update(exp_avg_sq=torch.ones(7)),
        RuntimeError,
        r"adam_step: exp_avg_sqs\[0\] has shape \(7,\), expected \(4, 3\)",
    ),
    "no tensor": (
        lambda o, p: o.state[p].update(exp_avg_sq=[1.0]),
        RuntimeError,
        "AdamW: state of parameter 0 of group 1: exp_avg_sq is a list, expected a tensor",
    ),
    "shape": (
        lambda o, p: (setattr(p, "data", torch.ones(6)), setattr(p, "grad", torch.ones(6))),
        RuntimeError,
        r"AdamW: state of parameter 0 of group 1: exp_avg has the shape \(4, 3\), expected \(6,\)",
    ),
    "mask": (
        mask,
        RuntimeError,
        r"AdamW: parameter 0 of group 1 has a mask that has the shape \(5,\), expected \(4, 3\)",
    ),
}


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(("change", "error", "match"), LAST.values(), ids=LAST)
def test_what_is_wrong_with_the_last_group_stops_the_first(
    change: Any, error: type[Exception], match: str, groups: int
) -> None:
    """And an only group is told in the same words."""
    params = parameters()
    lists = [params[1:], params[:1]]
    optimizer = optim.AdamW([{"params": each} for each in lists] if groups == 2 else params, lr=0.1)
    push(params, 0)
    optimizer.step()
    push(params, 1)
    change(optimizer, params[0])
    before = [parameter.detach().clone() for parameter in params]
    moment = optimizer.state[params[1]]["exp_avg"].clone()
    with pytest.raises(error, match=match if groups == 2 else match.replace("group 1", "group 0")):
        optimizer.step()
    assert same(params, before)
    assert torch.equal(optimizer.state[params[1]]["exp_avg"], moment)


@pytest.mark.parametrize("groups", [1, 2])
def test_state_follows_a_change_of_memory_format(groups: int) -> None:
    results = []
    for make in (optim.AdamW, torch.optim.AdamW):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 3))
        optimizer = make([{"params": layer.parameters()} for layer in net] if groups == 2 else net.parameters(), lr=0.1)
        for step in range(4):
            for parameter in net.parameters():
                draw = torch.Generator().manual_seed(step)
                parameter.grad = torch.empty_like(parameter).copy_(torch.randn(parameter.shape, generator=draw))
            optimizer.step()
            net.to(memory_format=torch.channels_last if step % 2 == 0 else torch.contiguous_format)
        results.append([*net.parameters()])
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


def test_codes_do_not_follow_a_change_of_memory_format() -> None:
    """Their blocks and scales are of the order of memory: neither in a step nor from a state dict."""
    plain, turned = (nn.Conv2d(3, 4, 3).to(memory_format=f) for f in (torch.contiguous_format, torch.channels_last))
    optimizers = [optim.AdamW(net.parameters(), state_dtype="int8") for net in (plain, turned)]
    for net, optimizer in zip((plain, turned), optimizers, strict=True):
        for parameter in net.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    match = r"AdamW: state of parameter 0 of group 0: exp_avg has strides .*: the blocks of its codes"
    for one, other in (optimizers, reversed(optimizers)):
        with pytest.raises(ValueError, match=match):
            one.load_state_dict(copy.deepcopy(other.state_dict()))
    plain.to(memory_format=torch.channels_last)
    plain.weight.grad = torch.ones_like(plain.weight)
    before = plain.weight.detach().clone()
    with pytest.raises(RuntimeError, match=match):
        optimizers[0].step()
    assert torch.equal(plain.weight, before)


def put(*path: Any) -> Any:
    def change(state: Any) -> None:
        for key in path[:-2]:
            state = state[key]
        state[path[-2]] = path[-1]

    return change


_MOMENT = "AdamW: state of parameter 0 of group 0: exp_avg is"
MALFORMED: dict[str, tuple[Any, str]] = {
    "groups": (put("param_groups", None), "AdamW: the state dict's param_groups is a NoneType, expected a list"),
    "group": (put("param_groups", 0, [1]), "AdamW: group 0 of the state dict has no params, expected a list"),
    "numbers": (put("param_groups", 0, "params", [[0], [1], [2]]), "AdamW: group 0 of the state dict has no params"),
    "state": (put("state", [1]), "AdamW: the state dict's state is a list, expected a dict"),
    "entry": (put("state", 0, None), "AdamW: state of parameter 0 of group 0 is a NoneType, expected a dict"),
    "version 0": (put("param_groups", 0, "burnish_version", 0), "AdamW: the state dict is of format 0; this one reads"),
    "version": (put("param_groups", 0, "burnish_version", "1"), "AdamW: the state dict is of format '1'; this one"),
    "one beta": (put("param_groups", 0, "betas", 0.9), r"AdamW: betas is 0\.9, expected two numbers or two tensors"),
    "three": (put("param_groups", 0, "betas", (0.9, 0.9, 0.9)), "AdamW: betas is .*, expected two numbers"),
    "words": (put("param_groups", 0, "eps", "1e-8"), "Invalid epsilon value: 1e-8"),
    "nothing": (put("param_groups", 0, "lr", None), "Invalid learning rate: None"),
    "count": (put("state", 0, "step", torch.tensor(-3.0)), "state of parameter 0 of group 0: step is -3.0, expected a"),
    "no count": (put("state", 0, "step", float("nan")), "state of parameter 0 of group 0: step is nan, expected a"),
    "sparse": (put("state", 0, "exp_avg", torch.ones(4, 3).to_sparse()), f"{_MOMENT} torch.sparse_coo on cpu"),
    "meta": (put("state", 0, "exp_avg", torch.ones(4, 3, device="meta")), f"{_MOMENT} torch.strided on meta, expected"),
}


@pytest.mark.parametrize(("change", "match"), MALFORMED.values(), ids=MALFORMED)
def test_what_is_no_state_dict(change: Any, match: str) -> None:
    params = parameters()
    optimizer = optim.AdamW(params)
    push(params, 0)
    optimizer.step()
    before = copy.deepcopy(optimizer.state_dict())
    state = copy.deepcopy(before)
    change(state)
    with pytest.raises(ValueError, match=match):
        optimizer.load_state_dict(state)
    assert before["param_groups"] == optimizer.state_dict()["param_groups"]
    assert all(
        same(one.values(), optimizer.state_dict()["state"][key].values()) for key, one in before["state"].items()
    )


CYCLES: dict[str, Any] = {
    "one cycle": lambda optimizer, cycles: torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=0.1, total_steps=12, cycle_momentum=cycles
    ),
    "cyclic": lambda optimizer, cycles: torch.optim.lr_scheduler.CyclicLR(
        optimizer, 0.01, 0.1, step_size_up=3, cycle_momentum=cycles
    ),
}


@pytest.mark.parametrize("tensors", [False, True])
@pytest.mark.parametrize("cycle", CYCLES.values(), ids=CYCLES)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_schedules_of_momentum_and_betas(name: str, cycle: Any, tensors: bool) -> None:
    """Also of tensors, of which the schedules leave one float, through a state dict in the middle."""
    entry, results = OPTIMIZERS[name], []
    adaptive = "betas" in entry.ours([nn.Parameter(torch.ones(1))]).defaults
    betas = {"betas": (torch.tensor(0.9), torch.tensor(0.99))} if tensors and adaptive else {}
    options = {**entry.options, "lr": torch.tensor(0.1) if tensors else 0.1, **(betas if name in TWINS else {})}
    for make in (entry.ours, entry.theirs):
        params = parameters()
        optimizer = make(params, **copy.deepcopy(options))
        momentum = name != "Adagrad"
        scheduler = cycle(optimizer, momentum)
        for step in range(11):
            if step == 5 and make is entry.ours:
                states = copy.deepcopy((optimizer.state_dict(), scheduler.state_dict()))
                optimizer = make(params, lr=0.1)
                scheduler = cycle(optimizer, momentum)
                optimizer.load_state_dict(states[0])
                scheduler.load_state_dict(states[1])
            push(params, step)
            optimizer.step()
            scheduler.step()
        results.append(params)
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", TWINS)
def test_a_rate_that_is_changed_where_it_is(name: str) -> None:
    results, rate = [], torch.tensor(0.1)
    optimizers = [make(parameters(), lr=rate, **TWINS[name].options) for make in (TWINS[name].ours, TWINS[name].theirs)]
    for step in range(4):
        rate.fill_(0.1 / (step + 1))
        for optimizer in optimizers:
            push(optimizer.param_groups[0]["params"], step)
            optimizer.step()
    results = [optimizer.param_groups[0]["params"] for optimizer in optimizers]
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


def test_a_group_that_comes_after_a_load_is_clipped_with_the_others() -> None:
    saved, params, late = optim.AdamW(parameters(), max_grad_norm=0.5), parameters(), nn.Parameter(torch.ones(3))
    optimizer = optim.AdamW(params, lr=0.1)
    optimizer.load_state_dict(saved.state_dict())
    optimizer.add_param_group({"params": [late]})
    twins = [nn.Parameter(parameter.detach().clone()) for parameter in (*params, late)]
    torchs = torch.optim.AdamW(twins, lr=1e-3)
    for each in ((*params, late), twins):
        push(list(each), 0, 100.0)
    optimizer.param_groups[1]["lr"] = 1e-3
    optimizer.step()
    nn.utils.clip_grad_norm_(twins, 0.5)
    torchs.step()
    torch.testing.assert_close([*params, late], twins, rtol=1e-5, atol=1e-6)


def test_parameters_keep_their_names_when_state_of_others_is_loaded() -> None:
    named = list(zip(("a", "b", "c"), [nn.Parameter(torch.ones(3)) for _ in range(3)], strict=True))
    saving, optimizer = optim.AdamW(named[::-1]), optim.AdamW(named)
    push([parameter for _, parameter in named], 0)
    saving.step()
    optimizer.load_state_dict(saving.state_dict())
    optimizer.masks = {"a": torch.zeros(3, dtype=torch.bool)}
    optimizer.step()
    assert [bool(parameter.any()) for _, parameter in named] == [False, True, True]


def test_a_step_that_fails_leaves_no_scale_behind() -> None:
    results = []
    for fails in (True, False):
        params, scaler = parameters(), torch.amp.GradScaler("cpu", init_scale=8.0)
        optimizer = optim.SGD(params, lr=0.1)
        scaler.scale(torch.ones(()))
        if fails:
            push(params, 0)
            params[0].grad = params[0].grad.to_sparse()
            with pytest.raises(RuntimeError, match="sparse gradient"):
                scaler.step(optimizer)
        push(params, 1)
        optimizer.step()
        results.append(params)
    assert same(*results)


@pytest.mark.parametrize(("saved", "given"), [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
@pytest.mark.parametrize("masters", ["split", "fp32"])
def test_masters_of_another_dtype_are_refused_and_the_advice_works(
    masters: str, saved: torch.dtype, given: torch.dtype
) -> None:
    def made(dtype: torch.dtype) -> tuple[nn.Linear, optim.AdamW]:
        model = nn.Linear(4, 3).to(dtype)
        return model, optim.AdamW(model.parameters(), master_weights=masters)

    def step(model: nn.Linear, optimizer: optim.AdamW) -> None:
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()

    model, optimizer = made(saved)
    step(model, optimizer)
    state = optimizer.state_dict()
    has, was, got = ("a", "of 16 bits", "fp32") if saved is torch.bfloat16 else ("no", "in fp32", "bf16")
    match = f"has {has} master, as of a parameter {was}, and this one is {got}: load it into parameters {was} and conv"
    with pytest.raises(ValueError, match=match):
        made(given)[1].load_state_dict(state)
    model, optimizer = made(saved)
    optimizer.load_state_dict(state)
    step(model.to(given), optimizer)
    assert all(int(optimizer.state[parameter]["step"]) == 2 for parameter in model.parameters())
