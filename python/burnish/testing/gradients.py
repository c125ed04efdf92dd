"""Checks of an op's gradients against its record's surrogate.

The surrogate is what the op promises to differentiate like. A quantiser inside it rounds, which has no derivative; the
promise is the straight-through one, rounding as the identity. :class:`Smooth` makes that literal: under it a surrogate
neither rounds nor narrows, so that finite differences see the function whose derivative is promised.
"""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode

from burnish import dispatch
from burnish.arguments import Args
from burnish.registry import Autograd, Backend, Case, OpSpec
from burnish.testing import numerics
from burnish.testing.calls import Outputs, Violation, as_outputs, kinds, resized, rows, run, widen

#: about how many elements of an argument :func:`gradcheck` moves, evenly spread; :func:`gradient` compares all of them
MOVED = 4096


class Smooth(TorchFunctionMode):
    """Rounding and narrowing of float64 tensors do nothing."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in ("round", "round_", "to", "float") and args[0].dtype == torch.float64:
            return args[0]
        return func(*args, **(kwargs or {}))


def _autograd(spec: OpSpec) -> Autograd:
    if spec.autograd is None:
        raise ValueError(f"{spec.name} has no gradients")
    return spec.autograd


def _leaves(args: Args) -> tuple[Args, list[int]]:
    """The arguments with fresh leaves for the floating tensors, and where these are."""
    fresh = tuple(
        arg.detach().clone().requires_grad_() if isinstance(arg, torch.Tensor) and arg.is_floating_point() else arg
        for arg in args
    )
    return fresh, [i for i, arg in enumerate(fresh) if isinstance(arg, torch.Tensor) and arg.requires_grad]


def _cotangents(outputs: Outputs, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(y.shape, generator=generator).to(y.device, y.dtype) for y in outputs]


def _pulled(outputs: Outputs, args: Args, places: list[int], weights: list[torch.Tensor]) -> list[torch.Tensor | None]:
    weights = [weight.to(y.dtype) for weight, y in zip(weights, outputs, strict=True)]
    return list(torch.autograd.grad(outputs, [args[i] for i in places], weights, allow_unused=True))


def gradient(spec: OpSpec, backend: Backend, case: Case) -> None:
    """N1 of every gradient, against the surrogate's in float64 and in the inputs' own dtypes."""
    promise = _autograd(spec).surrogate
    pooled: dict[int, list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]] = {}
    for seed in range(numerics.DRAWS):
        plain = spec.make(case, backend, seed)
        args, places = _leaves(plain)
        with dispatch.use_backend(backend):
            outputs = run(spec, backend, args, grad=True)
            weights = _cotangents(outputs, seed)
            grads = _pulled(outputs, args, places, weights)
        eager_args, _ = _leaves(plain)
        eager_grads = _pulled(as_outputs(promise(*eager_args)), eager_args, places, [w.cpu() for w in weights])
        wide_args, _ = _leaves(widen(plain))
        wide_grads = _pulled(as_outputs(promise(*wide_args)), wide_args, places, [w.cpu() for w in weights])
        for place, y, yt, y64 in zip(places, grads, eager_grads, wide_grads, strict=True):
            _check_presence(spec, place, y, y64)
            if y is None or yt is None or y64 is None:
                continue
            if (y.dtype, y.shape) != (plain[place].dtype, plain[place].shape):
                raise Violation(f"{spec.name}: the gradient of argument {place} is {y.dtype} {tuple(y.shape)}")
            pooled.setdefault(place, []).append((y.cpu().ravel(), y64.ravel(), yt.ravel()))
        if all(sum(draw[0].numel() for draw in draws) >= numerics.POOL for draws in pooled.values()) or not rows(case):
            break
    for place, draws in pooled.items():
        what = f"{spec.stem}'s gradient of argument {place}"
        numerics.check_eager(what, *(torch.cat([draw[i] for draw in draws]) for i in range(3)))


def _check_presence(spec: OpSpec, place: int, grad: torch.Tensor | None, promised: torch.Tensor | None) -> None:
    if (grad is None) != (promised is None):
        came, expected = ("none" if g is None else "one" for g in (grad, promised))
        raise Violation(f"{spec.name}: argument {place} has gradient {came}, the surrogate promises {expected}")


def gradcheck(spec: OpSpec, case: Case) -> None:
    """C2: the record's setup_context and backward, in float64, against finite differences of the smooth surrogate."""
    args, places = _leaves(widen(spec.make(resized(case, min(rows(case), 2)), "cpu", 0)))
    formula = _autograd(spec)

    class Glue(torch.autograd.Function):
        @staticmethod
        def forward(*inputs: Any) -> Any:
            with Smooth():
                return formula.surrogate(*inputs)

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            formula.setup_context(ctx, inputs, output)

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            with Smooth():
                return formula.backward(ctx, *grads)

    outputs = as_outputs(formula.surrogate(*args))
    probe = _pulled(outputs, args, places, _cotangents(outputs, 0))
    promised = [place for place, grad in zip(places, probe, strict=True) if grad is not None]

    # an odd step, which meets every row and column of a block of 2**n elements
    moved = [torch.arange(0, args[place].numel(), args[place].numel() // MOVED | 1) for place in promised]

    def function(*parts: torch.Tensor) -> Any:
        inputs = list(args)
        for place, chosen, part in zip(promised, moved, parts, strict=True):
            inputs[place] = args[place].detach().flatten().index_put((chosen,), part).view_as(args[place])
        frozen = [i for i in places if i not in promised]
        for place in frozen:
            inputs[place] = inputs[place].detach()
        return Glue.apply(*inputs)  # type: ignore[no-untyped-call]

    # the backward op's reference runs in float64, which its fake refuses to users
    unchecked = mock.patch.object(dispatch, "_run", lambda op, *a: op.reference(*a))
    with unchecked, dispatch.use_backend("reference"):
        parts = [args[place].detach().flatten()[chosen] for place, chosen in zip(promised, moved, strict=True)]
        torch.autograd.gradcheck(function, [part.requires_grad_() for part in parts], eps=1e-6, atol=1e-6, rtol=1e-4)


def double_backward(spec: OpSpec, backend: Backend, case: Case) -> None:
    """C2: a second derivative equals the surrogate's, or asking for it raises an error that names the op."""
    plain = spec.make(case, backend, 0)
    args, places = _leaves(plain)
    try:
        with dispatch.use_backend(backend):
            second = _second(run(spec, backend, args, grad=True), args, places[0])
    except RuntimeError as error:
        if spec.stem not in str(error):
            raise Violation(f"C2: the double backward of {spec.name} raises without naming it: {error}") from error
        return
    wide, _ = _leaves(widen(plain))
    promised = _second(as_outputs(_autograd(spec).surrogate(*wide)), wide, places[0])
    torch.testing.assert_close(second.cpu().double(), promised, rtol=1e-2, atol=1e-3)


def _second(outputs: Outputs, args: Args, place: int) -> torch.Tensor:
    (first,) = torch.autograd.grad(outputs[0].square().sum(), args[place], create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), args[place])
    return second


def gradcheck_cases(spec: OpSpec) -> list[Case]:
    """The smallest solid case of each kind of options, whatever its dtype."""
    chosen: dict[str, Case] = {}
    for (_, options), cases in kinds(spec).items():
        solid = [case for case in cases if min(case.dims.values()) > 1]
        if solid:
            chosen.setdefault(str(options), solid[0])
    return list(chosen.values())
