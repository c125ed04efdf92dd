"""The gate before the clock: what a contestant returns must be right, or it is not timed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from burnish.registry import OpSpec
from burnish.testing import numerics
from burnish.testing.calls import Violation, as_outputs, eager, is_exact, oracle


class Gate:
    """Judges results for one set of arguments; the references run once."""

    def __init__(self, spec: OpSpec, args: tuple[Any, ...]) -> None:
        self._stem = spec.stem
        self._eager = eager(spec, args)
        self._oracle = oracle(spec, args)

    def objection(self, call: Callable[[], Any]) -> str | None:
        """Why our implementation is wrong, by rule N1, or for an op of integers N4; None if it is right."""
        try:
            got = _run(call)
            if len(got) != len(self._eager):
                return f"returns {len(got)} tensors, expected {len(self._eager)}"
            for result, expected, exact in zip(got, self._eager, self._oracle, strict=True):
                if is_exact(self._eager) or result.dtype != expected.dtype or result.shape != expected.shape:
                    numerics.check_equal("N4", self._stem, result, expected)
                else:
                    numerics.check_eager(self._stem, result, exact, expected)
        except Violation as violation:
            return str(violation)
        except Exception as error:
            return one_line(error)
        return None

    def peer_objection(self, call: Callable[[], Any], tolerance: float) -> str | None:
        """Why a peer's result is something else: its relative error against float64 is above ``tolerance``."""
        try:
            result, exact = _run(call)[0].double(), self._oracle[0].double()
        except Exception as error:
            return one_line(error)
        if result.shape != exact.shape:
            return f"returns {tuple(result.shape)}, expected {tuple(exact.shape)}"
        distance = float((result - exact).norm() / exact.norm().clamp_min(1e-30))
        return None if distance <= tolerance else f"relative error {distance:.3g}, allowed {tolerance:g}"


def one_line(error: BaseException) -> str:
    """``Type: first line of its message``."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}".rstrip(": ")


def _run(call: Callable[[], Any]) -> tuple[torch.Tensor, ...]:
    with torch.inference_mode():
        return as_outputs(call())
