"""What a swap did: a row for each layer, bytes before and after, and the way back.

print(report)            an aligned table; layers that differ only in their number share a line
report.swapped           the rows of the layers that were swapped; report.kept: the others, with the reason
report.to_dict()         plain JSON values
report.revert()          undo it all: the very modules that were there
report.release()         give up the way back and free the original weights, which the report holds until then
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from burnish.errors import SwapError
from burnish.measure import Times

_Module = torch.nn.Module


@dataclass(frozen=True)
class Row:
    """One layer: what it was, what it is, why it was kept, and what it weighs; ``fused`` is the fqn of the activation
    it took in, ``tied`` the layer that holds the weight they share."""

    fqn: str
    was: str
    became: str | None
    reason: str | None
    bytes_before: int
    bytes_after: int
    fused: str | None = None
    tied: str | None = None
    frozen: bool = False
    times: Times | None = None


@dataclass(frozen=True)
class Slot:
    """A child of a module: what was there and what has been put there."""

    parent: _Module
    child: str
    fqn: str
    before: _Module
    after: _Module

    def put(self, module: _Module) -> None:
        self.parent._modules[self.child] = module

    @property
    def holds(self) -> _Module | None:
        return self.parent._modules.get(self.child)


class Report:
    """The result of :func:`burnish.swap_`; the module's docstring lists what it offers.

    Args:
        rows: a row for each layer that has tensors, in the model's order.
        slots: what was exchanged.
        bytes_before, bytes_after: of all parameters and buffers of the model.
        frozen: parameters of the model that the swap froze.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        slots: Sequence[Slot],
        bytes_before: int,
        bytes_after: int,
        frozen: Sequence[torch.nn.Parameter] = (),
    ) -> None:
        self.rows = tuple(rows)
        self.bytes_before = bytes_before
        self.bytes_after = bytes_after
        self._slots = tuple(slots)
        self._frozen = tuple(frozen)
        self._spent: str | None = None

    @property
    def swapped(self) -> tuple[Row, ...]:
        """The rows of swapped layers."""
        return tuple(row for row in self.rows if row.became is not None)

    @property
    def kept(self) -> tuple[Row, ...]:
        """The rows of kept layers, each with its reason."""
        return tuple(row for row in self.rows if row.became is None)

    @property
    def fused(self) -> tuple[str, ...]:
        """The fqns of the activations that swapped layers compute now."""
        return tuple(row.fused for row in self.rows if row.fused is not None)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values: rows, totals."""
        return {
            "rows": [asdict(row) for row in self.rows],
            "swapped": len(self.swapped),
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "swapped_bytes_before": sum(row.bytes_before for row in self.swapped),
            "swapped_bytes_after": sum(row.bytes_after for row in self.swapped),
        }

    def revert(self) -> None:
        """Put the original modules back. They go to the device, dtype and mode that their stand-ins have now, and are
        bit-equal to what they were; a bias that was trained since is, being the same parameter, the trained one.

        Raises:
            SwapError: reverted or released already, or another module stands where a swapped one was put; nothing is
                changed then.
        """
        if self._spent:
            raise SwapError(f"revert: this report was {self._spent} already")
        strangers = [slot.fqn for slot in self._slots if slot.holds is not slot.after]
        if strangers:
            raise SwapError(
                f"revert: another module was put at {', '.join(map(repr, strangers[:5]))} since the swap; "
                "nothing was changed"
            )
        for slot in self._slots:  # first what can fail
            _follow(slot.before, slot.after)
        for slot in self._slots:
            slot.before.training = slot.after.training
            slot.put(slot.before)
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        self.release()
        self._spent = "reverted"

    def release(self) -> None:
        """Forget the original modules, which frees their memory; :meth:`revert` is then no longer possible."""
        self._slots = ()
        self._frozen = ()
        self._spent = "released"

    def __str__(self) -> str:
        return "\n".join((*_table(self.rows), *self._summary()))

    __repr__ = __str__

    def _summary(self) -> list[str]:
        swapped = self.swapped
        before, after = (sum(getattr(row, name) for row in swapped) for name in ("bytes_before", "bytes_after"))
        lines = [
            f"{plural(len(swapped), 'layer')} swapped: {_size(before)} -> {_size(after)}{_share(after, before)}, "
            f"{plural(len(self.fused), 'activation')} fused",
            f"whole model: {_size(self.bytes_before)} -> {_size(self.bytes_after)}"
            f"{_share(self.bytes_after, self.bytes_before)}",
        ]
        frozen = sum(row.frozen for row in swapped)
        if frozen:
            verb = "is" if frozen == 1 else "are"
            lines.append(
                f"{plural(frozen, 'weight')} could be trained before and {verb} frozen now; "
                "gradients reach inputs and biases"
            )
        return lines


def _follow(before: _Module, after: _Module) -> None:
    """Bring an original module to the device and the dtype that its stand-in has now. What both hold is there already,
    so only what the original holds alone says where it is."""
    tensors = [*after.buffers(), *after.parameters()]
    shared = {id(tensor) for tensor in tensors}
    alone = [tensor for tensor in before.parameters() if id(tensor) not in shared]
    dtype = getattr(after, "dtype", None)
    if tensors and any(tensor.device != tensors[0].device for tensor in alone):
        before.to(tensors[0].device)
    if dtype is not None and any(tensor.dtype != dtype for tensor in alone):
        before.to(dtype)


def model_bytes(model: _Module) -> int:
    """Bytes of all parameters and buffers, shared ones once."""
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return sum(map(tensor_bytes, tensors.values()))


def tensor_bytes(tensor: torch.Tensor) -> int:
    """Its bytes; none for the parameter of a lazy module."""
    return 0 if torch.nn.parameter.is_lazy(tensor) else tensor.nbytes


def _share(part: int, whole: int) -> str:
    return f" ({100 * part / whole:.1f} %)" if whole else ""


def _size(count: int) -> str:
    size = float(count)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024 or unit == "MiB":
            break
        size /= 1024
    return f"{count} B" if unit == "B" else f"{size:.2f} {unit}"


def _table(rows: Sequence[Row]) -> list[str]:
    """One line for the rows that differ in nothing but the numbers in their fqn."""
    groups: dict[Any, list[Row]] = defaultdict(list)
    for row in rows:
        times = None if row.times is None else (row.times.rows, row.times.before_us, row.times.after_us)
        key = (numberless(row.fqn), row.was, row.became, numberless(row.reason))
        groups[
            (
                *key,
                row.bytes_before,
                row.bytes_after,
                numberless(_child(row.fused)),
                row.tied is None,
                row.frozen,
                times,
            )
        ].append(row)
    cells = [("layer", "", "from", "to", "bytes", "")]
    for group in groups.values():
        row = group[0]
        count = f"x{len(group)}" if len(group) > 1 else ""
        to = row.became or "kept"
        size = (
            _size(row.bytes_before) if row.became is None else f"{_size(row.bytes_before)} -> {_size(row.bytes_after)}"
        )
        cells.append((ranges([member.fqn for member in group]), count, row.was, to, size, _note(row)))
    return aligned(cells)


def aligned(cells: Sequence[Sequence[str]]) -> list[str]:
    """Lines of cells, each column as wide as its widest."""
    widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]


def _note(row: Row) -> str:
    measured = ""
    if row.times is not None:
        measured = f"{row.times.before_us:.0f} -> {row.times.after_us:.0f} us at {row.times.rows} rows"
    tied = f"shares the weight of {row.tied}" if row.tied else ""
    fused = f"takes in {_child(row.fused)!r}" if row.fused else ""
    return "; ".join(part for part in (row.reason, fused, tied, measured) if part)


def _child(fqn: str | None) -> str | None:
    return fqn and fqn.rpartition(".")[2]


def numberless(text: str | None) -> str | None:
    """The text with a sign in the place of each number."""
    return text and re.sub(r"\d+", "#", text)


def ranges(fqns: Sequence[str]) -> str:
    """``layer.0.q, layer.1.q, layer.2.q`` as ``layer.{0..2}.q``; what is no product of numbers is listed whole."""
    parts = [re.split(r"(\d+)", fqn) for fqn in fqns]
    columns = [sorted(set(column), key=lambda part: (len(part), part)) for column in zip(*parts, strict=True)]
    if len(set(fqns)) < math.prod(len(column) for column in columns):
        return ", ".join(fqns)
    return "".join(column[0] if len(column) == 1 else _span(column) for column in columns)


def _span(numbers: Sequence[str]) -> str:
    values = [int(number) for number in numbers]
    if values == list(range(values[0], values[0] + len(values))):
        return f"{{{numbers[0]}..{numbers[-1]}}}"
    return f"{{{','.join(numbers)}}}"


def plural(number: int, noun: str) -> str:
    """``3 layers``, ``1 layer``."""
    return f"{number} {noun}{'' if number == 1 else 's'}"
