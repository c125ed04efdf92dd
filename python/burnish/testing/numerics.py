"""The numeric rules and their tolerances, in this one place.

y is an op's result, y64 the float64 oracle's, yt eager torch's in the same dtype, all on the same inputs. u_o and u_a
are the unit roundoffs (half of eps) of the output type and of the fp32 accumulators.

====  =========================================================================================================
N1    |y - y64| <= 2 max|yt - y64| + half an ulp of y64. Small results are pooled over seeds until the maximum
      over yt means something.
N2    |y - y64| <= 2 [(n + 2) u_a |x||w| + u_o (|y64| + |s||w|)] + the smallest subnormal, with n the length of the
      longest inexact sum, |x||w| the result's magnitude as :mod:`burnish.testing.magnitude` finds it and |s||w| that
      of intermediate results which the reference stores in the operands' dtype; most ops have none.
N3    |mean(e)| <= 0.05 and |mean(e sign(y64))| <= 0.05 for e = (y - y64) / unit, over at least 1e5 elements: errors
      lean neither downwards nor towards zero. The unit is an ulp of y64 or, where cancellation left less than the
      accumulator or a stored result can resolve, u_a |x||w| or u_o |s||w|. Truncating passes N1 and fails here.
N4    an op with an integer result is bit-exact, in all of its results.
C4    on integer-valued inputs the result is the exact one, rounded once, unless a result stored on the way is none that
      its dtype holds (a layout that repeats rows can make it so): then N2.
N5    on extreme quantised inputs the result is bit-equal to the reference's: saturation cannot hide in a tolerance.
N7    NaN, +Inf and -Inf stand where torch has them, for a special value in any position of any input.
====  =========================================================================================================
"""

from __future__ import annotations

import torch

from burnish.testing.calls import Violation
from burnish.testing.interpreter import interpreting
from burnish.testing.magnitude import Terms

FACTOR = 2.0
MAX_BIAS = 0.05
BIAS_ELEMENTS = 100_000
#: N1 pools draws of a case until it has this many elements, or this many draws; fewer where kernels are interpreted
POOL, DRAWS = (256, 8) if interpreting() else (1024, 32)
ACCUMULATOR = torch.float32


def roundoff(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


def smallest(dtype: torch.dtype) -> float:
    """The smallest subnormal."""
    info = torch.finfo(dtype)
    return float(info.smallest_normal) * info.eps


def ulp(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The spacing of ``dtype`` at float64 ``values``."""
    _, exponent = torch.frexp(values.abs())  # |v| = m 2^e with m in [0.5, 1)
    spacing = torch.ldexp(torch.full_like(values, torch.finfo(dtype).eps), exponent - 1)
    return spacing.clamp_min(smallest(dtype))


def _where(bad: torch.Tensor) -> str:
    return f"at {tuple(bad.nonzero()[0].tolist())}, {int(bad.sum())} of {bad.numel()} elements"


def _first(bad: torch.Tensor, values: torch.Tensor) -> float:
    return float(values[bad][0])


def check_finite(what: str, y: torch.Tensor, y64: torch.Tensor) -> torch.Tensor:
    """Raise unless y is infinite exactly where y64 overflows its dtype, and nowhere NaN; returns where it is finite."""
    check_mask(what, y, y64.to(y.dtype), "the float64 result, rounded")
    return y.isfinite()


def check_eager(what: str, y: torch.Tensor, y64: torch.Tensor, yt: torch.Tensor) -> None:
    """N1, on flat pooled tensors."""
    finite = check_finite(what, y, y64)
    y_, y64, yt = y[finite].double(), y64[finite], yt[finite].double()
    if not y_.numel():
        return
    limit = FACTOR * (yt - y64).abs().max() + ulp(y64, y.dtype) / 2
    error = (y_ - y64).abs()
    bad = ~(error <= limit)
    if bad.any():
        worst = int((error / limit).argmax())
        raise Violation(
            f"N1: {what} is off by {float(error[worst]):.3e}, eager torch's limit is {float(limit[worst]):.3e}: "
            f"{_where(bad)}"
        )


def check_bound(what: str, y: torch.Tensor, y64: torch.Tensor, terms: Terms) -> None:
    """N2."""
    finite = check_finite(what, y, y64)
    accumulated = (terms.longest + 2) * roundoff(ACCUMULATOR) * terms.magnitude
    rounding = FACTOR * (accumulated + roundoff(y.dtype) * (y64.abs() + terms.stored))
    bad = finite & ~((y.double() - y64).abs() <= rounding + smallest(y.dtype))
    if bad.any():
        raise Violation(
            f"N2: {what} is {_first(bad, y):.9e}, float64 gives {_first(bad, y64):.9e}, the bound is "
            f"{_first(bad, rounding):.3e} ({terms.longest} terms): {_where(bad)}"
        )


def unit_of(y: torch.Tensor, y64: torch.Tensor, terms: Terms) -> torch.Tensor:
    """What N3 counts errors in: the finest step that y could have been right to."""
    coarse = torch.maximum(roundoff(ACCUMULATOR) * terms.magnitude, roundoff(y.dtype) * terms.stored)
    return torch.maximum(ulp(y64, y.dtype), coarse)


def check_unbiased(what: str, y: torch.Tensor, y64: torch.Tensor, unit: torch.Tensor) -> None:
    """N3."""
    if y.numel() < BIAS_ELEMENTS:
        raise ValueError(f"N3 needs {BIAS_ELEMENTS} elements, {what} has {y.numel()}")
    finite = check_finite(what, y, y64)
    error = ((y.double() - y64) / unit)[finite]
    for direction, bias in (("upwards", error.mean()), ("away from zero", (error * y64[finite].sign()).mean())):
        if not abs(float(bias)) <= MAX_BIAS:
            raise Violation(f"N3: {what} leans {float(bias):+.3f} ulp {direction} in the mean, {MAX_BIAS} is allowed")


def check_equal(rule: str, what: str, y: torch.Tensor, expected: torch.Tensor) -> None:
    """C4, N4, N5 and every promise of equal bits: same dtype and shape, same values, NaN where NaN is expected."""
    if y.dtype != expected.dtype or y.shape != expected.shape:
        raise Violation(
            f"{rule}: {what} is {y.dtype} {tuple(y.shape)}, expected {expected.dtype} {tuple(expected.shape)}"
        )
    bad = ~((y == expected) | ((y != y) & (expected != expected)))
    if bad.any():
        raise Violation(
            f"{rule}: {what} is {_first(bad, y):.9g}, expected exactly {_first(bad, expected):.9g}: {_where(bad)}"
        )


def check_mask(what: str, y: torch.Tensor, expected: torch.Tensor, source: str) -> None:
    """N7: NaN, +Inf and -Inf in the same places."""
    for name, mask in (("NaN", torch.isnan), ("+Inf", torch.isposinf), ("-Inf", torch.isneginf)):
        bad = mask(y) != mask(expected)
        if bad.any():
            raise Violation(
                f"N7: {what} is {_first(bad, y):g} where {source} is {_first(bad, expected):g} ({name}): {_where(bad)}"
            )
