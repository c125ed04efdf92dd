"""Forward-mode differentiation has no formula here, and must not come out as a tangent of zero."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from burnish.nn import BlockSparseLinear, Int8Linear, LoRALinear, LowRankLinear, Sparse24Linear, SparseLinear
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, jacfwd, jvp, vmap

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "int8_linear": lambda: Int8Linear(64, 32),
    "lowrank_linear": lambda: LowRankLinear(64, 32, rank=4),
    "lora_linear": lambda: LoRALinear(nn.Linear(64, 32)),
    "bsr_linear": lambda: BlockSparseLinear(64, 32, density=0.5),
    "sparse24_linear": lambda: Sparse24Linear(64, 32),
    "sparse_linear": lambda: SparseLinear(64, 32, density=0.5),
}


def _dual(layer: nn.Module, x: Tensor) -> None:
    with forward_ad.dual_level():
        layer(forward_ad.make_dual(x, x))


def _dual_bias(layer: nn.Module, x: Tensor) -> None:
    named = {name: parameter.detach() for name, parameter in layer.named_parameters()}
    jvp(lambda changed: functional_call(layer, changed, (x,)), (named,), (named,))


WAYS: dict[str, Callable[[nn.Module, Tensor], object]] = {
    "dual": _dual,
    "dual under no_grad": torch.no_grad()(_dual),
    "jvp": lambda layer, x: jvp(layer, (x,), (x,)),
    "jvp by parameters": _dual_bias,
    "jacfwd": lambda layer, x: jacfwd(layer)(x),
    "vmap in jvp": lambda layer, x: jvp(vmap(layer), (x,), (x,)),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("op", LAYERS)
def test_a_tangent_is_refused_and_never_dropped(op: str, way: str) -> None:
    layer = LAYERS[op]().requires_grad_(False)
    with pytest.raises(RuntimeError, match=f"{op} has no forward-mode derivative"):
        WAYS[way](layer, torch.randn(3, 64))


@pytest.mark.parametrize("op", LAYERS)
def test_what_has_no_tangent_is_computed(op: str) -> None:
    layer, x = LAYERS[op](), torch.randn(3, 64)
    with forward_ad.dual_level():
        inside = layer(x)
    assert torch.equal(inside, layer(x))
