"""The gate before the clock: what a contestant returns must be right, or it is not timed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from burnish.registry import OpSpec
from burnish.testing import numerics
from burnish.testing.calls import Violation, eager, is_exact, oracle, outcome


class Gate:
    """Judges results for one set of arguments, which a judged call may write into; the references run once, before."""

    def __init__(self, spec: OpSpec, args: tuple[Any, ...]) -> None:
        self._spec, self._args = spec, args
        self._eager = eager(spec, args)
        self._oracle = oracle(spec, args)

    def objection(self, call: Callable[[], Any]) -> str | None:
        """Why our implementation is wrong, by rule N1, or for an op of integers N4; None if it is right."""
        try:
            got = self._run(call)
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

    def peer_objection(self, call: Callable[[], Any], tolerance: float) -> str | None:
        """Why a peer's result is something else: its relative error against float64 is above ``tolerance``."""
        try:
            result, exact = self._run(call)[0].double(), self._oracle[0].double()
        except Exception as error:
            return one_line(error)
        if result.shape != exact.shape:
            return f"returns {tuple(result.shape)}, expected {tuple(exact.shape)}"
        distance = float((result - exact).norm() / exact.norm().clamp_min(1e-30))
        return None if distance <= tolerance else f"relative error {distance:.3g}, allowed {tolerance:g}"

    def _run(self, call: Callable[[], Any]) -> tuple[torch.Tensor, ...]:
        with torch.inference_mode():
            return outcome(self._spec, self._args, call())


def one_line(error: BaseException) -> str:
    """``Type: first line of its message``."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}".rstrip(": ")
