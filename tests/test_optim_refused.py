"""What burnish's optimizers refuse: one exception that says what is wrong, with optimizer and parameters as before."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import pytest
import torch
from burnish import optim
from optimizers import OPTIMIZERS, TWINS
from torch import Tensor, nn
from torch.testing._internal.common_optimizers import OptimizerErrorEnum, optim_db

ERRORS = [
    pytest.param(name, case, id=f"{name}-{case.optimizer_error_input.desc}".replace(" ", "_"))
    for name, info in {info.name: info for info in optim_db}.items()
    if name in TWINS
    for case in info.optim_error_inputs_func(device="cpu", dtype=torch.float32)
]
NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(("name", "case"), ERRORS)
def test_torchs_errors(name: str, case: Any) -> None:
    given = case.optimizer_error_input
    assert case.error_on is OptimizerErrorEnum.CONSTRUCTION_ERROR
    params = [nn.Parameter(torch.randn(2, 3))] if given.params is None else given.params
    if issubclass(case.error_type, Warning):  # torch only warns of a parameter that comes twice
        warned: Any = pytest.warns(case.error_type, match=case.error_regex)
        refused: Any = pytest.raises(ValueError, match="comes twice in group 0")
    else:
        warned, refused = contextlib.nullcontext(), pytest.raises(case.error_type, match=case.error_regex)
    with warned, refused:
        TWINS[name].ours(params, **given.kwargs)


OPTIONS = [
    ({"lr": -1.0}, r"Invalid learning rate: -1\.0"),
    ({"lr": NAN}, "Invalid learning rate: nan"),
    ({"lr": torch.tensor(-1.0)}, "Invalid learning rate"),
    ({"eps": -1e-8}, "Invalid epsilon value: -1e-08"),
    ({"eps": NAN}, "Invalid epsilon value: nan"),
    ({"eps": INF}, "Invalid epsilon value: inf"),
    ({"weight_decay": -0.1}, r"Invalid weight_decay value: -0\.1"),
    ({"weight_decay": NAN}, "Invalid weight_decay value: nan"),
    ({"betas": (-0.1, 0.9)}, r"Invalid beta parameter at index 0: -0\.1"),
    ({"betas": (0.9, 1.0)}, r"Invalid beta parameter at index 1: 1\.0"),
    ({"betas": (0.9, NAN)}, "Invalid beta parameter at index 1: nan"),
    ({"betas": (torch.tensor([0.9, 0.8]), torch.tensor(0.9))}, r"Tensor betas\[0\] must be 1-element"),
    ({"max_grad_norm": 0}, r"AdamW: max_grad_norm is 0, expected a positive number or None"),
    ({"max_grad_norm": NAN}, r"AdamW: max_grad_norm is nan, expected a positive number"),
    ({"max_grad_norm": "1"}, r"AdamW: max_grad_norm is '1', expected a positive number"),
    ({"state_dtype": "fp8"}, r"AdamW: state_dtype is 'fp8', expected 'fp32', 'bf16' or 'int8'"),
    ({"state_dtype": torch.int8}, r"AdamW: state_dtype is torch\.int8, expected 'fp32', 'bf16' or 'int8'"),
    ({"master_weights": "bf16"}, r"AdamW: master_weights is 'bf16', expected None, 'fp32' or 'split'"),
    ({"stochastic_rounding": 1}, r"AdamW: stochastic_rounding is 1, expected True or False"),
    ({"seed": -1}, r"AdamW: seed is -1, expected an int"),
    ({"seed": 0.5}, r"AdamW: seed is 0\.5, expected an int"),
    ({"ema_decay": 1.0}, r"AdamW: ema_decay is 1\.0, expected a number in \[0, 1\) or None"),
    ({"ema_decay": NAN}, r"AdamW: ema_decay is nan, expected a number"),
    ({"capturable": True, "stochastic_rounding": True}, "AdamW: a captured step repeats its random bits"),
]


#: what is each optimizer's own
OWN_OPTIONS = [
    ("SGD", {"momentum": -0.5}, r"Invalid momentum value: -0\.5"),
    ("SGD", {"momentum": NAN}, "Invalid momentum value: nan"),
    ("SGD", {"dampening": NAN}, "Invalid dampening value: nan"),
    ("SGD", {"dampening": INF}, "Invalid dampening value: inf"),
    ("SGD", {"weight_decay": INF}, "Invalid weight_decay value: inf"),
    ("SGD", {"nesterov": True, "momentum": 0}, "Nesterov momentum requires a momentum and zero dampening"),
    ("SGD", {"nesterov": True, "dampening": 0.1}, "Nesterov momentum requires a momentum and zero dampening"),
    ("SGD", {"ema_decay": 1.0}, r"SGD: ema_decay is 1\.0, expected a number in \[0, 1\) or None"),
    ("Adagrad", {"lr": NAN}, "Invalid learning rate: nan"),
    ("Adagrad", {"lr_decay": -0.1}, r"Invalid lr_decay value: -0\.1"),
    ("Adagrad", {"lr_decay": NAN}, "Invalid lr_decay value: nan"),
    ("Adagrad", {"weight_decay": -1.0}, r"Invalid weight_decay value: -1\.0"),
    ("Adagrad", {"initial_accumulator_value": -1.0}, r"Invalid initial_accumulator_value value: -1\.0"),
    ("Adagrad", {"initial_accumulator_value": INF}, "Invalid initial_accumulator_value value: inf"),
    ("Adagrad", {"eps": NAN}, "Invalid epsilon value: nan"),
    ("RMSprop", {"alpha": 1.0}, r"Invalid alpha value: 1\.0"),
    ("RMSprop", {"alpha": NAN}, "Invalid alpha value: nan"),
    ("RMSprop", {"momentum": -0.5}, r"Invalid momentum value: -0\.5"),
    ("RMSprop", {"momentum": INF}, "Invalid momentum value: inf"),
    ("RMSprop", {"eps": -1e-8}, "Invalid epsilon value: -1e-08"),
    ("RMSprop", {"weight_decay": NAN}, "Invalid weight_decay value: nan"),
    (
        "RMSprop",
        {"centered": True, "state_dtype": "int8"},
        r"RMSprop: state_dtype is 'int8', expected .* with centered",
    ),
    ("Lion", {"betas": (0.9, 1.0)}, r"Invalid beta parameter at index 1: 1\.0"),
    ("Lion", {"betas": (NAN, 0.9)}, "Invalid beta parameter at index 0: nan"),
    ("Lion", {"weight_decay": -0.1}, r"Invalid weight_decay value: -0\.1"),
    ("Lion", {"lr": INF}, "Invalid learning rate: inf"),
    ("LAMB", {"betas": (0.9, -0.5)}, r"Invalid beta parameter at index 1: -0\.5"),
    ("LAMB", {"eps": INF}, "Invalid epsilon value: inf"),
    ("LAMB", {"weight_decay": NAN}, "Invalid weight_decay value: nan"),
    ("LAMB", {"lr": -1.0}, r"Invalid learning rate: -1\.0"),
]
ALL_OPTIONS = [
    pytest.param(name, options, match, id=f"{name}-{options}")
    for name, options, match in [*(("AdamW", *both) for both in OPTIONS), *OWN_OPTIONS]
]


@pytest.mark.parametrize(("name", "options", "match"), ALL_OPTIONS)
def test_options_are_refused_when_made_added_and_loaded(name: str, options: dict[str, Any], match: str) -> None:
    given = OPTIMIZERS[name].options | options
    with pytest.raises(ValueError, match=match):
        OPTIMIZERS[name].ours([nn.Parameter(torch.ones(3))], **given)
    optimizer = stepped(name)
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=match):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))], **given})
    state = copy.deepcopy(optimizer.state_dict())
    state["param_groups"][0] |= options
    with pytest.raises(ValueError, match=match):
        optimizer.load_state_dict(state)
    unchanged(optimizer, before)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"fused": True, "differentiable": True}, RuntimeError, "`fused` does not support `differentiable`"),
        ({"differentiable": True}, RuntimeError, "`fused` does not support `differentiable`"),
        ({"fused": True, "foreach": True}, RuntimeError, "`fused` and `foreach` cannot be `True` together"),
        ({"state_type": "int8"}, TypeError, "AdamW: unknown keyword 'state_type'; beyond torch.optim's there are"),
        ({"masks": [1]}, TypeError, "AdamW: masks is a list, expected a mapping"),
        (
            {"masks": {"a": torch.ones(3) > 0}},
            ValueError,
            r"masks\['a'\] is no parameter .*; pass its parameters by name",
        ),
        ({"masks": {torch.ones(3): torch.ones(3) > 0}}, ValueError, "a key of masks is no parameter of this optimizer"),
    ],
)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_implementations_keywords_and_masks(
    name: str, options: dict[str, Any], error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match.replace("AdamW", name)):
        OPTIMIZERS[name].ours([nn.Parameter(torch.ones(3))], **options)


@pytest.mark.parametrize(
    ("mask", "match"),
    [
        (torch.ones(3), r"masks\['w'\] is fp32, expected bool"),
        (torch.ones(4, dtype=torch.bool), r"masks\['w'\] has the shape \(4,\), expected \(3,\)"),
        (torch.ones(3, dtype=torch.bool, device="meta"), r"masks\['w'\] is on meta, expected cpu"),
        ([True, True, True], r"masks\['w'\] is a list, expected a bool tensor"),
    ],
)
def test_masks(mask: Any, match: str) -> None:
    optimizer = optim.AdamW([("w", nn.Parameter(torch.ones(3)))])
    with pytest.raises(ValueError, match=match):
        optimizer.masks = {"w": mask}
    assert not optimizer.masks


def test_masks_of_a_group_alone() -> None:
    mine, other = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match="SGD: group 0 has masks, which are of all groups together"):
        optim.SGD([{"params": [mine], "masks": {mine: torch.zeros(3) > 0}}])
    optimizer = optim.SGD([mine])
    with pytest.raises(ValueError, match=r"SGD: group 1 has masks, .* assign optimizer\.masks"):
        optimizer.add_param_group({"params": [other], "masks": {other: torch.zeros(3) > 0}})
    assert len(optimizer.param_groups) == 1


def memory() -> Tensor:
    return torch.arange(12.0).view(3, 4)


SHARED = {
    "the same": lambda data: (data, data),
    "a row": lambda data: (data, data[1]),
    "columns": lambda data: (data.t(), data.view(-1)[5:7]),
    "other bytes": lambda data: (data, data.view(torch.bfloat16).view(-1)[3:5]),
}


@pytest.mark.parametrize("views", SHARED.values(), ids=SHARED)
def test_parameters_that_share_memory(views: Any) -> None:
    one, two = (nn.Parameter(view.detach()) for view in views(memory()))
    with pytest.raises(ValueError, match=r"AdamW: parameter \d of group \d shares memory with another parameter"):
        optim.AdamW([one, two])
    optimizer = optim.AdamW([one])
    with pytest.raises(ValueError, match="shares memory with another parameter"):
        optimizer.add_param_group({"params": [two]})
    assert [group["params"] for group in optimizer.param_groups] == [[one]]


def test_neighbours_in_memory_share_none() -> None:
    data = memory().view(-1)
    optim.AdamW([nn.Parameter(data[:5]), nn.Parameter(data[5:]), nn.Parameter(data[3:3])])


@pytest.mark.parametrize(
    ("parameter", "match"),
    [
        (torch.ones(3, dtype=torch.float64), "AdamW: parameter 0 of group 0 is fp64, expected fp32, bf16 or fp16"),
        (
            torch.ones(3, dtype=torch.complex64),
            "AdamW: parameter 0 of group 0 is complex64, expected fp32, bf16 or fp16",
        ),
        (torch.ones(3, 4)[:, ::2], r"has strides \(4, 2\) with gaps or overlaps, expected dense memory"),
        (torch.ones(3, 1).expand(3, 4), r"has strides \(1, 0\) with gaps or overlaps, expected dense memory"),
    ],
)
def test_parameters_of_other_kinds(parameter: Tensor, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        optim.AdamW([nn.Parameter(parameter)])


def stepped(name: str = "AdamW", **options: Any) -> optim.FusedOptimizer:
    """An optimizer of two groups after a step."""
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(300)), nn.Parameter(torch.randn(2, 5))]
    entry = OPTIMIZERS[name]
    optimizer = entry.ours([{"params": params[:2]}, {"params": params[2:], "lr": 0.1}], **entry.options, **options)
    for parameter in params:
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    return optimizer


def snapshot(optimizer: Any) -> Any:
    """Copies of parameters, groups and state, and the groups' and parameters' own objects."""
    params = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return [parameter.detach().clone() for parameter in params], copy.deepcopy(optimizer.state_dict()), params


def unchanged(optimizer: Any, before: Any) -> None:
    values, state, params = before
    now = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert all(one is other for one, other in zip(now, params, strict=True))
    assert all(torch.equal(one, other) for one, other in zip(now, values, strict=True))
    after = optimizer.state_dict()
    assert after["param_groups"] == state["param_groups"]
    assert after["state"].keys() == state["state"].keys()
    for key, entries in state["state"].items():
        assert after["state"][key].keys() == entries.keys()
        for name, value in entries.items():
            assert after["state"][key][name].dtype == value.dtype
            assert torch.equal(after["state"][key][name], value)


GRADIENTS = [
    (
        torch.ones(2, 5).to_sparse(),
        "has a sparse gradient: AdamW does not support sparse gradients, please consider",
    ),
    (torch.ones(2, 5, dtype=torch.complex64), "has a gradient of complex64, expected fp32, bf16 or fp16"),
    (torch.ones(2, 5, dtype=torch.float64), "has a gradient of fp64, expected fp32, bf16 or fp16"),
]


@pytest.mark.parametrize(("grad", "match"), GRADIENTS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_gradients_in_the_last_group_stop_the_first(name: str, grad: Tensor, match: str) -> None:
    optimizer = stepped(name, max_grad_norm=1.0)
    before = snapshot(optimizer)
    for parameter in before[2]:
        parameter.grad = torch.ones_like(parameter)
    before[2][2].grad_dtype = None  # torch lets a gradient have any dtype then
    before[2][2].grad = grad
    match = f"AdamW: parameter 0 of group 1 {match}".replace("AdamW", name)
    with pytest.raises(RuntimeError, match=match):
        optimizer.step()
    unchanged(optimizer, before)


@pytest.mark.parametrize("limit", [None, 1.0])
@pytest.mark.parametrize(("grad", "match"), GRADIENTS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_gradient_that_the_op_refuses_is_named(name: str, grad: Tensor, match: str, limit: float | None) -> None:
    """Of an only group, whose gradients nobody looks at before the op."""
    params = [nn.Parameter(torch.ones(4, 3)), nn.Parameter(torch.ones(2, 5))]
    optimizer = OPTIMIZERS[name].ours(params, **OPTIMIZERS[name].options, max_grad_norm=limit)
    for parameter in params:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert optimizer._known()
    before = snapshot(optimizer)
    params[1].grad_dtype = None
    params[1].grad = grad
    match = f"AdamW: parameter 1 of group 0 {match}".replace("AdamW", name)
    with pytest.raises(RuntimeError, match=match):
        optimizer.step()
    unchanged(optimizer, before)


def test_steps_that_cannot_be() -> None:
    optimizer = optim.AdamW([nn.Parameter(torch.ones(3))], capturable=True)
    optimizer.param_groups[0]["params"][0].grad = torch.ones(3)
    with pytest.raises(RuntimeError, match="If capturable=True, params and state_steps must be on supported devices"):
        optimizer.step()
    optimizer = stepped(max_grad_norm=1.0)
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match="max_grad_norm is of all groups together, but group 2 has its own"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))], "max_grad_norm": 2.0})
    unchanged(optimizer, before)
    optimizer.param_groups[1]["max_grad_norm"] = 2.0
    with pytest.raises(RuntimeError, match="max_grad_norm is of all groups together, but they differ in it"):
        optimizer.step()
    with pytest.raises(RuntimeError, match=r"swap_ema\(\) without averages"), optimizer.swap_ema():
        pass


def drop(*path: Any) -> Any:
    def change(state: Any) -> None:
        for key in path[:-1]:
            state = state[key]
        del state[path[-1]]

    return change


def put(*path: Any) -> Any:
    def change(state: Any) -> None:
        for key in path[:-2]:
            state = state[key]
        state[path[-2]] = path[-1]

    return change


STATES = {
    "version": (
        put("param_groups", 1, "burnish_version", 2),
        "of format 2, of a newer burnish; this one reads up to 1",
    ),
    "no groups": (drop("param_groups"), "expected a state dict with 'state' and 'param_groups'"),
    "one group": (drop("param_groups", 1), "loaded state dict has a different number of parameter groups"),
    "parameters": (put("param_groups", 1, "params", [2, 3]), "doesn't match the size of optimizer's group"),
    "twice": (put("param_groups", 1, "params", [1]), "the state dict names a parameter twice"),
    "no option": (drop("param_groups", 0, "ema_decay"), "group 0 of the state dict has no ema_decay"),
    "Adam": (
        put("param_groups", 0, "decoupled_weight_decay", False),
        "has decoupled_weight_decay=False, expected True",
    ),
    "stranger": (put("state", 9, {}), "has state of a parameter 9 that none of its groups lists"),
    "no moment": (
        drop("state", 2, "exp_avg_sq"),
        "state of parameter 0 of group 1 has no exp_avg_sq, expected step, exp",
    ),
    "no step": (drop("state", 0, "step"), "state of parameter 0 of group 0 has no step"),
    "no average": (drop("state", 0, "ema"), "state of parameter 0 of group 0 has no ema"),
    "more": (put("state", 1, "momentum_buffer", torch.ones(300)), "of group 0 has momentum_buffer, expected step"),
    "shape": (put("state", 2, "exp_avg", torch.ones(5, 2)), r"exp_avg has the shape \(5, 2\), expected \(2, 5\)"),
    "dtype": (put("state", 1, "exp_avg", torch.ones(300).bfloat16()), "exp_avg is bf16, expected fp32"),
    "list": (put("state", 1, "exp_avg", [1.0]), "exp_avg is a list, expected a tensor"),
}


@pytest.mark.parametrize(("change", "match"), STATES.values(), ids=STATES)
def test_state_dicts(change: Any, match: str) -> None:
    optimizer = stepped(ema_decay=0.9)
    before = snapshot(optimizer)
    state = copy.deepcopy(optimizer.state_dict())
    change(state)
    with pytest.raises(ValueError, match=match):
        optimizer.load_state_dict(state)
    unchanged(optimizer, before)


@pytest.mark.parametrize("other", ["SGD", "Adagrad", "RMSprop", "NAdam", "Adamax", "Adam", "AdamW"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_dicts_of_other_optimizers(name: str, other: str) -> None:
    if name == other:
        return
    optimizer = stepped(name)
    before = snapshot(optimizer)
    groups = [{"params": [p.detach().clone() for p in group["params"]]} for group in optimizer.param_groups]
    state = getattr(torch.optim, other)(groups, lr=0.1).state_dict()
    with pytest.raises(ValueError, match="it is of another optimizer"):
        optimizer.load_state_dict(state)
    unchanged(optimizer, before)


def test_torchs_moments_do_not_become_codes() -> None:
    optimizer, torchs = stepped(state_dtype="int8"), torch.optim.AdamW([torch.ones(3)])
    before = snapshot(optimizer)
    state = {"state": {}, "param_groups": []}
    for number, count in enumerate((2, 1)):
        group = torchs.state_dict()["param_groups"][0] | {"params": list(range(2 * number, 2 * number + count))}
        state["param_groups"].append(group)
    state["state"][2] = {"step": 1.0, "exp_avg": torch.ones(2, 5), "exp_avg_sq": torch.ones(2, 5)}
    with pytest.raises(ValueError, match="state of parameter 0 of group 1 has no scales"):
        optimizer.load_state_dict(state)
    unchanged(optimizer, before)
