"""The factors are the best of their rank, for weight or outputs; a budget is met by the smallest rank that meets it."""

from __future__ import annotations

import math

import pytest
import torch
from burnish import factorize
from hypothesis import given, settings
from hypothesis import strategies as st

SHAPES = st.tuples(st.integers(1, 3), st.integers(1, 12), st.integers(1, 12), st.integers(0, 10**6))


def skewed(K: int, seed: int = 0, rows: int = 4000) -> torch.Tensor:
    """Inputs whose directions differ by factors of up to a thousand."""
    generator = torch.Generator().manual_seed(seed)
    turn = torch.linalg.qr(torch.randn(K, K, generator=generator, dtype=torch.float64))[0]
    return torch.randn(rows, K, generator=generator, dtype=torch.float64) * torch.logspace(0, -3, K) @ turn


def second(x: torch.Tensor) -> torch.Tensor:
    return x.T @ x / len(x)


def weight(N: int, K: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(N, K, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("method", ["svd", "activation"])
def test_no_perturbation_of_the_factors_comes_closer(method: str) -> None:
    W, x = weight(12, 20), skewed(20)
    measure = torch.eye(20, dtype=torch.float64) if method == "svd" else second(x)
    A, B = factorize.matrix(W, None if method == "svd" else measure).factors(5)

    def missed(A: torch.Tensor, B: torch.Tensor) -> float:
        rest = W - B @ A
        return float(((rest @ measure) * rest).sum())

    best = missed(A, B)
    generator = torch.Generator().manual_seed(1)
    for step in (1e-1, 1e-2, 1e-3):
        for _ in range(100):
            dA, dB = (step * torch.randn(t.shape, generator=generator, dtype=t.dtype) for t in (A, B))
            assert missed(A + dA, B + dB) > best * (1 - 1e-5)
    # and of the factors that another start finds: alternating least squares, each step exact
    other = torch.randn(12, 5, generator=generator, dtype=torch.float64)
    for _ in range(500):
        down = torch.linalg.lstsq(other, W).solution
        other = torch.linalg.solve(down @ measure @ down.T, down @ measure @ W.T).T
    assert missed(down, other) == pytest.approx(best, rel=1e-3)
    assert missed(down, other) > best * (1 - 1e-5)


def test_svd_is_torchs() -> None:
    W = weight(9, 14)
    terms = factorize.matrix(W)
    singular = torch.linalg.svdvals(W)
    for rank in range(1, 10):
        A, B = terms.factors(rank)
        assert float((W - B @ A).norm()) == pytest.approx(float(singular[rank:].norm()), abs=1e-12)
        assert terms.energy(rank) == pytest.approx(float(singular[:rank].square().sum() / singular.square().sum()))


def test_activation_beats_svd_where_inputs_are_skewed() -> None:
    W, x = weight(24, 32), skewed(32)
    outputs = x @ W.T
    errors = {}
    for method, moment in (("svd", None), ("activation", second(x))):
        terms = factorize.matrix(W, moment)
        A, B = terms.factors(6)
        errors[method] = float((outputs - x @ A.T @ B.T).norm() / outputs.norm())
    assert errors["activation"] < 0.3 * errors["svd"]
    assert errors["activation"] == pytest.approx(terms.error(6), rel=1e-9)


def test_a_moment_of_few_rows_spends_what_is_left_on_the_weight() -> None:
    W, x = weight(12, 16), skewed(16, rows=3)
    terms = factorize.matrix(W, second(x))
    assert terms.rank_for_error(1e-4) == 3
    A, B = terms.factors(7)
    outputs = x @ W.T
    assert (outputs - x @ A.T @ B.T).norm() < 1e-5 * outputs.norm()
    left = W - torch.linalg.multi_dot(((B3 := terms.factors(3)[1]), torch.linalg.pinv(B3), W))
    assert (W - B @ A).norm() == pytest.approx(float(torch.linalg.svdvals(left)[4:].norm()), rel=1e-2)
    A, B = terms.factors(12)
    torch.testing.assert_close(B @ A, W)


@pytest.mark.parametrize("moment", [torch.zeros(6, 6), torch.eye(6), 1e-30 * torch.eye(6), 1e30 * torch.eye(6)])
def test_moments_without_direction_give_the_plain_factors(moment: torch.Tensor) -> None:
    W = weight(5, 6)
    mine, plain = factorize.matrix(W, moment), factorize.matrix(W)
    torch.testing.assert_close(mine.lost, plain.lost)
    for A, B in (mine.factors(3),):
        C, D = plain.factors(3)
        torch.testing.assert_close(B @ A, D @ C)


@settings(derandomize=True, deadline=None, max_examples=60)
@given(SHAPES, st.floats(0.01, 1.0), st.booleans())
def test_budgets_are_met_by_the_smallest_rank(shape: tuple, share: float, aware: bool) -> None:
    G, N, K, seed = shape
    W = torch.stack([weight(N, K, seed + g) for g in range(G)])
    moment = torch.stack([second(skewed(K, seed + g, 50)) for g in range(G)]) if aware else None
    terms = factorize.matrix(W, moment)
    metric = torch.eye(K, dtype=torch.float64).expand(G, K, K) if moment is None else moment

    def energy(rest: torch.Tensor) -> float:
        return float(((rest @ metric) * rest).sum())

    for rank in (terms.rank_for_energy(share), terms.rank_for_error(share)):
        A, B = terms.factors(rank)
        lost = energy(W - B @ A) / energy(W)
        assert math.isclose(lost, float(terms.lost[rank]), abs_tol=1e-9)
    rank = terms.rank_for_energy(share)
    assert terms.energy(rank) >= share - 1e-12
    assert rank == 1 or terms.energy(rank - 1) < share
    rank = terms.rank_for_error(share)
    assert terms.error(rank) <= share
    assert rank == 1 or terms.error(rank - 1) > share
    assert terms.limit == min(N, K)
    A, B = terms.factors(terms.limit)
    torch.testing.assert_close(B @ A, W)
    torch.testing.assert_close(A.norm(dim=-1), B.norm(dim=-2), rtol=1e-6, atol=1e-6)


@settings(derandomize=True, deadline=None, max_examples=30)
@given(SHAPES, st.integers(1, 3), st.floats(0.01, 1.0))
def test_tucker_budgets_are_met_by_the_smallest_rank(shape: tuple, kernel: int, share: float) -> None:
    G, N, C, seed = shape
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(G, N, C, kernel, 2, generator=generator, dtype=torch.float64)
    terms = factorize.tucker2(W)
    rank = terms.rank_for_energy(share)
    for r in {rank, terms.limit}:
        A, core, B = terms.factors(r)
        missed = W - torch.einsum("gno,goixy,gic->gncxy", B, core, A)
        assert math.isclose(float(missed.norm() / W.norm()), terms.error(r), abs_tol=1e-7)
    assert terms.energy(rank) >= share - 1e-12
    assert rank == 1 or terms.energy(rank - 1) < share
    assert terms.error(terms.limit) == 0


def test_weights_of_zeros_and_of_low_rank() -> None:
    zero = factorize.matrix(torch.zeros(4, 3))
    assert zero.rank_for_energy(1.0) == zero.rank_for_error(1e-9) == 1
    assert all(not factor.isnan().any() for factor in zero.factors(2))
    thin = weight(9, 2) @ weight(2, 11)
    assert factorize.matrix(thin).rank_for_error(1e-6) == 2
    A, B = factorize.matrix(thin).factors(2)
    torch.testing.assert_close(B @ A, thin)


BAD = {
    "NaN": (lambda: factorize.matrix(torch.tensor([[1.0, math.nan]])), "the weight has NaN or Inf in 1 of 2 places"),
    "empty": (lambda: factorize.matrix(torch.zeros(0, 3)), r"shape \(0, 3\), expected values in 2 dimensions"),
    "vector": (lambda: factorize.matrix(torch.zeros(3)), r"factorize.matrix: the weight has shape \(3,\)"),
    "tucker": (lambda: factorize.tucker2(torch.zeros(3, 3)), r"factorize.tucker2: the weight has shape \(3, 3\)"),
    "meta": (lambda: factorize.matrix(torch.zeros(3, 3, device="meta")), "the weight is on the meta device"),
    "moment shape": (
        lambda: factorize.matrix(torch.ones(3, 4), torch.eye(3)), r"the moment has shape \(3, 3\), expected \(4, 4\)",
    ),
    "moment device": (
        lambda: factorize.matrix(torch.ones(3, 4), torch.eye(4, device="meta")), "the moment is on meta, expected cpu",
    ),
    "moment NaN": (lambda: factorize.matrix(torch.ones(3, 2), torch.full((2, 2), math.nan)), "the moment has NaN"),
    "moment lopsided": (
        lambda: factorize.matrix(torch.ones(3, 2), torch.tensor([[1.0, 2.0], [0.0, 1.0]])), "is not symmetric",
    ),
    "moment negative": (lambda: factorize.matrix(torch.ones(3, 2), -torch.eye(2)), "a negative eigenvalue, -1"),
}  # fmt: skip


@pytest.mark.parametrize("label", BAD)
def test_bad_input_is_refused(label: str) -> None:
    call, match = BAD[label]
    with pytest.raises(ValueError, match=match):
        call()
