"""The model that the swap tests exchange layers of, and a way to tell that nothing changed."""

from __future__ import annotations

import torch
from torch import nn


class Block(nn.Module):
    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(width, width, bias=False)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.norm = nn.LayerNorm(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x + self.mlp(torch.relu(self.q(x)) + self.k(x)))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(50, 32)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(32, 50)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


IDS = torch.arange(40).reshape(4, 10)


def snapshot(model: nn.Module) -> dict:
    """Everything a failed swap must leave alone: the objects, their bits, flags, hooks and attributes."""
    return {
        fqn: (
            id(module),
            module.training,
            {
                name: (id(t), t.clone(), t.requires_grad, t._version)
                for name, t in (*module._parameters.items(), *module._buffers.items())
                if t is not None
            },
            len(module._forward_hooks) + len(module._forward_pre_hooks),
            sorted(vars(module)),
        )
        for fqn, module in model.named_modules(remove_duplicate=False)
    }


def same(before: dict, after: dict) -> bool:
    def plain(taken: dict) -> dict:
        return {
            fqn: (ident, training, {n: (i, grad, v) for n, (i, _, grad, v) in tensors.items()}, hooks, names)
            for fqn, (ident, training, tensors, hooks, names) in taken.items()
        }

    return plain(before) == plain(after) and all(
        torch.equal(value[1].flatten().view(torch.uint8), after[fqn][2][name][1].flatten().view(torch.uint8))
        for fqn, entry in before.items()
        for name, value in entry[2].items()
    )
