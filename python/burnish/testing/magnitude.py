"""|x||w| for any op: how large the terms were that a result was summed from.

A rounding error is relative to the terms of a sum, not to the sum. :func:`magnitudes` runs a reference in float64 and
carries beside each tensor the magnitude of its terms: |a| @ |b| for a product, |a| + |b| for a sum, and
|f| + max(1, |f'|) |a| for a function. It also counts the longest sum. A sum or product of integer-valued operands is
exact, so it counts no terms and its magnitude is its own: that is what holds an int8 layer to the error of its
epilogue alone.

A reference that stores a result in its operands' dtype before going on says so by a copy to the dtype it already has in
float64, ``s.to(x.dtype, copy=True)``. That rounding error is one of the output's type, not of the accumulators':
:func:`magnitudes` carries what is left of it in the results apart, as ``stored``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from burnish.arguments import Args
from burnish.checks import FLOATING
from burnish.testing.calls import Outputs, as_outputs, widen

_MOVES = {
    "view", "_unsafe_view", "reshape", "t", "transpose", "permute", "expand", "unsqueeze", "squeeze", "slice", "select",
    "clone", "alias", "detach", "contiguous", "flatten", "unfold", "index_select", "lift_fresh", "_to_copy",
}  # fmt: skip
_PRODUCTS = {"mm", "bmm", "mv", "dot"}
_INTEGERS_EXACT_BELOW = 2.0**31


@dataclass(frozen=True)
class Terms:
    """What a result was summed from. ``magnitude`` is |x||w|; ``stored`` the sum of |s||w| over intermediate results s
    that were stored in the operands' dtype, zero where there are none, and ``inexact`` the dtypes that cannot hold each
    of these exactly; ``longest`` is the longest inexact sum's length."""

    magnitude: torch.Tensor
    stored: torch.Tensor
    inexact: frozenset[torch.dtype]
    longest: int


def magnitudes(reference: Callable[..., Any], args: Args) -> tuple[Outputs, tuple[Terms, ...]]:
    """``reference`` in float64: its results, and the terms of each."""
    mode, wide = _Magnitudes(), widen(args)  # widened outside of the mode, which would follow each copy
    with torch.no_grad(), mode:
        outputs = as_outputs(reference(*wide))
    inexact = frozenset(mode.inexact)
    return outputs, tuple(
        Terms(mode.of(out).expand_as(out), mode.stored(out).expand_as(out), inexact, mode.terms) for out in outputs
    )


class _Magnitudes(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.known: Any = WeakIdKeyDictionary()
        self.rounded: Any = WeakIdKeyDictionary()
        self.inexact: set[torch.dtype] = set()
        self.terms = 0

    def of(self, value: Any) -> torch.Tensor:
        """The magnitude of a tensor or number; of one not computed here, its absolute value."""
        if not isinstance(value, torch.Tensor):
            return torch.tensor(abs(float(value)), dtype=torch.float64)
        found: torch.Tensor | None = self.known.get(value)
        return value.detach().double().abs() if found is None else found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if isinstance(out, torch.Tensor) and out.dtype == torch.float64:
            self.known[out] = self._rule(func, args, kwargs, out)
            self._carry(func, args, kwargs, out)
        elif isinstance(out, (tuple, list)) and func.overloadpacket.__name__ in ("split", "unbind", "split_with_sizes"):
            for piece, magnitude in zip(out, func(self.of(args[0]), *args[1:], **kwargs), strict=True):
                self.known[piece] = magnitude
        return out

    def stored(self, value: Any) -> torch.Tensor:
        """What is left in a tensor of the roundings of stored results: their magnitude."""
        found = self.rounded.get(value) if self.rounded and isinstance(value, torch.Tensor) else None
        return torch.zeros((), dtype=torch.float64) if found is None else found

    def _carry(self, func: Any, args: Any, kwargs: Any, out: torch.Tensor) -> None:
        """Pass on what :meth:`stored` tells, through linear operations; a stored result begins it."""
        name = func.overloadpacket.__name__.rstrip("_")
        if name == "_to_copy" and args[0].dtype == torch.float64:
            self.rounded[out] = out.abs() + self.stored(args[0])
            self.inexact |= {dtype for dtype in FLOATING if bool((out.to(dtype).double() != out).any())}
            return
        if not self.rounded or not any(isinstance(arg, torch.Tensor) and arg in self.rounded for arg in args):
            return
        if name in _MOVES or name in ("sum", "mean", "constant_pad_nd"):
            self.rounded[out] = func(self.stored(args[0]), *args[1:], **kwargs)
        elif name in _PRODUCTS or name == "mul":
            self.rounded[out] = self._carried(func, *args)
        elif name == "addmm":
            self.rounded[out] = self.stored(args[0]) + self._carried(torch.mm, *args[1:])
        elif name in ("add", "sub"):
            self.rounded[out] = self.stored(args[0]) + self.stored(args[1])
        elif name == "where":
            self.rounded[out] = torch.where(args[0], self.stored(args[1]), self.stored(args[2]))
        else:
            raise NotImplementedError(f"what {name} makes of the rounding of a stored result")

    def _carried(self, product: Any, a: Any, b: Any) -> torch.Tensor:
        """What a product of a and b keeps of the roundings of either."""
        kept = torch.zeros((), dtype=torch.float64)
        if a in self.rounded:
            kept = kept + product(self.rounded[a], abs(b))
        if isinstance(b, torch.Tensor) and b in self.rounded:
            kept = kept + product(abs(a), self.rounded[b])
        return kept

    def _rule(self, func: Any, args: Any, kwargs: Any, out: torch.Tensor) -> torch.Tensor:
        name = func.overloadpacket.__name__.rstrip("_")
        if name in _MOVES:
            moved: torch.Tensor = func(self.of(args[0]), *args[1:], **kwargs)
            return moved
        if name in ("stack", "cat"):
            joined: torch.Tensor = func([self.of(each) for each in args[0]], *args[1:], **kwargs)
            return joined
        if name in _PRODUCTS:
            return self._sum(func, args[:2], args[2:], out, terms=args[0].shape[-1])
        if name == "addmm":
            return self.of(args[0]) + self._sum(torch.mm, args[1:3], (), torch.mm(*args[1:3]), args[1].shape[-1])
        if name in ("sum", "mean", "cumsum"):
            return self._sum(func, args[:1], args[1:], out, max(args[0].numel() // max(out.numel(), 1), 1), **kwargs)
        if name == "mul":
            return self.of(args[0]) * self.of(args[1])
        if name == "div":
            return self.of(args[0]) / (args[1].abs() if isinstance(args[1], torch.Tensor) else abs(args[1]))
        if name in ("add", "sub"):
            return self.of(args[0]) + self.of(args[1])
        if name == "where":
            return torch.where(args[0], self.of(args[1]), self.of(args[2]))
        if name == "masked_scatter":
            return torch.masked_scatter(self.of(args[0]), args[1], self.of(args[2]))
        if name == "copy":
            return self.of(args[1]).expand_as(out)
        return self._function(func, args, kwargs, out)

    def _sum(self, func: Any, operands: Any, rest: Any, out: torch.Tensor, terms: int, **kwargs: Any) -> torch.Tensor:
        total: torch.Tensor = func(*(self.of(operand) for operand in operands), *rest, **kwargs)
        whole = all(bool((operand == operand.round()).all()) for operand in operands)
        if whole and (not total.numel() or float(total.max()) <= _INTEGERS_EXACT_BELOW):
            return out.abs()
        self.terms = max(self.terms, terms)
        return total

    def _function(self, func: Any, args: Any, kwargs: Any, out: torch.Tensor) -> torch.Tensor:
        """|f| plus what f makes of its arguments' errors; the slope of a one-argument function is measured."""
        tensors = [arg for arg in args if isinstance(arg, torch.Tensor)]
        spread = [tensor for tensor in tensors if _broadcasts(tensor, out)]
        if len(tensors) == 1 and spread and tensors[0].dtype == torch.float64:
            (x,) = tensors
            step = 1e-6 * x.abs().clamp_min(1.0)
            slope = (func(x + step, *args[1:], **kwargs) - func(x - step, *args[1:], **kwargs)).abs() / (2 * step)
            return out.abs() + slope.clamp_min(1.0).nan_to_num(1.0) * self.of(x)
        return out.abs() + sum((self.of(tensor) for tensor in spread), torch.zeros((), dtype=torch.float64))


def _broadcasts(tensor: torch.Tensor, out: torch.Tensor) -> bool:
    """Whether an element-wise function of ``tensor`` could have ``out``'s shape."""
    pairs = zip(reversed(tensor.shape), reversed(out.shape), strict=False)
    return tensor.dim() <= out.dim() and all(size in (1, wide) for size, wide in pairs)
