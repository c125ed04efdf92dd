"""int8 products of the largest numbers there are, whose sums of pairs leave 16 bits."""

from __future__ import annotations

import pytest
import torch
from burnish import ops

N = 117  # whole groups of 16 channels and a part, beyond a panel


@pytest.mark.parametrize("lowest", [-128, -127])
@pytest.mark.parametrize("depth", [4, 27, 300])
@pytest.mark.parametrize("rows", range(1, 8))
def test_extremes_are_exact(rows: int, depth: int, lowest: int) -> None:
    generator = torch.Generator().manual_seed(rows * depth)
    signs = torch.randint(2, (rows, depth), generator=generator) * 2 - 1
    weight = torch.where(torch.randint(2, (N, depth), generator=generator) == 1, 127, lowest)
    weight[0], weight[1] = lowest, 127
    signs[0], signs[-1] = 1, -1
    y = ops.int8_linear(signs.float(), ops.int8_linear_pack(weight.to(torch.int8)), torch.ones(N))
    assert torch.equal(y, ((127 * signs) @ weight.T).float() * (torch.tensor(1.0) / 127))
