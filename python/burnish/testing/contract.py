"""Checks of an op's dealings with PyTorch: torch.library.opcheck, torch.compile, fake tensors, and bad arguments."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from burnish.arguments import Args, map_tensors, places, put
from burnish.registry import Backend, Case, Invalid, OpSpec
from burnish.testing import numerics
from burnish.testing.calls import Violation, as_outputs, objection, on_copies, resized, rows, run, to_device, volume
from burnish.testing.layouts import LAYOUTS
from burnish.testing.values import strided_arguments

#: the row counts of the compile check; 0 and 1 are specialised by torch.compile and would each recompile
BATCHES = (2, 3, 5, 8, 13, 16, 17, 31, 33, 64)
MAX_RECOMPILES = 1


@cache
def input_sets(spec: OpSpec, backend: Backend, dtype: torch.dtype) -> dict[str, tuple[Case, str, bool]]:
    """What opcheck is given for a dtype, of what the backend takes: (case, layout of the first strided tensor,
    gradients wanted) by name; empty where it takes no case of that dtype."""
    cases = [case for case in spec.cases.test if case.dtype == dtype and case.values == "normal"]
    cases = [case for case in cases if objection(spec, backend, spec.make(case, backend, 0)) is None]
    if not cases:
        return {}
    solid = [case for case in cases if min(case.dims.values()) > 1] or cases
    solid = sorted(solid, key=lambda case: max(case.dims.values()))
    small, middle = solid[0], solid[len(solid) // 2]
    sets = {
        "contiguous": (middle, "contiguous", False),
        "transposed": (middle, "transposed", False),
        "sliced": (middle, "sliced", False),
        "every_second": (middle, "every_second", False),
        "offset3": (middle, "offset3", False),
        "odd": (small, "contiguous", False),
        "one_row": (resized(middle, 1), "contiguous", False),
        "empty": (next((case for case in cases if volume(case) == 0), small), "contiguous", False),
    }
    if spec.autograd:
        sets["grad"] = (middle, "contiguous", True)
        sets["grad_transposed"] = (small, "transposed", True)
        sets["grad_one_row"] = (resized(middle, 1), "offset1", True)
    return sets


def opcheck(spec: OpSpec, backend: Backend, dtype: torch.dtype, name: str) -> None:
    """C1: torch.library.opcheck of every overload, with no list of known failures."""
    case, layout, grad = input_sets(spec, backend, dtype)[name]
    args = spec.make(case, backend, 0)
    free = strided_arguments(spec, args)
    if free:
        args = put(args, free[0], LAYOUTS[layout](places(args)[free[0]]))
    if grad:
        for place in free:
            tensor = places(args)[place]
            if tensor.is_floating_point():
                args = put(args, place, tensor.detach().requires_grad_())
    overloads = [spec.overload()] if grad or spec.entry is spec.overload() else [spec.entry, spec.overload()]
    for overload in overloads:
        torch.library.opcheck(overload, to_device(backend, args))


def compiled(spec: OpSpec, backend: Backend, case: Case, compiler: str, grad: bool) -> None:
    """C7: one graph, the bits of eager and, for an op with a batch M, at most one recompile over ten sizes of it."""
    torch._dynamo.reset()
    graphs = 0
    inner = torch._dynamo.lookup_backend(compiler)

    def counting(graph: Any, inputs: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return inner(graph, inputs)

    overload = spec.overload() if grad else spec.entry

    def function(*args: Any) -> Any:
        return overload(*args)

    fast = torch.compile(function, backend=counting, fullgraph=True, dynamic=True)
    pair = [on_copies(spec, one) for one in (fast, function)]
    try:
        for batch in BATCHES if "M" in case.dims else BATCHES[::2]:
            args = to_device(backend, spec.make(resized(case, batch), backend, batch))
            for index, (y, wanted) in enumerate(zip(*(_pull(one, args, grad) for one in pair), strict=True)):
                numerics.check_equal("C7", f"compiled {spec.stem}[{index}] of {batch} rows", y.cpu(), wanted.cpu())
    finally:
        torch._dynamo.reset()
    if "M" in case.dims and graphs > 1 + MAX_RECOMPILES:
        raise Violation(f"C7: {spec.name} was compiled {graphs} times for {len(BATCHES)} row counts")


def _pull(function: Callable[..., Any], args: Args, grad: bool) -> list[torch.Tensor]:
    """The results, and with ``grad`` the gradient of the first argument after them."""
    if not grad:
        return list(as_outputs(function(*args)))
    first = args[0].detach().requires_grad_()
    outputs = as_outputs(function(first, *args[1:]))
    (pulled,) = torch.autograd.grad(outputs[0].float().square().sum(), first)
    return [*(y.detach() for y in outputs), pulled]


def _raises(what: str, match: str, call: Callable[[], Any]) -> None:
    try:
        call()
    except (RuntimeError, ValueError, TypeError) as error:
        if not re.match(match, str(error)):
            raise Violation(f"{what}: expected a message that begins like {match!r}, got: {error}") from error
        return
    raise Violation(f"{what} raised nothing")


def invalid(spec: OpSpec, backend: Backend, bad: Invalid) -> None:
    """A bad call raises the message of the record, eagerly, on meta tensors and while tracing."""
    args = bad.change(*spec.make(spec.cases.test[0], backend, 0))
    what, match = f"{spec.name}, {bad.label}", f"{spec.stem}: {bad.match}"
    _raises(what, match, lambda: run(spec, backend, args))
    overloads = {spec.overload(), spec.entry}
    for overload in overloads:
        _raises(f"{what}, meta", match, lambda o=overload: o(*map_tensors(lambda t: t.to("meta"), args)))  # type: ignore[misc]
        with FakeTensorMode() as mode:
            traced = map_tensors(mode.from_tensor, args)
            _raises(f"{what}, fake", match, lambda o=overload, t=traced: o(*t))  # type: ignore[misc]
    if backend == "cpu":
        for overload in overloads:
            _raises(f"{what}, {overload}", match, lambda o=overload: o(*args))  # type: ignore[misc]


def dtypes(spec: OpSpec) -> list[torch.dtype]:
    return sorted({case.dtype for case in spec.cases.test}, key=str)


def compile_case(spec: OpSpec, backend: Backend, dtype: torch.dtype) -> Case:
    """A case of a dtype with at least two rows."""
    sets = input_sets(spec, backend, dtype).values()
    return next(case for case, layout, _ in sets if layout == "sliced" and rows(case))
