"""What the ahead-of-time tests compile: each kernel module lists its shipped variants by a function ``variants(arch)``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class Variant:
    """One kernel with one set of compile-time constants, as it is launched on one architecture.

    ``types`` gives each run-time argument's type in Triton's notation (``"*bf16"``, ``"i32"``); ``unaligned`` names those
    that are not known to be multiples of 16 (bytes, for pointers). ``unit`` is the matrix instruction expected.
    """

    name: str
    kernel: Any
    types: Mapping[str, str]
    constants: Mapping[str, Any]
    num_warps: int
    num_stages: int = 1
    unit: Literal["int8", "bf16"] | None = None
    unaligned: frozenset[str] = field(default_factory=frozenset)
