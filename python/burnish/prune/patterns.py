"""Which zeros go together: patterns over a weight as a matrix ``[N, K]``, a convolution's ``[out, in kh kw]``.

===================  =====================================================  =========================
pattern              what is kept or zero as a whole, a unit                sparsity
===================  =====================================================  =========================
``Unstructured()``   one weight                                             [0, 1), of weights
``TwoFour()``        two of each four weights along K are kept              0.5, always
``Block(32)``        a block of 32 x 32; ``Block((1, 16))`` is 1 x 16       [0, 1), of blocks
===================  =====================================================  =========================

A pattern turns scores into a mask, True where a weight is kept: the units with the lowest scores go, as many as the
sparsity says, to the nearest, but never all; of equal scores the first goes. A block's score is the mean of its
weights' scores, so that a partial block at the edge of a ragged weight is judged like a whole one. A last group of
fewer than four along K keeps two.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

SIDES = "expected a whole number of at least 1, or two of them, (rows, columns)"


@dataclass(frozen=True)
class Pattern:
    """What all patterns share; use one of the subclasses."""

    #: the only sparsity there is, where there is only one
    fixed: ClassVar[float | None] = None

    def units(self, scores: Tensor) -> Tensor:
        """The scores of the units, ``[rows of units, units in a row]``, of the scores ``[N, K]`` of weights."""
        raise NotImplementedError

    def spread(self, kept: Tensor, shape: tuple[int, int]) -> Tensor:
        """The mask ``[N, K]`` in which these units are kept."""
        raise NotImplementedError

    def mask(self, scores: Tensor, sparsity: float, *, by_row: bool = False) -> Tensor:
        """The mask that keeps the highest scores.

        Args:
            scores: ``[N, K]``, finite.
            sparsity: the share of units to zero, in [0, 1).
            by_row: let each row of units lose that share, instead of the whole.
        """
        units = self.units(scores)
        compared = units if by_row else units.flatten()
        kept = largest(compared, pruned_of(compared.shape[-1], sparsity))
        return self.spread(kept.view(units.shape), (scores.shape[0], scores.shape[1]))

    def nothing(self, rows: int, columns: int) -> str | None:
        """Why no mask of this pattern can have a zero in a weight of that size, as a clause; None if one can."""
        raise NotImplementedError

    def violation(self, kept: Tensor) -> str | None:
        """Where ``kept``, a bool mask or a weight whose zeros count, breaks the pattern, as a clause; None if nowhere.

        More than two dimensions are a convolution's.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Unstructured(Pattern):
    """Every weight by itself."""

    def __str__(self) -> str:
        return "unstructured"

    def units(self, scores: Tensor) -> Tensor:
        return scores

    def spread(self, kept: Tensor, shape: tuple[int, int]) -> Tensor:
        return kept

    def nothing(self, rows: int, columns: int) -> str | None:
        return "it has one weight" if rows * columns == 1 else None

    def violation(self, kept: Tensor) -> str | None:
        return None


@dataclass(frozen=True)
class TwoFour(Pattern):
    """Two of each four neighbours along K are kept, as GPUs' sparse matrix instructions want it."""

    fixed: ClassVar[float | None] = 0.5

    def __str__(self) -> str:
        return "2:4"

    def mask(self, scores: Tensor, sparsity: float = 0.5, *, by_row: bool = False) -> Tensor:
        columns = scores.shape[1]
        groups = F.pad(scores, (0, -columns % 4), value=-math.inf).unflatten(1, (-1, 4))
        return largest(groups, 2).flatten(1)[:, :columns]

    def nothing(self, rows: int, columns: int) -> str | None:
        return f"it has {columns} columns, and 2:4 zeroes none of fewer than three" if columns < 3 else None

    def violation(self, kept: Tensor) -> str | None:
        matrix = kept.flatten(1) != 0
        counts = F.pad(matrix, (0, -matrix.shape[1] % 4)).unflatten(1, (-1, 4)).sum(2)
        if not bool((counts > 2).any()):
            return None
        row, group = (counts > 2).nonzero()[0].tolist()
        return f"row {row} keeps {int(counts[row, group])} of columns {4 * group} to {4 * group + 3}, 2:4 allows 2"


@dataclass(frozen=True)
class Block(Pattern):
    """Blocks are kept or zero as a whole.

    Args:
        shape: the side of a square block, or its rows and columns.
    """

    shape: int | tuple[int, int] = 32

    def __post_init__(self) -> None:
        sides = self.shape if isinstance(self.shape, tuple) else (self.shape,)
        if not all(isinstance(side, int) and not isinstance(side, bool) for side in sides):
            raise TypeError(f"Block: shape is {self.shape!r}, {SIDES}")
        if len(sides) not in (1, 2) or min(sides) < 1 or (isinstance(self.shape, tuple) and len(sides) != 2):
            raise ValueError(f"Block: shape is {self.shape!r}, {SIDES}")

    def __str__(self) -> str:
        return "blocks of {} x {}".format(*self.sides)

    @property
    def sides(self) -> tuple[int, int]:
        """Rows and columns of a block."""
        return self.shape if isinstance(self.shape, tuple) else (self.shape, self.shape)

    def units(self, scores: Tensor) -> Tensor:
        return self._sums(scores) / self._sums(torch.ones_like(scores))

    def spread(self, kept: Tensor, shape: tuple[int, int]) -> Tensor:
        rows, columns = self.sides
        return kept.repeat_interleave(rows, 0)[: shape[0]].repeat_interleave(columns, 1)[:, : shape[1]]

    def nothing(self, rows: int, columns: int) -> str | None:
        high, wide = self.sides
        one = rows <= high and columns <= wide
        return f"it has {rows} x {columns} weights, a single block of {high} x {wide}" if one else None

    def violation(self, kept: Tensor) -> str | None:
        matrix = (kept.flatten(1) != 0).float()
        sums, sizes = self._sums(matrix), self._sums(torch.ones_like(matrix))
        partial = (sums != 0) & (sums != sizes)
        if not bool(partial.any()):
            return None
        row, column = partial.nonzero()[0].tolist()
        high, wide = self.sides
        return (
            f"the block of {high} x {wide} at row {row * high}, column {column * wide} keeps "
            f"{int(sums[row, column])} of {int(sizes[row, column])} weights, expected all or none"
        )

    def _sums(self, matrix: Tensor) -> Tensor:
        """The sum over each block."""
        rows, columns = self.sides
        padded = F.pad(matrix, (0, -matrix.shape[1] % columns, 0, -matrix.shape[0] % rows))
        return padded.unflatten(1, (-1, columns)).sum(2).unflatten(0, (-1, rows)).sum(1)


#: the patterns that sparse layers have formats for, those with the largest units first
FORMATS: tuple[Pattern, ...] = (
    Block(128), Block(64), Block(32), Block(16), Block((4, 16)), Block((1, 16)), TwoFour(), Unstructured(),
)  # fmt: skip


def found(kept: Tensor) -> Pattern:
    """The first of :data:`FORMATS` that a mask ``[N, K]`` holds; not 2:4 where it leaves most of those places empty, as
    any mask of few weights does by chance: 2:4 would store the zeros in them."""
    few = 4 * int(kept.count_nonzero()) < kept.numel()
    held = (pattern for pattern in FORMATS if pattern.violation(kept) is None)
    return next(pattern for pattern in held if not (few and pattern == TwoFour()))


def pruned_of(units: int, sparsity: float) -> int:
    """How many of so many units go."""
    return max(0, min(round(sparsity * units), units - 1))


def largest(scores: Tensor, pruned: int) -> Tensor:
    """True for all but the ``pruned`` smallest along the last dimension, of equal ones the first are smaller."""
    if pruned == 0:
        return torch.ones_like(scores, dtype=torch.bool)
    edge = scores.kthvalue(pruned, dim=-1, keepdim=True).values
    below, level = scores < edge, scores == edge
    room = pruned - below.sum(-1, keepdim=True)
    return ~(below | (level & (level.cumsum(-1) <= room)))
