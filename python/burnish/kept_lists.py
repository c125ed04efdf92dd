"""Lists of tensors that C++ keeps from one call of a step op to the next.

A call hands C++ a reference to each tensor of its lists and takes it back, and there are thousands: for small ones that
costs more than the step. A list that is kept is handed over by its number instead, to the overload ``.kept`` of the op.
What its tensors are (memory, dtype, shape, device) is read at each call all the same, and which ones they are, Python
compares.

References of C++ are of use to small tensors of other lists too. Where one is the only one of C++, PyTorch takes and
drops the tensor's Python object with it, and for that the interpreter's lock: some 50 ns a tensor and call, and for a
parameter once more where its version is counted on. A large tensor is worth that, and its memory should go when its
owner lets go of it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Mapping, Sequence
from operator import is_
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from burnish import native

if TYPE_CHECKING:
    from burnish.registry import OpSpec

_MOST_ELEMENTS = 4096
_libraries: list[torch.library.Library] = []


class Kept(list[Tensor]):
    """The small tensors of a list, to which C++ refers until this goes; ``whole`` says that these are all, and that a
    step op of the CPU takes ``number`` for them."""

    def __init__(self, column: Sequence[Tensor]) -> None:
        small = [tensor for tensor in column if type(tensor) in _PLAIN and tensor.numel() <= _MOST_ELEMENTS]
        super().__init__(small)
        self.whole = len(small) == len(column) and small[0].is_cpu
        self._ends = _ends(column)
        self.number: int = torch.ops.burnish.keep_tensors(small)
        weakref.finalize(self, _drop, self.number)

    def is_of(self, column: Sequence[Tensor]) -> bool:
        """Whether it was made of ``column``, by a look at all of it, or at its ends where it is not whole: a large
        tensor that is replaced goes at once, a small one that is replaced between them when one of them is."""
        if self.whole:
            return len(self) == len(column) and all(map(is_, self, column))
        return self._ends == _ends(column)


_PLAIN = (Tensor, torch.nn.Parameter)


def _ends(column: Sequence[Tensor]) -> tuple[int, int, int]:
    return len(column), id(column[0]), id(column[-1])


@torch._disable_dynamo  # type: ignore[attr-defined]
def _drop(number: int) -> None:
    """Let C++ forget a list, whatever runs when Python finds it gone."""
    with torch._C._DisableTorchDispatch(), torch._C.DisableTorchFunction():
        torch.ops.burnish.drop_tensors(number)


class References:
    """The lists that C++ keeps for an owner, by name."""

    def __init__(self) -> None:
        self._held: dict[Hashable, Kept] = {}

    def hold(self, columns: Mapping[Any, list[Tensor]]) -> dict[Any, list[Tensor]]:
        """Keep the small tensors of ``columns``, and no others; returns them, those as :class:`Kept` that are whole.

        A mode of torch that sees each call sees tensors, and no numbers.
        """
        if native.lacks("burnish") or _in_mode():
            return dict(columns)
        self._held = {name: self._kept(name, column) for name, column in columns.items()}
        return {name: kept if kept.whole else columns[name] for name, kept in self._held.items()}

    def _kept(self, name: Hashable, column: list[Tensor]) -> Kept:
        kept = self._held.get(name)
        return kept if kept is not None and kept.is_of(column) else Kept(column)


def _in_mode() -> bool:
    return bool(torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack())


def overload(spec: OpSpec) -> Callable[..., None] | None:
    """A step op's overload ``.kept``, whose last argument has for each of the op's lists the number of the one that
    stands for it, or 0; None where no library brought it."""
    library = torch.library.Library(spec.namespace, "FRAGMENT")
    _libraries.append(library)
    library.define(f"{spec.stem}.kept{spec.schema.removesuffix(') -> ()')}, int[] kept) -> ()")
    there = torch._C._dispatch_has_kernel_for_dispatch_key(f"{spec.qualname}.kept", "CPU")
    return spec.overload("kept") if there else None
