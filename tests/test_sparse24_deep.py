"""2:4 weights of more depth than a CPU kernel arranges at once, by more rows than it multiplies at once."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from burnish import registry
from burnish.ops import sparse24_linear
from burnish.registry import Case
from burnish.sparse24_format import compress, expand
from burnish.testing import values

#: M, N, K: a part of the depth ends, or begins, within a byte of metadata, a register, a line
SIZES = [(13, 9, 1030), (33, 9, 2049), (129, 33, 4100), (300, 70, 2080), (131, 64, 4096), (27, 25, 8195)]
#: x, and the weight where it is another
KINDS = [(torch.float32, None), (torch.bfloat16, None), (torch.float16, None), (torch.bfloat16, "int8")]


@pytest.fixture(params=[1, 2], ids=lambda count: f"{count} threads")
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize(("dtype", "weight"), KINDS, ids=str)
def test_deep_weights_are_exact_on_integers(size: tuple[int, int, int], dtype: torch.dtype, weight: str | None) -> None:
    dims, options = dict(zip("MNK", size, strict=True)), {"weight": weight} if weight else {}
    values.forward(registry.get("sparse24_linear"), "cpu", Case(dims, dtype, "integers", options))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_what_lies_beyond_the_columns_counts_for_nothing(dtype: torch.dtype) -> None:
    x, weight = torch.ones(40, 61, dtype=dtype), torch.ones(9, 61, dtype=dtype)
    kept, metadata = compress(weight, torch.tensor([1, 0, 0, 1]).repeat(16)[:61].bool().expand(9, -1))
    dense = expand(kept, metadata, 9, 61)
    kept[:, -1] = torch.nan  # of column 61, beyond the weight
    assert torch.equal(sparse24_linear(x, kept, metadata, None, None), x @ dense.T)
