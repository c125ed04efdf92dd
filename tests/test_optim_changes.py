"""What may change between the steps of an optimizer: options, parameters, gradients and state, by anybody's hand."""

from __future__ import annotations

import copy
import weakref
from typing import Any

import pytest
import torch
from burnish import optim
from burnish.optim import norm
from optimizers import OPTIMIZERS
from torch import nn


def parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    draw = torch.Generator().manual_seed(0)
    shapes = ((7, 5), (300,), (), (0, 3), (4, 3, 2))
    return [nn.Parameter(torch.randn(shape, generator=draw).to(dtype)) for shape in shapes]


def push(params: list[nn.Parameter], step: int) -> None:
    draw = torch.Generator().manual_seed(100 + step)
    for parameter in params:
        parameter.grad = torch.randn(parameter.shape, generator=draw).to(parameter.dtype)


#: options that are switched between steps; int8 excludes the last ones
SWITCHED: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("AdamW", {"amsgrad": True}, {"amsgrad": False}),
    ("SGD", {"momentum": 0.9}, {"momentum": 0.0}),
    ("RMSprop", {"momentum": 0.9}, {"momentum": 0.0}),
    ("Adam", {"ema_decay": 0.5, "amsgrad": True}, {"ema_decay": None, "amsgrad": False}),
    ("AdamW", {"master_weights": "split"}, {"master_weights": None}),
    ("RMSprop", {"centered": True, "momentum": 0.9}, {"centered": False, "momentum": 0.0}),
]


@pytest.mark.parametrize(
    ("name", "on", "off", "state_dtype"),
    [(*case, "fp32") for case in SWITCHED] + [(*case, "int8") for case in SWITCHED[:-1]],
)
def test_what_an_option_leaves_behind_is_saved_loads_and_is_taken_up_again(
    name: str, on: dict[str, Any], off: dict[str, Any], state_dtype: str
) -> None:
    dtype = torch.bfloat16 if "master_weights" in on else torch.float32
    plain = state_dtype == "fp32" and on.keys() <= {"amsgrad", "momentum", "centered"}
    mine, loaded, other = parameters(dtype), parameters(dtype), parameters(dtype)
    make, twin = OPTIMIZERS[name].ours, OPTIMIZERS[name].theirs
    here = make(mine, lr=0.1, state_dtype=state_dtype, **off)
    there = twin(other, lr=0.1, **(off if plain else {}))
    back = None
    for step, options in enumerate([on, on, off, off, on, on]):
        here.param_groups[0].update(options)
        if plain:
            there.param_groups[0].update(options)
        if step == 3:
            back = make(loaded, lr=0.1)
            back.load_state_dict(copy.deepcopy(here.state_dict()))
            with torch.no_grad():
                torch._foreach_copy_(loaded, mine)
        pairs = [(here, mine)] + [(there, other)] * plain
        if back is not None:
            back.param_groups[0].update(options)
            pairs.append((back, loaded))
        for optimizer, params in pairs:
            push(params, step)
            optimizer.step()
    assert all(torch.equal(*pair) for pair in zip(mine, loaded, strict=True))
    if plain:
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["fp32", "split"])
def test_a_step_without_masters_makes_them_anew(kind: str) -> None:
    params = parameters(torch.bfloat16)
    optimizer = optim.AdamW(params, lr=0.1)
    for masters in (kind, None, None, None, None, kind):
        optimizer.param_groups[0]["master_weights"] = masters
        before = [parameter.detach().clone() for parameter in params]
        for parameter in params:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        assert ("master" in optimizer.state[params[0]]) == (masters is not None)
        for one, two in zip(before, params, strict=True):  # no further than a step, not back to where masters once were
            torch.testing.assert_close(one.float(), two.float(), rtol=0, atol=0.15)


@pytest.mark.parametrize("state_dtype", ["fp32", "int8"])
def test_an_option_that_comes_late_begins_like_a_new_one(state_dtype: str) -> None:
    late, never = parameters(), parameters()
    for params, amsgrad in ((late, True), (never, False)):
        optimizer = optim.AdamW(params, lr=0.1, state_dtype=state_dtype)
        for step in range(2):
            push(params, 0)
            optimizer.step()
            optimizer.param_groups[0]["amsgrad"] = amsgrad
            if step and amsgrad:
                assert optimizer.state[params[0]]["max_exp_avg_sq"].shape == params[0].shape
    # the greatest of zeros and the second moment is the second moment, but for the rounding of codes
    torch.testing.assert_close(late, never, rtol=1e-6 if state_dtype == "fp32" else 0.05, atol=1e-6)


#: the momentum of each step; in those that are negative the GradScaler finds an infinity
MOMENTA = {
    "on later": (0.0, 0.0, 0.9, 0.9, 0.9),
    "off and on": (0.9, 0.9, 0.0, 0.0, 0.9, 0.9),
    "found first": (-0.9, -0.9, 0.9, 0.9),
    "found where it comes": (0.0, 0.0, -0.9, 0.9, 0.9),
    "found, off and on": (-0.9, 0.0, 0.0, 0.9, 0.9),
    "found, on, off and on": (-0.9, 0.9, 0.0, 0.9, 0.9),
}


def push_momentum(optimizer: Any, scaler: Any, params: list[nn.Parameter], step: int, momentum: float) -> None:
    """A step; the second parameter has no gradient in the first two, the last comes as a group of its own."""
    if step == 2:
        optimizer.add_param_group({"params": [params[-1]], "lr": 0.2})
    for group in optimizer.param_groups:
        group["momentum"] = abs(momentum)
    push(params, step)
    for parameter in params:
        parameter.grad *= scaler.get_scale()
    if step < 2:
        params[1].grad = None
    if momentum < 0:
        params[0].grad[0, 0] = float("inf")
    scaler.scale(torch.ones(()))  # else it has no scale yet
    scaler.step(optimizer)
    scaler.update()


@pytest.mark.parametrize("state_dtype", ["fp32", "int8"])
@pytest.mark.parametrize("momenta", MOMENTA.values(), ids=MOMENTA)
def test_a_momentum_buffer_is_the_first_gradient_it_meets(momenta: tuple[float, ...], state_dtype: str) -> None:
    """And not that of the parameter's first step, as in torch, whose dampening otherwise shows."""
    results = []
    for make, options in ((optim.SGD, {"state_dtype": state_dtype}), (torch.optim.SGD, {})):
        params, scaler = parameters(), torch.amp.GradScaler("cpu", init_scale=8.0)
        optimizer = make(params[:-1], lr=0.1, dampening=0.5, weight_decay=0.1, **options)
        for step, momentum in enumerate(momenta):
            push_momentum(optimizer, scaler, params, step, momentum)
        results.append(params)
    rough = {"rtol": 1e-5, "atol": 1e-6} if state_dtype == "fp32" else {"rtol": 0.02, "atol": 0.02}
    torch.testing.assert_close(*results, **rough)


@pytest.mark.parametrize("at", [1, 2, 3])
@pytest.mark.parametrize("begins", ["ours", "torch"])
@pytest.mark.parametrize("momenta", MOMENTA.values(), ids=MOMENTA)
def test_a_momentum_buffer_is_that_when_it_is_loaded(momenta: tuple[float, ...], begins: str, at: int) -> None:
    kinds = {"ours": optim.SGD, "torch": torch.optim.SGD}
    results = []
    for first, second in ((kinds[begins], optim.SGD), (torch.optim.SGD, torch.optim.SGD)):
        params, scaler = parameters(), torch.amp.GradScaler("cpu", init_scale=8.0)
        optimizer = first(params[:-1], lr=0.1, dampening=0.5, weight_decay=0.1)
        for step, momentum in enumerate(momenta):
            if step == at:
                state = copy.deepcopy(optimizer.state_dict())
                optimizer = second([{"params": params[:-1]}, *([{"params": params[-1:]}] if step > 2 else [])], lr=0.3)
                optimizer.load_state_dict(state)
            push_momentum(optimizer, scaler, params, step, momentum)
        results.append(params)
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


def shuffle(optimizer: torch.optim.Optimizer) -> None:
    first = next(iter(optimizer.state))
    optimizer.state[first] = optimizer.state.pop(first)


def lose(optimizer: torch.optim.Optimizer) -> None:
    del optimizer.state[optimizer.param_groups[-1]["params"][-1]]


CHANGES: dict[str, Any] = {
    "parameter": lambda o, p, s: setattr(p, "data", torch.full((300,), 0.5)),
    "parameter in place": lambda o, p, s: p.data.mul_(2),
    "memory": lambda o, p, s: p.data.set_(torch.arange(300.0)),
    "shape": lambda o, p, s: [
        setattr(each, "data", each.data.view(20, 15)) for each in (p, s["exp_avg"], s["exp_avg_sq"])
    ],
    "moment": lambda o, p, s: s.update(exp_avg=torch.ones(300)),
    "moment in place": lambda o, p, s: s["exp_avg"].fill_(0.25),
    "memory of a moment": lambda o, p, s: setattr(s["exp_avg_sq"], "data", torch.ones(300)),
    "count": lambda o, p, s: s.update(step=torch.tensor(7.0)),
    "rate": lambda o, p, s: o.param_groups[-1].update(lr=0.3),
    "rate that is a tensor": lambda o, p, s: o.param_groups[-1].update(lr=torch.tensor(0.3)),
    "decay": lambda o, p, s: o.param_groups[-1].update(weight_decay=0.7, betas=(0.5, 0.6), eps=1e-3, maximize=True),
    "frozen": lambda o, p, s: setattr(p, "grad", None),
    "order": lambda o, p, s: shuffle(o),
    "lost": lambda o, p, s: lose(o),
    "all lost": lambda o, p, s: o.state.clear(),
    "removed": lambda o, p, s: o.param_groups[-1]["params"].pop(),
    "another": lambda o, p, s: o.param_groups[-1]["params"].append(nn.Parameter(torch.ones(3))),
    "no parameters": lambda o, p, s: o.param_groups[0]["params"].clear(),
    "another group": lambda o, p, s: o.add_param_group({"params": [nn.Parameter(torch.ones(3))]}),
    "loaded": lambda o, p, s: o.load_state_dict(copy.deepcopy(o.state_dict())),
}


def grouped(params: list[nn.Parameter], groups: int) -> list[dict[str, Any]]:
    """The first parameter in a group of its own, if there are two."""
    cuts = [params] if groups == 1 else [params[:1], params[1:]]
    return [{"params": list(cut), "weight_decay": 0.1 * number} for number, cut in enumerate(cuts)]


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_changes_between_steps_is_what_is_stepped(change: Any, groups: int) -> None:
    both = []
    for make in (optim.AdamW, torch.optim.AdamW):
        params = parameters()
        optimizer = make(grouped(params, groups), lr=0.1)
        for step in range(5):
            push(params, step)
            if step == 3:
                grad = params[1].grad
                change(optimizer, params[1], optimizer.state[params[1]])
                if params[1].grad is not None and params[1].shape != grad.shape:
                    params[1].grad = grad.view(params[1].shape)
            optimizer.step()
        both.append([params, [optimizer.state[parameter]["exp_avg"] for parameter in params]])
    torch.testing.assert_close(*both, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("elements", [10, 100_000])
def test_replaced_state_goes_when_its_owner_lets_go(elements: int) -> None:
    """Of small parameters, whose state the optimizer has its own references to, by the next step."""
    parameter = nn.Parameter(torch.ones(elements))
    optimizer = optim.AdamW([parameter])
    parameter.grad = torch.ones(elements)
    for _ in range(2):
        optimizer.step()
    gone = weakref.ref(optimizer.state[parameter]["exp_avg"])
    optimizer.state[parameter]["exp_avg"] = torch.zeros(elements)
    if elements < 100:
        assert gone() is not None
        optimizer.step()
    assert gone() is None
    optimizer.step()
    gone = weakref.ref(optimizer.state[parameter]["exp_avg"])
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert gone() is None


@pytest.mark.parametrize("elements", [10, 100_000])
def test_replaced_memory_goes_at_once(elements: int) -> None:
    """Also of what the optimizer has its own references to."""
    parameter = nn.Parameter(torch.ones(elements))
    optimizer = optim.AdamW([parameter])
    parameter.grad = torch.ones(elements)
    for _ in range(2):
        optimizer.step()
    for tensor in (parameter, optimizer.state[parameter]["exp_avg"]):
        gone = weakref.ref(tensor.untyped_storage())
        tensor.data = torch.zeros(elements)
        assert gone() is None


def test_modules_that_swap_parameters_may_do_so_after_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """As ``torch.__future__`` can ask of them; no tensor is swapped that C++ has another reference to."""
    monkeypatch.setattr(torch.__future__, "_swap_module_params_on_conversion", True)
    net = nn.Linear(3, 2)
    params = [*net.parameters()]
    optimizer = optim.AdamW(params)
    for step in range(4):
        if step == 2:
            net.bfloat16()
        push(params, step)
        optimizer.step()
    assert all(one is other for one, other in zip(net.parameters(), params, strict=True))
    assert net.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_gradient_need_not_lie_in_memory_as_its_parameter_does(name: str, groups: int) -> None:
    """That of torch.autograd.grad, which follows no parameter, does not; nor does one that was expanded."""
    entry, after = OPTIMIZERS[name], []
    for spread in (False, True):
        torch.manual_seed(0)
        params = [nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(3, 5))]
        parts = [{"params": params}] if groups == 1 else [{"params": [each]} for each in params]
        optimizer = entry.ours(parts, **entry.options, max_grad_norm=0.5)
        for turned, wide in ((torch.randn(3, 4), torch.randn(3, 1)) for _ in range(3)):
            grads = [turned.t(), wide.expand(3, 5)]
            for parameter, grad in zip(params, grads, strict=True):
                parameter.grad = grad if spread else grad.contiguous()
            optimizer.step()
            assert not spread or [each.grad.stride() for each in params] == [(1, 4), (1, 0)]
        after.append([*params, *(value for each in params for value in optimizer.state[each].values())])
    assert all(map(torch.equal, *after))


@pytest.mark.parametrize("at", [0, 2, 4])
def test_a_parameter_in_place_of_another_is_stepped(at: int) -> None:
    """Wherever it is in its group, and whatever the optimizer kept of the one before."""
    both = []
    for make in (optim.AdamW, torch.optim.AdamW):
        params = parameters()
        optimizer = make(params, lr=0.1)
        for step in range(6):
            if step == 3:
                new = nn.Parameter(torch.ones_like(params[at]))
                optimizer.state[new] = optimizer.state.pop(params[at])
                params[at] = optimizer.param_groups[0]["params"][at] = new
                optimizer.state = type(optimizer.state)(dict, {each: optimizer.state[each] for each in params})
            push(params, step)
            optimizer.step()
        both.append(params)
    torch.testing.assert_close(*both, rtol=1e-5, atol=1e-6)


#: kinds of steps of several groups, by the optimizer's options and the parameters' dtype
KINDS: dict[str, tuple[dict[str, Any], torch.dtype]] = {
    "plain": ({}, torch.float32),
    "clipped": ({"max_grad_norm": 1.0, "maximize": True}, torch.float32),
    "codes": ({"state_dtype": "int8", "ema_decay": 0.9}, torch.float32),
    "at random": ({"state_dtype": "bf16", "stochastic_rounding": True, "seed": 3}, torch.bfloat16),
    "masters": ({"master_weights": "split"}, torch.bfloat16),
    "rate that is a tensor": ({"lr": torch.tensor(0.02)}, torch.float16),
}


@pytest.mark.parametrize(("options", "dtype"), KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_groups_that_are_known_are_stepped_as_those_that_are_looked_at(
    name: str, options: dict[str, Any], dtype: torch.dtype
) -> None:
    """The same bits, also where rates, gradients' dtypes and groups change between the steps."""
    both = []
    for known in (True, False):
        params = parameters(dtype)
        optimizer = OPTIMIZERS[name].ours(grouped(params[:-1], 2), **OPTIMIZERS[name].options, **options)
        for step in range(6):
            push(params, step)
            if step == 2:
                optimizer.param_groups[1]["lr"] = 2 * optimizer.param_groups[1]["lr"]
            if step == 3:
                params[1].grad_dtype = None
                params[1].grad = params[1].grad.bfloat16()
            if step == 4:
                optimizer.add_param_group({"params": params[-1:]})
            if known:
                assert bool(optimizer._known()) == (step not in (0, 4))
            else:
                optimizer._known = list
            optimizer.step()
        both.append([params, [list(optimizer.state[parameter].values()) for parameter in params]])
    torch.testing.assert_close(*both, rtol=0, atol=0)


def test_groups_differ_in_what_they_keep() -> None:
    """And each is known by its own state."""
    params = parameters(torch.bfloat16)
    kinds = ({"state_dtype": "int8"}, {"amsgrad": True}, {"master_weights": "fp32", "ema_decay": 0.5})
    optimizer = optim.AdamW([{"params": [each], **kind} for each, kind in zip(params, kinds, strict=False)])
    alone = [optim.AdamW([each], **kind) for each, kind in zip(parameters(torch.bfloat16), kinds, strict=False)]
    for step in range(3):
        assert bool(optimizer._known()) == (step > 0)
        push(params, step)
        push([each.param_groups[0]["params"][0] for each in alone], step)
        for each in (optimizer, *alone):
            each.step()
    for each, parameter in zip(alone, params, strict=False):
        (other, state), *_ = each.state.items()
        torch.testing.assert_close((parameter, optimizer.state[parameter]), (other, state), rtol=0, atol=0)


@pytest.mark.parametrize("done", [True, False])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_held_steps_are_done_when_they_are_released_or_never(name: str, done: bool) -> None:
    params = [nn.Parameter(torch.ones(300)) for _ in range(2)]
    for parameter in params:
        parameter.grad = torch.ones(300)
    optimizer = OPTIMIZERS[name].ours([{"params": [each]} for each in params], **OPTIMIZERS[name].options)
    optimizer.step()
    before = [parameter.detach().clone() for parameter in params]
    torch.ops.burnish.hold_steps()
    try:
        ((batch, state), _) = optimizer._known()
        scaling = norm.Scaling.of(optimizer, [batch])
        optimizer.update(batch, state, batch.arguments(state, scaling))
        assert torch.equal(params[0], before[0])
        assert state["step"][0] == 1
    finally:
        torch.ops.burnish.release_steps(done)
    assert torch.equal(params[0], before[0]) != done
    assert state["step"][0] == 1 + done
    optimizer.step()
    assert not torch.equal(params[1], before[1])
