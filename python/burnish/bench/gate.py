"""The gate before the clock: what a contestant makes must be right, or it is not timed."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch

from burnish.arguments import Args, places
from burnish.registry import OpSpec
from burnish.testing import numerics
from burnish.testing.calls import Outputs, Violation, copies, eager, is_exact, mutated, oracle, outcome


class Gate:
    """Judges what calls make of one set of arguments; the references run once, before.

    A call is judged on arguments that :meth:`copies` gave, and on none that another call has had: each begins where the
    references began, and an op that writes into its arguments leaves the set as it is.
    """

    def __init__(self, spec: OpSpec, args: Args) -> None:
        self._spec, self._args = spec, args
        self._eager = eager(spec, args)
        # what makes integers is bit-exact, and its formats may be none of float64's
        self._oracle = self._eager if is_exact(self._eager) else oracle(spec, args)
        self._written = mutated(spec)

    @property
    def writes(self) -> bool:
        """Whether a judged call changes the arguments that it was judged on."""
        return bool(self._written)

    def copies(self) -> Args:
        """The arguments, what the op writes into in memory of its own."""
        return copies(self._spec, self._args)

    def objection(self, call: Callable[[], Any], args: Args) -> str | None:
        """Why our implementation is wrong, by rule N1, or for an op of integers N4; None if it is right."""
        try:
            with torch.inference_mode():
                got = outcome(self._spec, args, call())
            if len(got) != len(self._eager):
                return f"returns {len(got)} tensors, expected {len(self._eager)}"
            for result, expected, exact in zip(got, self._eager, self._oracle, strict=True):
                if is_exact(self._eager) or result.dtype != expected.dtype or result.shape != expected.shape:
                    numerics.check_equal("N4", self._spec.stem, result, expected)
                else:
                    numerics.check_eager(self._spec.stem, result, exact, expected)
        except Violation as violation:
            return str(violation)
        except Exception as error:
            return one_line(error)
        return None

    def peer_objection(self, call: Callable[[], Any], args: Args, tolerance: float, spared: float = 0.0) -> str | None:
        """Why a peer computes something else: its relative error against float64 is above ``tolerance``, that share of
        all elements left out of it which is furthest off.

        Of an op that writes into its arguments a peer shares the first of these, and the error is that of its change
        beyond one ulp an element, which rounding to nearest or at random may cost.
        """
        try:
            with torch.inference_mode():
                results = self._shared(outcome(self._spec, args, call()))
            exacts = self._shared(self._oracle)
            starts = self._shared(outcome(self._spec, self._args, None)) if self._written else (None,)
            for result, exact in zip(results, exacts, strict=True):
                if result.shape != exact.shape:
                    return f"returns {tuple(result.shape)}, expected {tuple(exact.shape)}"
            distance = _relative(results, exacts, starts, spared)
        except Exception as error:
            return one_line(error)
        return None if distance <= tolerance else f"relative error {distance:.3g}, allowed {tolerance:g}"

    def _shared(self, made: Outputs) -> Outputs:
        """Of all that a call made, what peers make too: its first result, or the first argument that it wrote into."""
        if not self._written:
            return made[:1]
        sizes = Counter(place[0] for place in places(self._args) if place[0] in self._written)
        first = len(made) - sizes.total()
        return made[first : first + sizes[min(self._written)]]


def _relative(results: Outputs, exacts: Outputs, starts: Sequence[torch.Tensor | None], spared: float) -> float:
    """The norm of the errors, the largest ``spared`` of them left out, over that of all exact values or, where there
    are ``starts``, of what changed since."""
    errors, whole = [], 0.0
    for result, exact, start in zip(results, exacts, starts, strict=True):
        error, size = (result.double() - exact.double()).abs(), exact.double()
        if start is not None:
            error, size = (error - numerics.ulp(size, result.dtype)).clamp_min(0), size - start.double()
        errors.append(error.flatten())
        whole += float(size.square().sum())
    judged = torch.cat(errors).nan_to_num_(nan=math.inf, posinf=math.inf)  # NaN is as far off as can be
    if spared:
        judged = judged[judged <= judged.kthvalue(judged.numel() - int(spared * judged.numel())).values]
    return float(judged.norm()) / max(math.sqrt(whole), 1e-30)


def one_line(error: BaseException) -> str:
    """``Type: first line of its message``."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}".rstrip(": ")
