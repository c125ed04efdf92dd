"""2:4 weights of more depth than a CPU kernel arranges at once, by more rows than it multiplies at once."""

from __future__ import annotations

import pytest
import torch
from burnish import registry
from burnish.registry import Case
from burnish.testing import values

#: M, N, K: a part of the depth ends, or begins, within a byte of metadata, a register, a line
SIZES = [(33, 9, 2049), (129, 33, 4100), (300, 70, 2080), (131, 64, 4096)]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("threads", [1, 2])
def test_deep_weights_are_exact_on_integers(size: tuple[int, int, int], threads: int) -> None:
    case = Case(dict(zip("MNK", size, strict=True)), torch.bfloat16, "integers")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        values.forward(registry.get("sparse24_linear"), "cpu", case)
    finally:
        torch.set_num_threads(before)
