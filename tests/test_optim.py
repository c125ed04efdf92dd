"""Optimizers as torch.optim's: its own configurations, the same trajectories, its schedulers, hooks and closures; and
what burnish adds: clipping, averages, masks, masters."""

from __future__ import annotations

import contextlib
import copy
import pickle
from typing import Any

import pytest
import torch
from burnish import moments, optim, prune
from optimizers import OPTIMIZERS, TWINS
from torch import Tensor, nn
from torch.testing._internal.common_optimizers import optim_db

INFO = {info.name: info for info in optim_db if info.name in TWINS}


def configurations(name: str, dtype: torch.dtype) -> dict[str, dict[str, Any]]:
    """torch's own of an optimizer, by what it calls them; those for GPUs without capturable, which no CPU can."""
    found = {each.desc: each.kwargs for each in INFO[name].optim_inputs_func(device="cpu", dtype=dtype)}
    for each in INFO[name].optim_inputs_func(device="cuda", dtype=dtype):
        found.setdefault(each.desc, {key: value for key, value in each.kwargs.items() if key != "capturable"})
    return found


CONFIGURATIONS = [
    pytest.param(name, dtype, kwargs, id=f"{name}-{dtype}-{words}".replace(" ", "_"))
    for name in INFO
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
    for words, kwargs in configurations(name, dtype).items()
]
SHAPES = ((7, 5), (300,), (), (0, 3), (4, 3, 2))
#: with more of one element, whose deviations say something together
SINGLES = (*SHAPES, *((),) * 15)


def parameters(
    dtype: torch.dtype = torch.float32, shapes: tuple[tuple[int, ...], ...] = SHAPES, seed: int = 0
) -> list[nn.Parameter]:
    draw = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=draw).to(dtype)) for shape in shapes]


def push(params: list[nn.Parameter], step: int, scale: float = 1.0) -> None:
    for i, parameter in enumerate(params):
        draw = torch.Generator().manual_seed(100 * step + i)
        parameter.grad = (scale * torch.randn(parameter.shape, generator=draw)).to(parameter.dtype)


def run(make: Any, params: list[nn.Parameter], steps: int = 100) -> Any:
    optimizer = make(params)
    for step in range(steps):
        push(params, step)
        optimizer.step()
    return optimizer


@pytest.mark.parametrize(("name", "dtype", "kwargs"), CONFIGURATIONS)
def test_torchs_configurations_stay_near_the_exact_trajectory(
    name: str, dtype: torch.dtype, kwargs: dict[str, Any]
) -> None:
    stays_near(name, dtype, kwargs)


def test_every_optimizer_that_torch_has_too_is_its_twin() -> None:
    assert set(OPTIMIZERS) == set(optim.__all__) - {"FusedOptimizer"}
    assert set(INFO) == set(TWINS) == {name for name in OPTIMIZERS if hasattr(torch.optim, name)}
    assert all(len(configurations(name, torch.float32)) >= 7 for name in TWINS)


#: what the papers' optimizers are run with, beside their defaults
PAPERS: dict[str, list[dict[str, Any]]] = {
    "Lion": [{}, {"lr": 1e-2, "weight_decay": 0.1}, {"lr": torch.tensor(1e-3), "betas": (0.5, 0.8), "maximize": True}],
    "LAMB": [
        {},
        {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.8, 0.9), "maximize": True},
        {"lr": torch.tensor(1e-2), "weight_decay": 0, "eps": 1e-3, "trust_clip": True},
        {"lr": 1e-2, "weight_decay": 0, "always_adapt": False},
        {"lr": 1e-2, "bias_correction": False},
    ],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("name", "kwargs"), [(name, kwargs) for name, each in PAPERS.items() for kwargs in each])
def test_papers_optimizers_stay_near_the_exact_trajectory(
    name: str, kwargs: dict[str, Any], dtype: torch.dtype
) -> None:
    stays_near(name, dtype, kwargs)


def stays_near(name: str, dtype: torch.dtype, kwargs: dict[str, Any]) -> None:
    """Rule N6: at most twice the deviation of torch.optim (foreach) from the trajectory in float64."""
    ours, theirs = OPTIMIZERS[name].ours, OPTIMIZERS[name].theirs
    mine, eager = parameters(dtype, SINGLES), parameters(dtype, SINGLES)
    exact = [nn.Parameter(parameter.detach().double()) for parameter in mine]
    run(lambda params: ours(params, **kwargs), mine)
    foreach = not (name in ("Adam", "AdamW") and isinstance(kwargs.get("lr"), Tensor))  # torch has none for these
    run(lambda params: theirs(params, foreach=foreach, **kwargs), eager)
    optimizer = theirs(exact, **kwargs)
    for step in range(100):
        push(eager, step)
        for parameter, other in zip(exact, eager, strict=True):
            parameter.grad = other.grad.double()
        optimizer.step()
    assert all(own.dtype == dtype for own in mine)
    for shape in SHAPES:
        values = [
            torch.cat([p.detach().double().view(-1) for p in each if p.shape == shape]) for each in (mine, eager, exact)
        ]
        deviates_as_little(*values, dtype)


def deviates_as_little(own: Tensor, other: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    """Each element of ``own`` as the worst of ``other``, whose own are a matter of luck; and the mean as the mean."""
    if not exact.numel():
        return
    mine, theirs = (own - exact).abs(), (other - exact).abs()
    finite, rounding = theirs.isfinite(), torch.finfo(dtype).eps * exact.abs() / 2  # torch's may overflow
    assert bool((mine <= 2 * theirs[finite].max() + rounding).all())
    assert mine.mean() <= 2 * theirs[finite].mean() + rounding.mean()


@pytest.mark.parametrize("name", TWINS)
@pytest.mark.parametrize("more", [False, True], ids=["plain", "more"])
def test_state_dicts_go_to_torch_and_back(name: str, more: bool) -> None:
    ours, theirs = TWINS[name].ours, TWINS[name].theirs
    options = TWINS[name].options | ({**TWINS[name].more, "maximize": True} if more else {})
    mine, other = parameters(), parameters()
    here = run(lambda params: ours(params, lr=0.1, weight_decay=0.2, **options), mine, 10)
    there = theirs(other, lr=0.3)
    there.load_state_dict(copy.deepcopy(here.state_dict()))
    assert there.param_groups[0]["lr"] == 0.1
    assert there.param_groups[0]["weight_decay"] == 0.2
    with torch.no_grad():
        for parameter, value in zip(other, mine, strict=True):
            parameter.copy_(value)
    back = ours(parameters(), lr=0.3)
    for optimizer, params in ((here, mine), (there, other)):
        for step in range(10, 20):
            push(params, step)
            optimizer.step()
    for parameter, value in zip(other, mine, strict=True):
        torch.testing.assert_close(parameter, value, rtol=1e-5, atol=1e-6)
    back.load_state_dict(copy.deepcopy(there.state_dict()))
    states = back.state_dict()["state"]
    for key, state in there.state_dict()["state"].items():
        assert states[key].keys() == state.keys()
        assert all(torch.equal(states[key][entry], value) for entry, value in state.items())
    assert back.param_groups[0]["max_grad_norm"] is None
    assert all(back.param_groups[0][key] == value for key, value in options.items())


@pytest.mark.parametrize("name", TWINS)
@pytest.mark.parametrize("more", [False, True], ids=["plain", "more"])
def test_torch_begins_and_ours_goes_on(name: str, more: bool) -> None:
    entry = TWINS[name]
    options = entry.options | (entry.more if more else {})
    mine, other = parameters(), parameters()
    there = run(lambda params: entry.theirs(params, lr=0.1, weight_decay=0.2, **options), other, 10)
    here = entry.ours(mine)
    here.load_state_dict(copy.deepcopy(there.state_dict()))
    with torch.no_grad():
        for parameter, value in zip(mine, other, strict=True):
            parameter.copy_(value)
    for optimizer, params in ((here, mine), (there, other)):
        for step in range(10, 20):
            push(params, step)
            optimizer.step()
    for parameter, value in zip(mine, other, strict=True):
        torch.testing.assert_close(parameter, value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", TWINS)
def test_torchs_bf16_state_becomes_fp32_and_ours_stays_what_it_was(name: str) -> None:
    entry = TWINS[name]
    theirs = run(lambda params: entry.theirs(params, **entry.options), parameters(torch.bfloat16), 3)
    ours = entry.ours(parameters(torch.bfloat16), ema_decay=0.5)
    ours.load_state_dict(theirs.state_dict())
    for key, state in theirs.state_dict()["state"].items():
        for moment in entry.moments:
            value = ours.state_dict()["state"][key][moment]
            assert value.dtype == torch.float32
            assert torch.equal(value, state[moment].float())
    push(ours.param_groups[0]["params"], 4)
    ours.step()
    assert ours.state_dict()["state"][0]["ema"].dtype == torch.float32


@pytest.mark.parametrize("tensor_rate", [False, True])
def test_schedulers_and_closures(tensor_rate: bool) -> None:
    results = []
    for make in (optim.AdamW, torch.optim.AdamW):
        params = parameters()
        optimizer = make(params, lr=torch.tensor(0.1) if tensor_rate else 0.1)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8)
        for step in range(10):

            def closure(step: int = step, params: list[nn.Parameter] = params) -> float:
                push(params, step)
                return 3.0

            assert optimizer.step(closure) == 3.0
            scheduler.step()
        results.append(params)
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_parameters_without_gradient_and_empty_groups_are_left_alone() -> None:
    params = parameters()
    optimizer = optim.AdamW([{"params": []}, {"params": params}], max_grad_norm=1.0)
    assert optimizer.step() is None
    assert not optimizer.state
    params[1].grad = torch.ones_like(params[1])
    before = [parameter.detach().clone() for parameter in params]
    optimizer.step()
    changed = [not torch.equal(*pair) for pair in zip(before, params, strict=True)]
    assert changed == [False, True, False, False, False]
    assert list(optimizer.state) == [params[1]]
    optimizer.add_param_group({"params": [], "lr": 3.0})
    optimizer.step()


def test_the_norm_is_of_all_groups_and_gradients_stay() -> None:
    mine, other = parameters(), parameters(seed=1)
    twins = [nn.Parameter(parameter.detach().clone()) for parameter in (*mine, *other)]
    ours = optim.AdamW([{"params": mine, "lr": 0.1}, {"params": other}], max_grad_norm=0.3, weight_decay=0)
    half = len(mine)
    theirs = torch.optim.AdamW([{"params": twins[:half], "lr": 0.1}, {"params": twins[half:]}], weight_decay=0)
    for step in range(5):
        push([*mine, *other], step, 10.0)
        grads = [parameter.grad.clone() for parameter in (*mine, *other)]
        for twin, grad in zip(twins, grads, strict=True):
            twin.grad = grad.clone()
        ours.step()
        nn.utils.clip_grad_norm_(twins, 0.3)
        theirs.step()
        assert all(torch.equal(p.grad, grad) for p, grad in zip((*mine, *other), grads, strict=True))
    for own, twin in zip((*mine, *other), twins, strict=True):
        torch.testing.assert_close(own, twin, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_averages_swap_in_and_out(dtype: torch.dtype) -> None:
    params = parameters(dtype)
    optimizer = optim.AdamW(params, lr=0.1, ema_decay=0.9)
    expected = [parameter.detach().float().clone() for parameter in params]
    for step in range(5):
        push(params, step)
        optimizer.step()
        for average, parameter in zip(expected, params, strict=True):
            average.mul_(0.9).add_(parameter.detach().float(), alpha=1 - 0.9)
    before = [parameter.detach().clone() for parameter in params]
    # the average is of values before they are rounded
    unit = 1e-6 if dtype is torch.float32 else torch.finfo(dtype).eps
    with contextlib.suppress(KeyError), optimizer.swap_ema():
        for average, parameter in zip(expected, params, strict=True):
            torch.testing.assert_close(parameter.detach(), average.to(dtype), rtol=unit, atol=unit)
        with pytest.raises(RuntimeError, match=r"step inside swap_ema"):
            optimizer.step()
        with pytest.raises(RuntimeError, match=r"inside swap_ema"), optimizer.swap_ema():
            pass
        raise KeyError
    assert all(torch.equal(*pair) for pair in zip(before, params, strict=True))
    optimizer.step()


def test_masks_by_parameter_and_by_the_names_of_prune() -> None:
    net = nn.Sequential(nn.Linear(9, 4), nn.Linear(4, 3))
    prune.Pruner(net, prune.Magnitude(), prune.Unstructured(), 0.5).step()
    masks = prune.masks(net)
    assert set(masks) == {"0", "1"}
    optimizer = optim.AdamW(net.named_parameters(), lr=0.1, masks=masks)
    kept = {net[0].parametrizations.weight.original: masks["0"], net[1].parametrizations.weight.original: masks["1"]}
    assert all(optimizer.masks[parameter] is mask for parameter, mask in kept.items())
    other = optim.AdamW(net.parameters(), lr=0.1, masks=kept)
    for each in (optimizer, copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer)), other):
        owned = [parameter for group in each.param_groups for parameter in group["params"]]
        push(owned, 1)
        each.step()
        assert len(each.masks) == 2
        for parameter, mask in each.masks.items():
            assert any(parameter is one for one in owned)
            assert torch.equal(parameter != 0, mask)
    optimizer.masks = {"0.parametrizations.weight.original": torch.zeros(4, 9, dtype=torch.bool)}
    optimizer.step()
    assert not net[0].parametrizations.weight.original.any()
    optimizer.masks = None
    assert not optimizer.masks


@pytest.mark.parametrize("state_dtype", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("master", [None, "fp32", "split"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_has_the_dtypes_asked_for(name: str, state_dtype: str, master: str | None, dtype: torch.dtype) -> None:
    entry = OPTIMIZERS[name]
    options = {**entry.options, "state_dtype": state_dtype, "master_weights": master}
    optimizer = run(lambda params: entry.ours(params, **options), parameters(dtype), 2)
    plain = {"fp32": torch.float32, "bf16": torch.bfloat16}
    moments = {key: codes if state_dtype == "int8" else plain[state_dtype] for key, codes in entry.moments.items()}
    masters = {None: None, "fp32": torch.float32, "split": torch.uint8}[master if dtype != torch.float32 else None]
    for parameter, state in optimizer.state.items():
        assert {key: state[key].dtype for key in moments} == moments
        assert {state[key].shape for key in moments} == {parameter.shape}
        assert (state["master"].dtype if "master" in state else None) == masters
        assert ("scales" in state) == (state_dtype == "int8")


def test_rounding_is_the_same_on_replicas_and_moves_on() -> None:
    def trained(seed: int) -> list[nn.Parameter]:
        params = parameters(torch.bfloat16)
        run(lambda params: optim.AdamW(params, lr=1e-4, stochastic_rounding=True, seed=seed), params, 5)
        return params

    one, same, other = trained(3), trained(3), trained(4)
    assert all(torch.equal(*pair) for pair in zip(one, same, strict=True))
    assert not torch.equal(one[1], other[1])
    optimizer = optim.AdamW(parameters(torch.bfloat16), stochastic_rounding=True, seed=3)
    push(optimizer.param_groups[0]["params"], 0)
    optimizer.step()
    assert optimizer.param_groups[0]["seed"] != 3


def test_gradients_of_other_dtypes_and_orders_of_memory() -> None:
    weight = torch.randn(6, 4, 3, 3).to(memory_format=torch.channels_last)
    results: list[Tensor] = []
    for make in (optim.AdamW, torch.optim.AdamW):
        parameter = nn.Parameter(weight.clone())
        optimizer = make([parameter], lr=0.1)
        for step in range(3):
            draw = torch.Generator().manual_seed(step)
            grad = torch.randn(weight.shape, generator=draw).to(memory_format=torch.channels_last)
            parameter.grad = grad
            optimizer.step()
        assert parameter.stride() == weight.stride() == optimizer.state[parameter]["exp_avg"].stride()
        results.append(parameter.detach())
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)
    half = nn.Parameter(torch.ones(5, dtype=torch.bfloat16))
    half.grad_dtype = torch.float32
    half.grad = torch.ones(5)
    optim.AdamW([half], lr=0.5).step()
    assert bool((half < 1).all())


def test_a_step_is_seen_by_autograd_and_by_hooks() -> None:
    weight = nn.Parameter(torch.ones(3))
    optimizer = optim.AdamW([weight])
    calls: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    loss = (weight * weight).sum()
    weight.grad = torch.ones(3)
    optimizer.step()
    assert calls == ["before", "after"]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_compiled_step_is_the_step() -> None:
    params, twins = parameters(), parameters()
    optimizer, other = optim.AdamW(params), optim.AdamW(twins)
    compiled = torch.compile(lambda: optimizer.step(), backend="eager")
    for step in range(3):
        push(params, step)
        push(twins, step)
        compiled()
        other.step()
    assert all(torch.equal(*pair) for pair in zip(params, twins, strict=True))


@pytest.mark.parametrize("state_dtype", ["fp32", "bf16", "int8"])
def test_sums_of_squares_begin_where_asked(state_dtype: str) -> None:
    weight = nn.Parameter(torch.ones(300))
    optimizer = optim.Adagrad([weight], initial_accumulator_value=0.3, state_dtype=state_dtype)
    weight.grad = torch.zeros(300)
    optimizer.step()
    state = optimizer.state[weight]
    total = moments.decode(state["sum"], state["scales"][0]) if state_dtype == "int8" else state["sum"].float()
    torch.testing.assert_close(total, torch.full((300,), 0.3), rtol=1e-6 if state_dtype != "bf16" else 4e-3, atol=0)
    assert bool((weight == 1).all())
