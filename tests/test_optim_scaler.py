"""torch.amp.GradScaler with burnish's optimizers: what it lets through is unscaled in the step, and what it does not
let through changes no bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from burnish import optim
from optimizers import OPTIMIZERS
from torch import Tensor, nn

SIZES = (5, 300, 1)
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "clipped": {"max_grad_norm": 0.1},
    "everything": {"max_grad_norm": 1.0, "ema_decay": 0.9, "master_weights": "split", "state_dtype": "int8"},
    "rounded": {"stochastic_rounding": True, "state_dtype": "bf16"},
}
#: every way to scale and round with one optimizer, and everything with each
CASES = [
    pytest.param(name, options, id=f"{name}-{variant}")
    for name in OPTIMIZERS
    for variant, options in OPTIONS.items()
    if name == "AdamW" or variant == "everything"
]


def parameters(dtype: torch.dtype, count: int = 3) -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(size).to(dtype)) for size in SIZES[:count]]


def scaler(**kwargs: Any) -> Any:
    return torch.amp.GradScaler("cpu", init_scale=8.0, **kwargs)


def backward(params: list[nn.Parameter], grad_scaler: Any, step: int) -> None:
    """Gradients of a loss that is scaled."""
    draw = torch.Generator().manual_seed(step)
    loss = torch.stack([(p.float() * torch.randn(p.shape, generator=draw)).sum() for p in params]).sum()
    for parameter in params:
        parameter.grad = None
    grad_scaler.scale(loss).backward()


def content(optimizer: Any) -> list[Tensor]:
    """Copies of parameters and state."""
    found = []
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            found += [parameter.detach().clone(), *(value.clone() for value in optimizer.state[parameter].values())]
    return found


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(torch.equal(*pair) for pair in zip(one, other, strict=True))


@pytest.mark.parametrize(("name", "options"), CASES)
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize(("count", "where"), [(3, 0), (3, 2), (1, 0)], ids=["first", "last", "only"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_infinity_changes_nothing(
    dtype: torch.dtype, count: int, where: int, unscale: bool, value: float, name: str, options: dict[str, Any]
) -> None:
    params, grad_scaler = parameters(dtype, count), scaler()
    entry = OPTIMIZERS[name]
    optimizer: Any = entry.ours(params, **entry.options, **entry.more, **options)
    if unscale and dtype is torch.float16:  # GradScaler refuses to, whatever the optimizer
        backward(params, grad_scaler, 0)
        with pytest.raises(ValueError, match="Attempting to unscale FP16 gradients"):
            grad_scaler.unscale_(optimizer)
        return
    for step in range(4):
        backward(params, grad_scaler, step)
        if step == 2:
            params[where].grad[-1] = value
        if unscale:
            grad_scaler.unscale_(optimizer)
        before, scale = content(optimizer), grad_scaler.get_scale()
        grad_scaler.step(optimizer)
        grad_scaler.update()
        assert same(before, content(optimizer)) == (step == 2)
        assert (grad_scaler.get_scale() < scale) == (step == 2)
    assert {float(state["step"]) for state in optimizer.state.values()} == {3.0}
    assert all(torch.isfinite(parameter).all() for parameter in params)


def test_an_infinity_in_the_first_step_leaves_a_state_of_zeros() -> None:
    params, grad_scaler = parameters(torch.float32), scaler()
    optimizer = optim.AdamW(params)
    before = [parameter.detach().clone() for parameter in params]
    backward(params, grad_scaler, 0)
    params[1].grad[7] = float("inf")
    grad_scaler.step(optimizer)
    assert same(before, [parameter.detach() for parameter in params])
    assert not any(value.any() for state in optimizer.state.values() for value in state.values())


@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("options", [OPTIONS["plain"], OPTIONS["clipped"]], ids=["plain", "clipped"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_scaled_gradients_give_what_unscaled_ones_do(name: str, options: dict[str, Any], unscale: bool) -> None:
    """The scale is a power of two, so unscaling rounds nothing."""
    params, twins = parameters(torch.float32), parameters(torch.float32)
    entry = OPTIMIZERS[name]
    optimizer, other = (entry.ours(each, **entry.options, **options) for each in (params, twins))
    grad_scaler, off = scaler(), scaler(enabled=False)
    for step in range(5):
        backward(params, grad_scaler, step)
        backward(twins, off, step)
        if unscale:
            grad_scaler.unscale_(optimizer)
        grad_scaler.step(optimizer)
        grad_scaler.update()
        off.step(other)
        assert not hasattr(optimizer, "found_inf")
    assert same(content(optimizer), content(other))


def test_two_optimizers_on_one_scaler_do_not_share_what_was_found() -> None:
    params, others, grad_scaler = parameters(torch.float32), parameters(torch.float32), scaler()
    one, two = optim.AdamW(params), optim.Adam(others, max_grad_norm=1.0)
    for step in range(3):
        backward(params + others, grad_scaler, step)
        if step == 1:
            others[0].grad[0] = float("inf")
        before = content(one), content(two)
        grad_scaler.step(one)
        grad_scaler.step(two)
        grad_scaler.update()
        assert not same(before[0], content(one))
        assert same(before[1], content(two)) == (step == 1)
    assert {float(state["step"]) for state in one.state.values()} == {3.0}
    assert {float(state["step"]) for state in two.state.values()} == {2.0}
