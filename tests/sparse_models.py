"""Pruned layers and the sparse ones made of them, for the tests of all sparse layers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from burnish import BlockSparse, Sparse, Sparse24
from burnish.configs import Config
from burnish.nn import BlockSparseLinear, Sparse24Linear, SparseConv2d, SparseLinear
from burnish.prune import TwoFour
from torch import nn

#: class, configuration and the mask it takes, by name
KINDS: dict[str, tuple[type, Config]] = {
    "block": (BlockSparseLinear, BlockSparse(16)),
    "flat block": (BlockSparseLinear, BlockSparse((4, 16))),
    "block int8": (BlockSparseLinear, BlockSparse(16, values="int8")),
    "2:4": (Sparse24Linear, Sparse24()),
    "2:4 int8": (Sparse24Linear, Sparse24("int8")),
    "any": (SparseLinear, Sparse()),
    "conv": (SparseConv2d, BlockSparse(16)),
    "conv int8": (SparseConv2d, BlockSparse(16, values="int8")),
}
FLOAT = [name for name in KINDS if "int8" not in name]
INT8 = [name for name in KINDS if "int8" in name]


def mask_for(config: Config, rows: int, columns: int, density: float = 0.4) -> torch.Tensor:
    """A random mask that the configuration's layer takes; its first row is empty where it may be."""
    if isinstance(config, Sparse24):
        return TwoFour().mask(torch.rand(rows, columns))
    if isinstance(config, BlockSparse):
        high, wide = config.sides
        blocks = torch.rand(-(-rows // high), -(-columns // wide)) < density
        blocks[0] = False
        blocks[-1, 0] = True
        return blocks.repeat_interleave(high, 0)[:rows].repeat_interleave(wide, 1)[:, :columns]
    mask = torch.rand(rows, columns) < density
    mask[0] = False
    return mask


def pruned(config: Config, make: Callable[[], nn.Module] = lambda: nn.Linear(70, 37), seed: int = 0) -> nn.Module:
    """A layer with zeros where the configuration needs them."""
    torch.manual_seed(seed)
    module = make()
    with torch.no_grad():
        weight = module.weight
        weight.masked_fill_(~mask_for(config, len(weight), weight[0].numel()).view_as(weight), 0)
    return module


def conv() -> nn.Conv2d:
    return nn.Conv2d(8, 37, 3, padding=1)


def pair(name: str, dtype: torch.dtype = torch.float32, bias: bool = True) -> tuple:
    """A pruned float layer, the sparse one made of it, and an input."""
    cls, config = KINDS[name]
    if cls is SparseConv2d:
        dense = pruned(config, lambda: nn.Conv2d(8, 37, 3, padding=1, bias=bias)).to(dtype)
        x = torch.randn(3, 8, 6, 5, dtype=dtype)
    else:
        dense = pruned(config, lambda: nn.Linear(70, 37, bias=bias)).to(dtype)
        x = torch.randn(6, 70, dtype=dtype)
    return dense, cls.from_float(dense, config), x


def fresh(name: str, **options) -> nn.Module:
    """A layer of the kind that is made from nothing."""
    cls, config = KINDS[name]
    given = {} if cls is Sparse24Linear else {"density": 0.4}
    if isinstance(config, BlockSparse):
        given["block"] = config.block
    if not isinstance(config, Sparse):
        given["values"] = config.values
    sizes = (8, 37, 3) if cls is SparseConv2d else (70, 37)
    return cls(*sizes, **given, **options)
