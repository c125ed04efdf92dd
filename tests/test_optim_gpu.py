"""What only a GPU can show of the optimizers: a step in a CUDA graph is the step, and no step waits for the device."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from burnish import registry
from optimizers import OPTIMIZERS
from torch import nn

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is visible"),
]

#: those whose op has a kernel in CUDA C++
NATIVE = [
    name for name, entry in OPTIMIZERS.items() if any(impl.backend == "native" for impl in registry.get(entry.op).impls)
]
SHAPES = ((70, 50), (300,), (), (0, 3), (40_000,))
EXTRAS: list[dict[str, Any]] = [
    {},
    {"max_grad_norm": 1.0, "ema_decay": 0.9, "state_dtype": "bf16"},
    {"state_dtype": "int8", "master_weights": "split"},
]


def made(name: str, rate: torch.Tensor, extras: dict[str, Any]) -> Any:
    entry = OPTIMIZERS[name]
    draw = torch.Generator().manual_seed(0)
    dtype = torch.bfloat16 if "master_weights" in extras else torch.float32
    params = [nn.Parameter(torch.randn(shape, generator=draw).to("cuda", dtype)) for shape in SHAPES]
    takes = "capturable" in inspect.signature(entry.ours).parameters
    optimizer = entry.ours(params, lr=rate, **entry.options, **extras, **({"capturable": True} if takes else {}))
    for parameter in params:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.grad_scale = torch.ones((), device="cuda")
    optimizer.found_inf = torch.zeros((), device="cuda")
    return optimizer


def push(optimizer: Any, step: int) -> None:
    """Gradients, and what a GradScaler found: every third step finds an overflow."""
    draw = torch.Generator().manual_seed(100 + step)
    for parameter in optimizer.param_groups[0]["params"]:
        parameter.grad.copy_(8 * torch.randn(parameter.shape, generator=draw))
    optimizer.grad_scale.fill_(8.0)
    optimizer.found_inf.fill_(float(step % 3 == 2))


def held(optimizer: Any) -> list[torch.Tensor]:
    params = optimizer.param_groups[0]["params"]
    states = [optimizer.state[parameter] for parameter in params]
    return [parameter.detach() for parameter in params] + [value for state in states for value in state.values()]


@pytest.mark.parametrize("extras", EXTRAS, ids=str)
@pytest.mark.parametrize("name", NATIVE)
def test_replays_of_a_captured_step_are_steps(name: str, extras: dict[str, Any]) -> None:
    rate = torch.tensor(0.01, device="cuda")
    captured, eager = (made(name, rate, extras) for _ in range(2))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # a first step makes the state, outside of the graph's memory
        push(captured, 0)
        captured.step()
    torch.cuda.current_stream().wait_stream(side)
    push(eager, 0)
    eager.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.step()
    for step in range(1, 10):
        rate.fill_(0.01 / step)
        for optimizer in (captured, eager):
            push(optimizer, step)
        graph.replay()
        eager.step()
        assert all(torch.equal(*pair) for pair in zip(held(captured), held(eager), strict=True)), step


@pytest.mark.parametrize("name", NATIVE)
def test_a_step_waits_for_nothing(name: str) -> None:
    optimizer = made(name, torch.tensor(0.01, device="cuda"), {"max_grad_norm": 1.0})
    push(optimizer, 0)
    optimizer.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
