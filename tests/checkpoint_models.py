"""The model that the checkpoint tests save, and a way to tell that nothing changed."""

from __future__ import annotations

from collections.abc import Callable

import burnish
import torch
from burnish import Int8
from torch import nn


class Net(nn.Module):
    def __init__(self, width: int = 24, act: Callable[[], nn.Module] = nn.GELU) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.embed = nn.Embedding(11, width)
        self.mlp = nn.Sequential(nn.Linear(width, 40), act(), nn.Linear(40, width))
        self.norm = nn.BatchNorm1d(width)
        self.head = nn.Linear(width, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.mlp(self.embed(ids))))


IDS = torch.arange(11)


def swapped(**options) -> Net:
    model = Net().eval()
    with torch.no_grad():
        model.norm.running_mean.uniform_(-1, 1)
    burnish.swap_(model, Int8(**options))
    return model


def bits(model: nn.Module) -> dict:
    """Objects, types, modes and bits of a model, to compare."""
    tensors = {
        f"{fqn}/{name}": (id(t), t.dtype, t.requires_grad, t.clone())
        for fqn, module in model.named_modules(remove_duplicate=False)
        for name, t in (*module._parameters.items(), *module._buffers.items())
        if t is not None
    }
    modules = {
        f: (id(m), m.training, getattr(m, "dtype", None)) for f, m in model.named_modules(remove_duplicate=False)
    }
    return {"tensors": tensors, "modules": modules}


def equal(one: dict, other: dict) -> bool:
    return (
        one["modules"] == other["modules"]
        and one["tensors"].keys() == other["tensors"].keys()
        and all(
            a[:3] == b[:3] and torch.equal(a[3], b[3])
            for a, b in zip(one["tensors"].values(), other["tensors"].values(), strict=True)
        )
    )
