"""The layers and models that the LoRA tests adapt, and the composition in torch that an adapted layer must equal."""

from __future__ import annotations

import torch
from burnish import dropout
from burnish.nn import Int8Linear, LoRALinear
from torch import nn

SEEDS = 2**63 - 1


class Net(nn.Module):
    """Three linear layers, one of them deeper, with something between them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.Linear(32, 48)
        self.inner = nn.ModuleDict({"down": nn.Linear(48, 32, bias=False)})
        self.head = nn.Linear(32, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(x + self.inner["down"](torch.tanh(self.up(x)))))


X = torch.randn(6, 32, generator=torch.Generator().manual_seed(1))


def base_of(kind: str, inputs: int = 40, outputs: int = 24, dtype: torch.dtype = torch.float32) -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(inputs)
    if kind == "conv1d":
        conv = Conv1D(outputs, inputs).to(dtype)
        nn.init.normal_(conv.weight, std=0.2)
        return conv
    linear = nn.Linear(inputs, outputs, dtype=dtype)
    return Int8Linear.from_float(linear) if kind == "int8" else linear


def adapted(kind: str = "linear", base_dtype: torch.dtype = torch.float32, **options) -> tuple:
    """A layer whose adapter is not zero, and an input for it."""
    layer = LoRALinear(base_of(kind, dtype=base_dtype), **{"r": 5, "lora_alpha": 7, **options})
    with torch.no_grad():
        layer.lora_B.normal_(std=0.3)
    return layer, torch.randn(9, layer.in_features, dtype=base_dtype)


def next_seed() -> torch.Tensor:
    """The seed that the next call of a layer with dropout draws; leaves the generator as it is."""
    state = torch.get_rng_state()
    seed = torch.randint(SEEDS, (1,))
    torch.set_rng_state(state)
    return seed


def composed(layer: LoRALinear, x: torch.Tensor, seed: torch.Tensor | None = None) -> torch.Tensor:
    """What the layer computes, by torch's own functions, with the mask spelled out."""
    h = x
    if seed is not None:
        p = layer.lora_dropout
        keep = dropout.keep(seed, x.shape[:-1].numel(), x.shape[-1], p).reshape(x.shape)
        h = torch.where(keep, x, 0.0) * dropout.factor(p)
    return layer.base_layer.forward(x) + layer.scaling * ((h @ layer.lora_A.T) @ layer.lora_B.T)


def gradients(layer: nn.Module, run, x: torch.Tensor) -> list[torch.Tensor]:
    """The output and the gradients of x, lora_A and lora_B for a fixed cotangent."""
    x = x.clone().requires_grad_()
    y = run(x)
    dy = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape)
    return [y.detach(), *torch.autograd.grad(y, (x, layer.lora_A, layer.lora_B), dy)]
