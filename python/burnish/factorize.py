"""A weight as a product of thin factors: which factors, how much they keep, and the smallest rank that keeps enough.

    terms = burnish.factorize.matrix(weight)                  # W [N, K] = B A, cut anywhere
    terms.energy(64), terms.error(64)                         # what rank 64 keeps and what it misses
    A, B = terms.factors(terms.rank_for_energy(0.95))

Everything here is float64, before the factors are rounded to a layer's dtype. Weights may be a batch ``[G, N, K]``, the
groups of a convolution, which all get one rank.

============  ============================================  ============================================================
function      minimises at each rank R                      by
============  ============================================  ============================================================
matrix        ``||W - B A||_F``                             singular vectors: B = U_R, A = U_R^T W
matrix, with  ``E ||(W - B A) x||^2``, ``M = E[x x^T]``     the same with the U of ``W M^(1/2)``: no inverse of
a moment M                                                  the root is needed
tucker2       ``||W - Tucker-2||_F`` up to sqrt(2)          higher-order SVD: bases of output and input channels
============  ============================================  ============================================================

The root of M is taken of ``M / mean(diag M) + 1e-6 I``: directions that no input showed count a millionth of an average
one, so that a rank that the data does not use up goes to the weight itself, a moment of few rows or of zeros works, and
rank min(N, K) is exact. Energies and errors are those of M without that term.

Factors are balanced: row r of A has the norm of column r of B, as training and fp16 want it.

Sources: Eckart and Young 1936; activation-aware SVD, Yuan et al. 2023 (arXiv 2312.05821) and Wang et al. 2024 (SVD-LLM,
arXiv 2403.07378); Tucker-2, Kim et al. 2015 (arXiv 1511.06530); higher-order SVD, De Lathauwer et al. 2000.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

#: what a direction that no input showed counts, beside an average one
DAMPING = 1e-6
#: a moment's eigenvalues may be this far below zero, beside the largest: sums in fp32 are
_NEGATIVE = 1e-4


@dataclass(frozen=True)
class Factorization:
    """Factors at every rank from 1 to :attr:`limit`, all float64.

    ``factors(rank)`` makes them: A and B of :func:`matrix`, A, core and B of :func:`tucker2`. ``lost[r]`` is the share
    of the energy that rank r misses, ``[limit + 1]``, falling from 1 to 0.
    """

    factors: Callable[[int], tuple[Tensor, ...]]
    lost: Tensor

    @property
    def limit(self) -> int:
        """The largest rank, which is exact."""
        return self.lost.numel() - 1

    def energy(self, rank: int) -> float:
        """The share of the squared norm that the rank keeps; with a moment, of the output's mean square."""
        return 1.0 - float(self.lost[rank])

    def error(self, rank: int) -> float:
        """The relative error: of the weight in Frobenius norm; with a moment, of the output in RMS."""
        return float(self.lost[rank]) ** 0.5

    def rank_for_energy(self, energy: float) -> int:
        """The smallest rank that keeps this share, 0 < energy <= 1."""
        return self._smallest(1.0 - energy)

    def rank_for_error(self, max_error: float) -> int:
        """The smallest rank whose relative error is at most this."""
        return self._smallest(max_error**2)

    def _smallest(self, allowed: float) -> int:
        return 1 + int((self.lost[1:] <= allowed).nonzero()[0])


def matrix(weight: Tensor, moment: Tensor | None = None, *, who: str = "factorize.matrix") -> Factorization:
    """The best factors ``A [..., R, K]`` and ``B [..., N, R]`` of a weight at every rank.

    Args:
        weight: ``[N, K]``, or ``[G, N, K]`` for groups that share a rank.
        moment: E[x x^T] of the inputs, ``[K, K]`` or ``[G, K, K]``, on the weight's device; None for the plain SVD.
        who: begins the messages.

    Raises:
        ValueError: a NaN or an infinity, an empty weight, a moment that does not fit or is no second moment.
    """
    W = _checked(weight, (2, 3), who)
    M = None if moment is None else _checked_moment(moment, W, who)
    U = torch.linalg.svd(W if M is None else W @ _root(M, who), full_matrices=False)[0]
    right = U.mT @ W  # [..., L, K]
    squares = (right * (right if M is None else right @ M)).sum(-1).clamp_(min=0)  # [..., L]
    if not squares.any():  # of inputs that were all zero
        squares = right.square().sum(-1)
    scale = right.norm(dim=-1).sqrt()
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))

    def factors(rank: int) -> tuple[Tensor, ...]:
        s = scale[..., :rank]
        return right[..., :rank, :] / s.unsqueeze(-1), U[..., :rank] * s.unsqueeze(-2)

    return Factorization(factors, _lost(squares.reshape(-1, squares.shape[-1]).sum(0)))


def tucker2(weight: Tensor, *, who: str = "factorize.tucker2") -> Factorization:
    """A convolution's weight as ``A [..., R1, C]``, ``core [..., R2, R1, kh, kw]`` and ``B [..., N, R2]`` at every rank
    R: R1 and R2 are R, or all of the input or output channels where those are fewer.

    Args:
        weight: ``[N, C, kh, kw]``, or ``[G, N, C, kh, kw]`` for groups that share a rank.
        who: begins the messages.

    Raises:
        ValueError: a NaN or an infinity, or an empty weight.
    """
    W = _checked(weight, (4, 5), who)
    U, V = (torch.linalg.svd(side.flatten(-3), full_matrices=False)[0] for side in (W, W.transpose(-4, -3)))
    whole = torch.einsum("...no,...ncxy,...ci->...oixy", U, W, V)
    outputs, inputs = whole.shape[-4:-2]
    kept = whole.square().sum((-2, -1)).reshape(-1, outputs, inputs).sum(0).cumsum(0).cumsum(1)
    ranks = range(1, max(outputs, inputs) + 1)
    nested = torch.stack([kept[min(r, outputs) - 1, min(r, inputs) - 1] for r in ranks])

    def factors(rank: int) -> tuple[Tensor, ...]:
        return V[..., :rank].mT, whole[..., :rank, :rank, :, :], U[..., :rank]

    return Factorization(factors, _lost(nested.diff(prepend=nested.new_zeros(1)).clamp_(min=0)))


def _lost(squares: Tensor) -> Tensor:
    """The shares that are missing after each of the terms, which bring these energies."""
    tails = squares.flip(0).cumsum(0).flip(0)  # small ones are summed first
    total = tails[0]
    tails = tails / total if total > 0 else torch.zeros_like(tails)
    return torch.cat((tails, tails.new_zeros(1)))


def _checked(weight: Tensor, dims: tuple[int, int], who: str) -> Tensor:
    if weight.dim() not in dims or not weight.numel():
        raise ValueError(
            f"{who}: the weight has shape {tuple(weight.shape)}, expected values in {dims[0]} dimensions, or in "
            f"{dims[1]} with groups"
        )
    if weight.is_meta:
        raise ValueError(f"{who}: the weight is on the meta device and has no values to factorise")
    finite = weight.isfinite()
    if not bool(finite.all()):
        bad = int((~finite).sum())
        raise ValueError(
            f"{who}: the weight has NaN or Inf in {bad} of {weight.numel()} places; expected finite values"
        )
    return weight.detach().double()


def _checked_moment(moment: Tensor, weight: Tensor, who: str) -> Tensor:
    K = weight.shape[-1]
    wanted = (*weight.shape[:-2], K, K)
    if tuple(moment.shape) not in (wanted, (K, K)):
        raise ValueError(
            f"{who}: the moment has shape {tuple(moment.shape)}, expected {wanted}: it is of another layer"
        )
    if moment.device != weight.device:
        raise ValueError(f"{who}: the moment is on {moment.device}, expected {weight.device} as the weight is")
    moment = moment.detach().double()
    if not bool(moment.isfinite().all()):
        raise ValueError(f"{who}: the moment has NaN or Inf; expected finite values")
    if not torch.allclose(moment, moment.mT, rtol=1e-3, atol=1e-5 * float(moment.abs().max())):
        raise ValueError(f"{who}: the moment is not symmetric; expected E[x x^T]")
    return (moment + moment.mT) / 2


def _root(M: Tensor, who: str) -> Tensor:
    """A matrix whose product with its transpose is the damped moment, up to a factor."""
    values, vectors = torch.linalg.eigh(M)
    if bool((values[..., 0] < -_NEGATIVE * values[..., -1].abs()).any()):
        raise ValueError(f"{who}: the moment has a negative eigenvalue, {float(values.min()):.3g}; expected E[x x^T]")
    mean = M.diagonal(dim1=-2, dim2=-1).mean()
    values = values.clamp(min=0) / mean if mean > 0 else torch.zeros_like(values)
    return vectors * (values + DAMPING).sqrt().unsqueeze(-2)
