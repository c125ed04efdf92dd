"""What a weight is worth: scores for a weight as a matrix ``[N, K]``, in float64.

==================  ====================================  ============  =============  ======================
criterion           score of ``W[n, k]``                  inputs        compared       source
==================  ====================================  ============  =============  ======================
``Magnitude(p)``    ``abs(W) ** p``                       not looked    in a layer,    Han et al. 2015
                                                          at            or globally    (arXiv 1506.02626)
``Wanda()``         ``abs(W) * sqrt(E[x_k ** 2])``        diagonal of   in a row, or   Sun et al. 2023
                                                          a calibration  as the         (arXiv 2306.11695)
                                                                        pattern says
``SecondOrder()``   :mod:`burnish.prune.second_order`     a calibration  in a layer     Frantar and Alistarh
                                                                                       2023 (arXiv 2301.00774)
==================  ====================================  ============  =============  ======================

Only magnitudes can be compared between layers: the other two are about the error of one layer's own output.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from burnish.calibration import Inputs
from burnish.prune.patterns import Pattern, Unstructured


@dataclass(frozen=True)
class Criterion:
    """What all criteria share; use one of the subclasses."""

    #: whether it needs a calibration
    looks_at_inputs: ClassVar[bool] = True
    #: whether its scores mean the same in every layer
    comparable: ClassVar[bool] = False

    def scores(self, weight: Tensor, inputs: Inputs | None) -> Tensor:
        """The scores ``[N, K]``, float64, of the weight ``[N, K]``."""
        raise NotImplementedError

    def decide(
        self, weight: Tensor, inputs: Inputs | None, pattern: Pattern, sparsity: float, kept: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """The mask ``[N, K]`` for a weight, and the weight's new values where the criterion changes them.

        ``kept`` is the mask so far: what is zero there stays so.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Magnitude(Criterion):
    """The weight's size.

    Args:
        p: the power, 1 or 2; it matters where a block's mean is taken.
    """

    p: int = 1

    looks_at_inputs: ClassVar[bool] = False
    comparable: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.p not in (1, 2) or isinstance(self.p, bool):
            raise ValueError(f"Magnitude: p is {self.p!r}, expected 1 or 2")

    def scores(self, weight: Tensor, inputs: Inputs | None = None) -> Tensor:
        size = weight.double().abs()
        return size if self.p == 1 else size.square()

    def decide(
        self, weight: Tensor, inputs: Inputs | None, pattern: Pattern, sparsity: float, kept: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        return pattern.mask(below(self.scores(weight), kept), sparsity), None


@dataclass(frozen=True)
class Wanda(Criterion):
    """The weight's size times the root mean square of its input; single weights compete within their row."""

    def scores(self, weight: Tensor, inputs: Inputs | None) -> Tensor:
        assert inputs is not None
        scale = inputs.diagonal.double().clamp(min=0).sqrt()  # [K] or [G, K]
        groups = scale.view(-1, 1, weight.shape[1])
        return (weight.double().abs().unflatten(0, (len(groups), -1)) * groups).flatten(0, 1)

    def decide(
        self, weight: Tensor, inputs: Inputs | None, pattern: Pattern, sparsity: float, kept: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        scores = below(self.scores(weight, inputs), kept)
        return pattern.mask(scores, sparsity, by_row=isinstance(pattern, Unstructured)), None


def below(scores: Tensor, kept: Tensor | None) -> Tensor:
    """The scores with what is zero already beneath all others, so that it goes first."""
    return scores if kept is None else scores.masked_fill(~kept, -1.0)
