"""What the ahead-of-time tests compile: a kernel module lists its shipped variants by a function ``variants(arch)``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from burnish.kernels.common.tiles import Tile

Unit = Literal["int8", "bf16", "fp16"]


@dataclass(frozen=True)
class Variant:
    """One kernel with one set of compile-time constants, as it is launched on one architecture.

    ``types`` gives each run-time argument's type in Triton's notation (``"*bf16"``, ``"i32"``). All of them are taken
    for multiples of 16 (bytes, for pointers), as aligned tensors with N and K multiples of 16 have them, except ``M``.
    ``unit`` is the matrix instruction expected. ``narrow``: single bytes or 16-bit elements are accessed, because the
    data says where they are, or because a tile has fewer words than the program has threads. ``described``: operands
    come by :mod:`burnish.kernels.common.descriptors`. ``registers`` is the limit that it is launched with, by
    :func:`burnish.kernels.common.target.registers`.
    """

    label: str
    kernel: Any
    types: Mapping[str, str]
    constants: Mapping[str, Any]
    num_warps: int
    num_stages: int = 1
    unit: Unit | None = None
    narrow: bool = False
    described: bool = False
    registers: int | None = None

    @property
    def id(self) -> str:
        return f"{self.kernel.__name__.replace('_kernel', '')}-{self.label}"


def of_tile(kernel: Any, tile: Tile, label: str, types: str, unit: Unit, **constants: Any) -> Variant:
    """A variant that runs a tile; ``types`` lists ``argument:type`` pairs."""
    return Variant(
        label=f"{tile.name}-{label}",
        kernel=kernel,
        types=dict(pair.split(":") for pair in types.split()),
        constants={**constants, **tile.constants},
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        unit=unit,
    )
