"""SecondOrder: zero the weights whose loss the others can best make up for, and let them.

A row ``w`` of a layer's weight gives outputs whose mean square error after a change ``d`` is ``d M d^T``, with
``M = E[x x^T]`` from a calibration. Zeroing one weight of the set T that may still change costs, with the best
correction of the rest of T::

    cost(j) = w_j^2 / [H^-1]_jj          correction = -w_j [H^-1]_j: / [H^-1]_jj          H = M_TT + damping

(the optimal brain surgeon, Hassibi and Stork 1993). As SparseGPT does (Frantar and Alistarh 2023, arXiv 2301.00774),
columns are settled from left to right, so that T is the columns not settled yet, the same for all rows, and one
triangular factor ``U``, ``H^-1 = U^T U``, holds every inverse that is needed: ``[H^-1]_jj = U_jj^2``.

============  ================================================================  =====================================
pattern       cost                                                              chosen among
============  ================================================================  =====================================
Unstructured  ``w_j^2 / U_jj^2``                                                the weights of ``block_size`` columns
TwoFour       ``w_j^2 / U_jj^2``                                                each four
Block         ``|w_B U_BB^-1|^2``, what zeroing B's columns together costs      all blocks of the layer
============  ================================================================  =====================================

All is float64 and rounded once, to the weight's dtype. The damping is a share of the mean of M's diagonal, added to it;
to an input that was always zero it is all there is, so that such weights go first, the smallest of them before others,
and those that stay keep their values. An optimizer with fp32 masters has to take them anew from the weights: see
:class:`burnish.optim.options.Extras`. Memory: about 25 K^2 and 24 N K bytes for the layer at work.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from burnish.calibration import Inputs
from burnish.prune.criteria import Criterion, below
from burnish.prune.patterns import Block, Pattern, TwoFour, Unstructured


@dataclass(frozen=True)
class SecondOrder(Criterion):
    """The error of the layer's output that the other weights cannot make up for; they are changed so that they do.

    Args:
        damping: what is added to the diagonal of the inputs' second moment, as a share of its mean, above 0.
        block_size: columns whose weights are chosen at a time; as many are corrected at a time.
    """

    damping: float = 0.01
    block_size: int = 128

    def __post_init__(self) -> None:
        if not isinstance(self.damping, int | float) or isinstance(self.damping, bool):
            raise TypeError(f"SecondOrder: damping is {self.damping!r}, expected a number above 0")
        if not 0 < self.damping < float("inf"):
            raise ValueError(f"SecondOrder: damping is {self.damping!r}, expected a finite number above 0")
        if not isinstance(self.block_size, int) or isinstance(self.block_size, bool):
            raise TypeError(f"SecondOrder: block_size is {self.block_size!r}, expected a number of columns")
        if self.block_size < 1:
            raise ValueError(f"SecondOrder: block_size is {self.block_size}, expected at least 1 column")

    def decide(
        self, weight: Tensor, inputs: Inputs | None, pattern: Pattern, sparsity: float, kept: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        assert inputs is not None
        K = weight.shape[1]
        U = factor(inputs.moment.view(-1, K, K), self.damping)
        W = weight.double().unflatten(0, (len(U), -1)).mT.contiguous()  # [G, K, n], a column in one piece
        mask = torch.ones(weight.shape, dtype=torch.bool, device=weight.device)
        kept_columns = mask.unflatten(0, (len(U), -1)).mT
        step = self.block_size if not isinstance(pattern, TwoFour) else -(-self.block_size // 4) * 4
        choose = _chooser(pattern, sparsity, step, mask, kept)
        for start in range(0, K, step):
            stop = min(start + step, K)
            errors = torch.empty_like(W[:, start:stop])
            for j in range(start, stop):
                choose(j, W, U)
                wrong = torch.where(kept_columns[:, j], 0, W[:, j]) / U[:, j, j, None]  # [G, n]
                W[:, j:stop].baddbmm_(U[:, j, j:stop, None], wrong[:, None], alpha=-1)
                errors[:, j - start] = wrong
            W[:, stop:].baddbmm_(U[:, start:stop, stop:].mT, errors, alpha=-1)
        return mask, torch.where(mask, W.mT.flatten(0, 1), 0).to(weight.dtype)


def factor(moment: Tensor, damping: float) -> Tensor:
    """The upper triangular ``U [G, K, K]`` with ``U^T U`` the inverse of the damped moment, float64.

    Raises:
        ValueError: the damped moment is not positive definite.
    """
    H = moment.flip(1, 2).double()  # a copy
    mean = H.diagonal(dim1=1, dim2=2).mean(1)
    H.diagonal(dim1=1, dim2=2).add_(damping * torch.where(mean > 0, mean, 1.0)[:, None])
    # turned round, so that its factor turned back is the upper R with R R^T the moment, whose inverse is U
    L, info = torch.linalg.cholesky_ex(H)
    if bool(info.any()):
        raise ValueError(f"SecondOrder: damping is {damping}, too little for this calibration: give more")
    del H
    L = L.flip(1, 2)
    eye = torch.eye(L.shape[1], dtype=L.dtype, device=L.device).expand_as(L)
    return torch.linalg.solve_triangular(L, eye, upper=True)


def costs(W: Tensor, U: Tensor, span: int) -> Tensor:
    """What zeroing each weight costs, or, with ``span`` columns zeroed together, its share of that; ``[N, columns]``.

    ``W [G, columns, n]`` and ``U [G, columns, columns]`` are those of columns not settled yet.
    """
    if span == 1:
        return (W / U.diagonal(dim1=1, dim2=2)[..., None]).square().mT.flatten(0, 1)
    parts = [
        torch.linalg.solve_triangular(U[:, a : a + span, a : a + span].mT, W[:, a : a + span], upper=False)
        for a in range(0, W.shape[1], span)
    ]
    return torch.cat(parts, 1).square().mT.flatten(0, 1)


def _chooser(
    pattern: Pattern, sparsity: float, step: int, mask: Tensor, kept: Tensor | None
) -> Callable[[int, Tensor, Tensor], None]:
    """A function that is told ``(j, W, U)`` before column j is settled, and writes into ``mask`` what goes."""
    N, K = mask.shape
    width = {Unstructured: step, TwoFour: 4}.get(type(pattern), K)
    span = pattern.sides[1] if isinstance(pattern, Block) else 1

    def choose(j: int, W: Tensor, U: Tensor) -> None:
        if j % width:
            return
        here = slice(j, min(j + width, K))
        before = None if kept is None else kept[:, here]
        scores = below(costs(W[:, here], U[:, here, here], span), before)
        if isinstance(pattern, Unstructured):
            share = round(sparsity * N * here.stop) - round(sparsity * N * j)  # so that the layer's is exact
            chosen = pattern.mask(scores, share / scores.numel())
        else:
            chosen = pattern.mask(scores, sparsity)
        mask[:, here] = chosen

    return choose
