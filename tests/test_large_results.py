"""Results in bf16 that are too large for a cache are written past it on the CPU, where they lie in whole lines."""

from __future__ import annotations

import pytest
import torch
from burnish import registry
from burnish.registry import Case
from burnish.testing import values

ROWS = 71
#: of a result: whole lines, a power of two of them; whole lines; a row in eight begins a line; a row in two does
WIDTHS = [4096, 4128, 4104, 4112]
OPS = ["lowrank_linear", "lora_linear", "bsr_linear", "sparse24_linear", "sparse_linear", "int8_linear"]


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("suffix", ["", "_backward"], ids=["forward", "backward"])
@pytest.mark.parametrize("op", OPS)
def test_large_results_are_exact_on_integers(op: str, suffix: str, threads: int, width: int) -> None:
    spec = registry.get(op + suffix)
    like = next(c for c in spec.cases.test if c.dtype == torch.bfloat16 and c.values == "integers")
    dims = dict.fromkeys(like.dims, 40) | {"M": ROWS, ("K" if suffix else "N"): width}
    options = dict(like.options) | ({"block": "32x32"} if "block" in like.options else {})  # a line of columns
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        values.forward(spec, "cpu", Case(dims, like.dtype, like.values, options=options))
    finally:
        torch.set_num_threads(before)
