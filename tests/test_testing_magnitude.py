"""What the kit's bounds are made of: the magnitudes of a result's terms, and the distance between numbers."""

from __future__ import annotations

import pytest
import torch
from burnish.testing import numerics
from burnish.testing.magnitude import magnitudes


def test_magnitudes_of_a_product_are_those_of_its_terms() -> None:
    a, b = torch.randn(5, 7), torch.randn(7, 3)
    (y,), (terms,) = magnitudes(lambda a, b: torch.tanh(a @ b) + 1, (a, b))
    product = a.double().abs() @ b.double().abs()
    assert terms.longest == 7
    assert not terms.stored.any()
    assert torch.equal(y, torch.tanh(a.double() @ b.double()) + 1)
    torch.testing.assert_close(terms.magnitude, product + y.sub(1).abs() + 1, rtol=1e-6, atol=1e-6)
    whole = torch.randint(-8, 9, (5, 7)).float()
    _, (terms,) = magnitudes(torch.matmul, (whole, torch.ones(7, 3)))
    assert terms.longest == 0, "a sum of integers is exact"
    assert torch.equal(terms.magnitude, whole.double().sum(1, keepdim=True).expand(5, 3).abs())


def test_the_rounding_of_a_stored_result_is_carried_to_the_end() -> None:
    a, b, c = torch.randn(5, 7), torch.randn(7, 3), torch.randn(5, 3)
    _, (terms,) = magnitudes(lambda a, b, c: c - 2 * (a.to(a.dtype, copy=True) @ b).t().reshape(5, 3), (a, b, c))
    torch.testing.assert_close(terms.stored, 2 * (a.abs() @ b.abs()).t().reshape(5, 3).double())
    with pytest.raises(NotImplementedError, match="tanh"):
        magnitudes(lambda a: torch.tanh(a.to(a.dtype, copy=True)), (a,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_ulp_is_the_distance_to_the_next_number(dtype: torch.dtype) -> None:
    bits = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    numbers = torch.tensor([1.0, 1.5, 2.0, 3.0, 0.1, 1000.0, 1e-4]).to(dtype)
    following = (numbers.view(bits) + 1).view(dtype)
    assert torch.equal(numerics.ulp(numbers.double(), dtype), following.double() - numbers.double())
