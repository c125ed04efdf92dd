"""What the optimizers' step ops share: schema, checks, and the reference, each round one formula of an element.

A step op steps a list of parameters, in one pass over memory, with all that belongs to them:

    t    = step + 1                                        each [], fp32; counted inside
    g    = grad * c                                        c = clip / grad_scale, negative to maximize
    p, m = element(p, g, m, t, lr, ...)                    the optimizer's formula; m its moments
    p, e = 0 where the mask is false                       e = e * ema_decay + p * (1 - ema_decay)

with clip = min(1, max_grad_norm / (grad_norm + 1e-6)), as ``clip_grad_norm_`` has it. Where ``found_inf`` is not 0, or
``grad_norm`` is not finite beside a ``found_inf``, nothing changes, not a bit.

===============  =====================================================================================
params           fp32, bf16, fp16, mixed; dense in any order of dimensions
grads            fp32, bf16, fp16, mixed; shape and strides of the parameters, as all below
steps            fp32, one element each
moments          a list a kind, some optional: all fp32 or all bf16; or codes, see :mod:`burnish.moments`:
                 int8 of kinds that may be negative, uint8 of the others
scales           fp32 [kinds of moments given, ceil(numel / 256)], of codes
masters          p itself: fp32, or uint8, the low bits of a 16-bit parameter, see :mod:`burnish.rounding`
emas, masks      fp32; bool
lr               fp32 or fp64, one element, as are grad_norm, grad_scale and found_inf
===============  =====================================================================================

The arithmetic is fp32 with one rounding an operation in the order written, the scalars' double. Results are rounded
once: to nearest even, or with a seed stochastically (parameters without a master, and bf16 moments), by random bits
that are a function of the seed, the parameter's place in the list and the element's. EMAs follow the unrounded
parameter. Deterministic; the same bits at every number of threads and instruction set. No gradient.

:mod:`burnish.step_cases` makes the inputs of tests and benchmarks.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from operator import attrgetter
from types import SimpleNamespace
from typing import Any

import torch

from burnish import dispatch, kept_lists, moments, native, rounding
from burnish.kept_lists import Kept
from burnish.registry import Case, Cases, Cost, Impl, OpSpec
from burnish.step_checks import FLAG, ROWS, check

Tensors = list[torch.Tensor]

_TYPES = {FLAG: FLAG, ROWS: "Tensor?"}
_is_cuda = attrgetter("is_cuda")


@dataclass(frozen=True)
class Moments:
    """A list of moments: its name, whether they may be negative, and the option of a case that brings it: None of one
    that is always there."""

    name: str
    signed: bool
    option: str | None = None

    @property
    def codes(self) -> torch.dtype:
        return torch.int8 if self.signed else torch.uint8


@dataclass(frozen=True)
class StepOp:
    """An optimizer's step.

    ``numbers`` are its own arguments by name, each with what it may be. ``element(p, g, moments, t, lr, *numbers)`` is
    its formula over whole tensors of fp32 or float64, with None for a list of moments that is not given; it returns
    the new p and moments. ``needs`` names numbers that, unless they are 0, need a list. ``whole`` says that the formula
    is of whole tensors: it then also gets ``mask``, a tensor or None. ``refuse(arguments)`` raises of what is its own.
    """

    name: str
    moments: tuple[Moments, ...]
    numbers: Mapping[str, str]
    element: Callable[..., tuple[torch.Tensor, list[torch.Tensor | None]]]
    needs: Mapping[str, str] = field(default_factory=dict)
    whole: bool = False
    refuse: Callable[[Any], None] | None = None

    @property
    def arguments(self) -> tuple[str, ...]:
        """The names of the schema's arguments."""
        lists = (
            "params",
            "grads",
            "steps",
            *(kind.name for kind in self.moments),
            "scales",
            "masters",
            "emas",
            "masks",
        )
        shared = ("maximize", "ema_decay", "max_grad_norm", "grad_norm", "grad_scale", "found_inf", "seed")
        return (*lists, "lr", *self.numbers, *shared)

    @property
    def schema(self) -> str:
        read = {"grads", "masks"}
        types = {"lr": "Tensor", "maximize": FLAG, "seed": "int?"}
        types |= {name: "Tensor?" for name in ("grad_norm", "grad_scale", "found_inf")}
        types |= {name: "float" for name in ("ema_decay", "max_grad_norm")}
        types |= {name: _TYPES.get(allowed, "float") for name, allowed in self.numbers.items()}
        letters, words = iter("abcdefghijklmnop"), []
        for name in self.arguments:
            words.append(
                f"{types.get(name) or (f'Tensor({next(letters)}!)[]' if name not in read else 'Tensor[]')} {name}"
            )
        return f"({', '.join(words)}) -> ()"

    def spec(
        self,
        cases: Cases,
        make: Callable[..., tuple[Any, ...]],
        cost: Callable[[Case], Cost],
        baseline: Callable[..., Callable[[], Any]] | None = None,
        impls: tuple[Impl, ...] = (),
    ) -> OpSpec:
        """The op's record."""
        return OpSpec(
            name=self.name,
            schema=self.schema,
            reference=self.function(self._reference),
            fake=self.function(partial(check, self)),
            autograd=None,
            impls=impls,
            cases=cases,
            make=make,
            cost=cost,
            baseline=baseline,
        )

    def given(self, args: tuple[Any, ...]) -> Any:
        """The arguments by name."""
        return SimpleNamespace(**dict(zip(self.arguments, args, strict=True)))

    def lists(self, given: Any) -> dict[Moments, Tensors]:
        """The lists of moments that are given."""
        return {kind: getattr(given, kind.name) for kind in self.moments if getattr(given, kind.name)}

    def function(self, body: Callable[[Any], Any]) -> Callable[..., Any]:
        """``body`` as a function of the schema's arguments."""

        def function(*args: Any) -> Any:
            return body(self.given(args))

        ordinary = inspect.Parameter.POSITIONAL_OR_KEYWORD
        signature = inspect.Signature([inspect.Parameter(name, ordinary) for name in self.arguments])
        function.__signature__ = signature  # type: ignore[attr-defined]
        function.__module__ = f"burnish.ops.{self.name}"
        return function

    def _reference(self, given: Any) -> None:
        norm = 0.0 if given.grad_norm is None else float(given.grad_norm)
        if given.found_inf is not None and (float(given.found_inf) != 0 or not math.isfinite(norm)):
            return
        factor, lists = gradient_factor(given, norm), self.lists(given)
        numbers = [getattr(given, name) for name in self.numbers]
        masks = given.masks or [None] * len(given.params)
        for i, param in enumerate(given.params):
            given.steps[i].copy_(given.steps[i] + 1)
            master = given.masters[i] if given.masters else None
            scales = given.scales[i] if given.scales else [None] * len(lists)
            p = _value(param, master)
            read = {kind: _moment(stored[i], scales[k]) for k, (kind, stored) in enumerate(lists.items())}
            held = [read.get(kind) for kind in self.moments]
            g = given.grads[i].to(p.dtype) * factor
            own = [number[i] if isinstance(number, torch.Tensor) else number for number in numbers]
            mask = {"mask": masks[i]} if self.whole else {}
            p, held = self.element(p, g, held, float(given.steps[i]), float(given.lr), *own, **mask)
            if given.masks:
                p = torch.where(given.masks[i], p, 0.0)
            if given.emas:
                e = given.emas[i] * given.ema_decay + p * (1 - given.ema_decay)
                given.emas[i].copy_(torch.where(given.masks[i], e, 0.0) if given.masks else e)
            made = dict(zip(self.moments, held, strict=True))
            for k, (kind, stored) in enumerate(lists.items()):
                value = made[kind]
                assert value is not None
                _store_moment(stored[i], scales[k], value, kind.signed, given.seed, i, 2 + k)
            _store(param, master, p, given.seed, i)


def native_impl(op: str) -> Impl:
    """The implementation in CUDA C++ of an op whose first argument is a list of tensors."""
    return Impl("native", f"torch.ops:burnish.{op}.native", f"{__name__}:supports_native", checks=True)


def triton_impl(op: str) -> Impl:
    """The implementation in Triton of an op of the optimizers."""
    module = f"burnish.kernels.optim.{op}"
    return Impl("triton", f"{module}:{op}", f"{module}:supports")


def gpu_impls(op: str) -> tuple[Impl, ...]:
    """The implementations in CUDA C++ and in Triton of a step op."""
    return replace(native_impl(op), yields=f"{__name__}:rounds_at_random"), triton_impl(op)


def rounds_at_random(*args: Any) -> bool:
    """Whether the step has a seed, its last argument: on an H200 Triton's kernel took 0.56 of the time of the one in
    CUDA C++, which then drew the generator's words three times."""
    return args[-1] is not None


def supports_native(tensors: Tensors, *_: Any) -> str | None:
    """Why the kernels in CUDA C++ cannot run on these tensors; None if they can."""
    if native.emulating():
        return None
    if all(map(_is_cuda, tensors)):
        return None
    return next(f"the tensors are on {tensor.device}, expected CUDA" for tensor in tensors if not tensor.is_cuda)


def caller(spec: OpSpec) -> Callable[..., None]:
    """The op as a function of its positional arguments, any sequences as lists; tells autograd that params changed.

    Where a kernel for a GPU makes its own checks it is called here: a way through the op's Python kernel would make
    tensors of Python out of thousands, twice.
    """
    arguments = spec.overload()._schema.arguments
    lists = sum(str(argument.type) == "List[Tensor]" for argument in arguments)  # the first of them
    entry, kept_entry = spec.entry, kept_lists.overload(spec)

    def call(*args: Any) -> None:
        columns = [arg if isinstance(arg, list) else list(arg) for arg in args[:lists]]
        params, own = columns[0], (*columns, *args[lists:])
        kept = [arg.number if type(arg) is Kept else 0 for arg in columns]
        if dispatch.overrides:
            dispatch.call(spec, own, needs_grad=False)
        elif kept_entry and any(kept) and params[0].is_cpu:
            kept_entry(*[[] if type(arg) is Kept else arg for arg in columns], *args[lists:], kept)
        else:
            on_gpu = params and params[0].is_cuda
            ((on_gpu and dispatch.unchecked(spec, own)) or entry)(*own)
        torch.autograd.graph.increment_version(params)  # params alone: state is in no graph, and has as many tensors

    return call


def divided(numerator: float, denominator: float) -> float:
    """IEEE division of Python's floats."""
    return float(torch.tensor(numerator, dtype=torch.float64) / denominator)


def power(base: float, exponent: float) -> float:
    """IEEE power of Python's floats."""
    if math.isnan(exponent):
        return exponent
    return math.inf if exponent < 0 and base == 0 else base**exponent


def gradient_factor(given: Any, norm: float) -> float:
    """What the gradients are multiplied by."""
    factor = -1.0 if given.maximize else 1.0
    if given.grad_scale is not None:
        factor = divided(factor, float(given.grad_scale))
    if given.max_grad_norm > 0:
        clip = given.max_grad_norm / (norm + 1e-6)
        factor *= 1.0 if clip > 1 else clip
    return factor


def _value(param: torch.Tensor, master: torch.Tensor | None) -> torch.Tensor:
    if master is None:
        return param if param.dtype == torch.float64 else param.to(torch.float32)
    return rounding.join(param, master) if master.dtype == torch.uint8 else master


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    """The elements of a dense tensor, as they lie in memory."""
    return tensor.view(-1) if tensor.is_contiguous() else tensor.as_strided((tensor.numel(),), (1,))


def _like(flat: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """Elements that lie in memory as ``tensor``'s do, in its shape."""
    return flat.view(tensor.shape) if tensor.is_contiguous() else flat.as_strided(tensor.shape, tensor.stride())


def _moment(stored: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    if scale is not None:
        return _like(moments.decode(_flat(stored), scale), stored)
    return stored if stored.dtype == torch.float64 else stored.to(torch.float32)


def _random(value: torch.Tensor, like: torch.Tensor, seed: int, index: int, stream: int) -> torch.Tensor:
    random = rounding.random_bits(seed, index, stream, value.numel(), value.device)
    return rounding.round_random(value, like.dtype, _like(random, like))


def _store_moment(
    stored: torch.Tensor,
    scale: torch.Tensor | None,
    value: torch.Tensor,
    signed: bool,
    seed: int | None,
    index: int,
    stream: int,
) -> None:
    if scale is not None:
        codes, scales = moments.encode(_flat(value), signed)
        _flat(stored).copy_(codes)
        scale.copy_(scales)
    elif seed is not None and stored.dtype == torch.bfloat16:
        stored.copy_(_random(value, stored, seed, index, stream))
    else:
        stored.copy_(value)


def _store(param: torch.Tensor, master: torch.Tensor | None, value: torch.Tensor, seed: int | None, index: int) -> None:
    if master is not None and master.dtype == torch.uint8:
        high, low = rounding.split(value, param.dtype)
        param.copy_(high)
        master.copy_(low)
        return
    if master is not None:
        master.copy_(value)
    elif seed is not None and param.dtype in (torch.bfloat16, torch.float16):
        value = _random(value, param, seed, index, 1)
    param.copy_(value)
