"""How sparse the masked layers of a model are.

print(report)       an aligned table; layers that differ only in their number share a line
report.rows         a :class:`Row` for each masked layer
report.sparsity     the share of zeros in the weights of all of them
report.to_dict()    plain JSON values
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.nn.utils import parametrize

from burnish.layers import described
from burnish.prune.layers import matrix
from burnish.prune.masking import mask_of, parameter_of
from burnish.prune.patterns import found
from burnish.report import aligned, numberless, plural, ranges


@dataclass(frozen=True)
class Row:
    """One masked layer: what it is, what :func:`burnish.prune.patterns.found` calls its mask, its
    weights and how many of them are zero."""

    fqn: str
    layer: str
    pattern: str
    weights: int
    zeros: int

    @property
    def sparsity(self) -> float:
        """The share of zeros."""
        return self.zeros / self.weights


@dataclass(frozen=True)
class SparsityReport:
    """The result of :func:`report`; ``parameters`` are those of the whole model."""

    rows: tuple[Row, ...]
    parameters: int

    @property
    def sparsity(self) -> float:
        """The share of zeros in the masked layers' weights; 0 without such layers."""
        return sum(row.zeros for row in self.rows) / max(1, sum(row.weights for row in self.rows))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values: rows, totals."""
        rows = [{**asdict(row), "sparsity": row.sparsity} for row in self.rows]
        return {"rows": rows, "sparsity": self.sparsity, "parameters": self.parameters}

    def __str__(self) -> str:
        weights, zeros = (sum(getattr(row, name) for row in self.rows) for name in ("weights", "zeros"))
        total = f"{plural(len(self.rows), 'layer')} masked: {zeros} of {weights} weights are zero ({self.sparsity:.1%})"
        whole = f"whole model: {zeros} of {self.parameters} parameters are zero ({zeros / max(1, self.parameters):.1%})"
        return "\n".join((*_table(self.rows), total, whole))

    __repr__ = __str__


def report(model: torch.nn.Module) -> SparsityReport:
    """The masks of a model in numbers, whether burnish or torch.nn.utils.prune put them there.

    Raises:
        TypeError: not a module.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"report: model is a {type(model).__name__}, expected an nn.Module")
    rows = []
    for fqn, module in model.named_modules():
        mask = mask_of(module)
        if mask is not None:
            cls = type(module).__bases__[0] if parametrize.is_parametrized(module) else type(module)
            kind = described(cls.__name__, module, parameter_of(module))
            zeros = mask.numel() - int(mask.sum())
            rows.append(Row(fqn, kind, str(found(matrix(module, mask))), mask.numel(), zeros))
    return SparsityReport(tuple(rows), sum(parameter.numel() for parameter in model.parameters()))


def _table(rows: Sequence[Row]) -> list[str]:
    groups: dict[Any, list[Row]] = defaultdict(list)
    for row in rows:
        groups[numberless(row.fqn), row.layer, row.pattern, row.zeros].append(row)
    cells = [("layer", "", "is", "pattern", "weights", "zero")]
    for (_, layer, pattern, _), group in groups.items():
        count = f"x{len(group)}" if len(group) > 1 else ""
        share = f"{group[0].sparsity:.1%}"
        cells.append((ranges([row.fqn for row in group]), count, layer, pattern, str(group[0].weights), share))
    return aligned(cells)
