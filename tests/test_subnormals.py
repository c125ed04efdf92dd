"""Results too small for a normal number are rounded as all others are, by kernels that store many at once too."""

from __future__ import annotations

import pytest
import torch
from burnish import ops


@pytest.mark.parametrize("rows", [1, 64, 1400])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("op", ["lowrank_linear", "lora_linear"])
def test_a_subnormal_bias_is_kept(op: str, dtype: torch.dtype, rows: int) -> None:
    columns = 192
    bias = torch.linspace(-1, 1, columns).mul(torch.finfo(dtype).tiny * 0.9).to(dtype)
    x, A, B = torch.ones(rows, 32, dtype=dtype), torch.zeros(16, 32, dtype=dtype), torch.ones(columns, 16, dtype=dtype)
    if op == "lora_linear":
        weight = torch.zeros(columns, 32, dtype=dtype)
        y = ops.lora_linear(x, weight, A, B, bias=bias)
    else:
        y = ops.lowrank_linear(x, A, B, bias)
    assert (bias < 0).sum() > columns // 3
    assert torch.equal(y, bias.expand(rows, columns))
