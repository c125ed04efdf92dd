"""Property tests: hypothesis draws dimensions, dtypes, options, values and strides from what the cases span."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from burnish.arguments import Args, Place, places, put
from burnish.registry import Backend, Case, OpSpec
from burnish.testing.calls import Outputs, objection
from burnish.testing.interpreter import interpreting
from burnish.testing.layouts import LAYOUTS
from burnish.testing.values import compare, run_checked, strided_arguments

#: rule C3: the examples of an ordinary run and of a long one
EXAMPLES, LONG_EXAMPLES = 500, 20_000
#: dimensions are drawn up to here, a little beyond two tiles of 64; interpreted kernels get less
LARGEST, INTERPRETED_LARGEST = 140, 40


def fuzz(
    spec: OpSpec,
    backend: Backend,
    examples: int = EXAMPLES,
    judge: Callable[[OpSpec, Args, Outputs, str], object] = compare,
) -> int:
    """Run the op on ``examples`` drawn inputs, by N2, N4 or C4 or what else ``judge`` makes of the results; returns how
    many ran.

    The draws are the same in every run. What the backend declines, in words, is drawn again.

    Raises:
        ImportError: hypothesis is not installed.
        Violation: with the smallest failing example.
    """
    from hypothesis import HealthCheck, assume, given, settings
    from hypothesis import strategies as st

    ran = 0
    cases = spec.cases.test
    dims = list(cases[0].dims)
    largest = INTERPRETED_LARGEST if interpreting() else LARGEST
    sizes = {name: _sizes(cases, name, largest, st) for name in dims}
    kinds = st.sampled_from(_unique([(c.dtype, c.values, c.options) for c in cases]))
    # one layout an argument, used where the argument of the drawn kind may have any strides
    layouts = st.tuples(*(st.sampled_from(sorted(LAYOUTS)) for _ in spec.make(cases[0], backend, 0)))

    @settings(
        max_examples=examples, derandomize=True, database=None, deadline=None, suppress_health_check=tuple(HealthCheck)
    )
    @given(st.fixed_dictionaries(sizes), kinds, layouts, st.integers(0, 2**16))
    def example(size: dict[str, int], kind: Any, chosen: tuple[str, ...], seed: int) -> None:
        nonlocal ran
        dtype, values, options = kind
        case = Case(size, dtype, values, options)
        args = spec.make(case, backend, seed)
        assume(objection(spec, backend, args) is None)
        args = _laid_out(args, strided_arguments(spec, args), chosen)
        judge(spec, args, run_checked(spec, backend, args), values)
        ran += 1

    example()
    return ran


def _laid_out(args: Args, free: list[Place], chosen: tuple[str, ...]) -> Args:
    for place in free:
        args = put(args, place, LAYOUTS[chosen[sum(place) % len(chosen)]](places(args)[place]))
    return args


def _unique(kinds: list[Any]) -> list[Any]:
    return [kind for i, kind in enumerate(kinds) if kind not in kinds[:i]]


def _sizes(cases: tuple[Case, ...], name: str, largest: int, st: Any) -> Any:
    """The sizes of one dimension: the record's own and their neighbours, and anything up to ``largest``."""
    smallest = min(case.dims[name] for case in cases)
    edges = {size + step for case in cases for size in (case.dims[name],) for step in (-1, 0, 1)}
    edges = {size for size in edges if smallest <= size <= largest}
    return st.one_of(st.sampled_from(sorted(edges)), st.integers(smallest, largest))
