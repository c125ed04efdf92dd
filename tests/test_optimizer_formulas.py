"""What is one optimizer's own: LAMB's norms, RMSprop's variance, Lion's signs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from burnish import ops, optim, registry
from burnish.registry import Case
from burnish.testing.calls import on_copies
from torch import nn

LAMB = registry.get("lamb_step")


def lamb_arguments(size: int, dtype: torch.dtype = torch.float32, **options: Any) -> dict[str, Any]:
    args = LAMB.make(Case({"N": size}, dtype, options=options), "cpu", 0)
    return dict(zip([argument.name for argument in LAMB.overload()._schema.arguments], args, strict=True))


def squares_of(given: dict[str, Any]) -> torch.Tensor:
    names = [argument.name for argument in registry.get("lamb_squares").overload()._schema.arguments]
    return registry.get("lamb_squares").entry(*(given[name] for name in names))


@pytest.mark.parametrize("options", [{}, {"state": "int8", "mask": True}, {"amp": True, "state": "bf16"}])
def test_lambs_step_is_that_of_its_squares(options: dict[str, Any]) -> None:
    given = lamb_arguments(1000, **options)
    call = on_copies(LAMB, LAMB.entry)
    own, told = call(*given.values()), call(*{**given, "squares": squares_of(given)}.values())
    assert all(torch.equal(*pair) for pair in zip(own, told, strict=True))
    other = call(*{**given, "squares": torch.ones(3, 2, dtype=torch.float64)}.values())
    assert not torch.equal(own[0], other[0])


def test_squares_of_shards_add_up() -> None:
    given = lamb_arguments(1000)
    lists = ("params", "grads", "exp_avgs", "exp_avg_sqs")
    halves = [
        {**given, **{name: [tensor.view(-1)[part] for tensor in given[name]] for name in lists}}
        for part in (slice(0, 300), slice(300, None))
    ]
    total = sum(squares_of(half) for half in halves)
    torch.testing.assert_close(total, squares_of(given), rtol=1e-14, atol=0)


def test_elements_that_the_mask_drops_are_in_no_norm() -> None:
    given = lamb_arguments(1000, mask=True)
    lists = ("params", "grads", "exp_avgs", "exp_avg_sqs")
    masks = given["masks"]
    kept = {name: [t[mask] for t, mask in zip(given[name], masks, strict=True)] for name in lists}
    torch.testing.assert_close(squares_of({**given, **kept, "masks": []}), squares_of(given), rtol=1e-14, atol=0)


@pytest.mark.parametrize("options", [{}, {"state": "int8"}])
def test_lambs_norms_do_not_depend_on_threads(options: dict[str, Any]) -> None:
    given, threads, results = lamb_arguments(200_001, **options), torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(squares_of(given))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_lamb_without_adaptation_is_adam() -> None:
    results = []
    for make, own in ((optim.LAMB, {"always_adapt": False}), (optim.Adam, {})):
        torch.manual_seed(0)
        parameter = nn.Parameter(torch.randn(300))
        optimizer = make([parameter], lr=0.1, eps=1e-6, weight_decay=0, **own)
        for _ in range(10):
            parameter.grad = torch.randn(300)
            optimizer.step()
        results.append(parameter.detach())
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


def test_a_tensor_of_zeros_leaves_zero() -> None:
    """Its ratio is 1, and not 0."""
    parameter = nn.Parameter(torch.zeros(5))
    parameter.grad = torch.ones(5)
    optim.LAMB([parameter], lr=0.5).step()
    torch.testing.assert_close(parameter.detach(), torch.full((5,), -0.5))


def test_a_variance_of_nothing_is_not_nan() -> None:
    """Equal gradients leave only rounding of v - a ** 2, of either sign."""
    parameter = nn.Parameter(torch.linspace(-1, 1, 301))
    optimizer = optim.RMSprop([parameter], lr=1e-12, alpha=0.5, centered=True)
    for _ in range(100):
        parameter.grad = torch.linspace(0.1, 3, 301)
        optimizer.step()
    state = optimizer.state[parameter]
    assert bool((state["square_avg"] - state["grad_avg"].square() < 0).any())
    assert bool(parameter.isfinite().all())


def test_lion_moves_by_its_rate_or_not_at_all() -> None:
    param, moment = torch.zeros(4), torch.tensor([0.5, -0.5, 0.0, 0.0])
    grad = torch.tensor([-1.0, 1.0, 0.0, float("nan")])
    ops.lion_step([param], [grad], [torch.zeros(())], [moment], lr=torch.tensor(0.25), beta1=0.5, beta2=0.75)
    assert param.tolist() == [0.25, -0.25, 0.0, 0.0]
    assert moment[:3].tolist() == [0.125, -0.125, 0.0]
    assert moment[3].isnan()
