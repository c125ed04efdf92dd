"""The inputs of the step ops: the cases that all have, how arguments are made, what they cost, what is refused.

A case's options: ``grad_dtype``, ``state`` and ``master`` (formats), ``stochastic``, ``maximize``, ``ema``, ``mask``,
``amp`` (scaled, clipped, with a found_inf of 0), ``skip`` (of 1), ``first`` (no step done so far), and those of the op.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from burnish import moments, rounding
from burnish.checks import FLOATING
from burnish.ops.grad_norm import elements, shapes
from burnish.registry import Backend, Case, Cases, Cost, Invalid, dtype_name
from burnish.step_checks import FINITE, FRACTION, NOT_NEGATIVE
from burnish.step_op import Moments, StepOp

FP32, BF16, FP16 = FLOATING
#: numbers that fp32 holds, as the kernel will: what is compared is its arithmetic
LR, WEIGHT_DECAY, EMA_DECAY = 2.0**-10, 2.0**-6, 1 - 2.0**-7

Options = Mapping[str, Any]
#: what an op is tested with beside what all are, by dtype of the parameters
Own = tuple[tuple[torch.dtype, Options], ...]


def maker(op: StepOp, numbers: Callable[[Case], tuple[Any, ...]]) -> Callable[[Case, Backend, int], tuple[Any, ...]]:
    """How the arguments of a case are made; ``numbers`` gives the op's own."""

    def make(case: Case, backend: Backend, seed: int) -> tuple[Any, ...]:
        options = case.options
        generator = torch.Generator().manual_seed(seed)
        sizes = shapes(case)

        def normal(spread: float) -> list[torch.Tensor]:
            return [torch.randn(shape, generator=generator) * spread for shape in sizes]

        def step() -> torch.Tensor:
            done = torch.randint(0, 50, (), generator=generator).float()
            return torch.zeros(()) if options.get("first") else done

        grads = [grad.to(options.get("grad_dtype", case.dtype)) for grad in normal(1.0)]
        params, masters = _parameters(normal(1.0), case)
        kinds = {
            kind: normal(0.1) if kind.signed else [one.square() for one in normal(0.5)] for kind in present(op, case)
        }
        stored, scales = _stored(kinds, options.get("state", "fp32"))
        amp = bool(options.get("amp"))
        found = torch.tensor(1.0) if options.get("skip") else torch.tensor(0.0) if amp else None
        return (
            params,
            grads,
            [step() for _ in sizes],
            *(stored.get(kind, []) for kind in op.moments),
            scales,
            masters,
            normal(1.0) if options.get("ema") else [],
            [torch.rand(shape, generator=generator) < 0.7 for shape in sizes] if options.get("mask") else [],
            torch.tensor(LR),
            *numbers(case),
            bool(options.get("maximize")),
            EMA_DECAY if options.get("ema") else 0.0,
            0.5 if amp else 0.0,
            torch.tensor(2.0) if amp else None,
            torch.tensor(4.0) if amp else None,
            found,
            seed + 2**40 if options.get("stochastic") else None,
        )

    return make


def present(op: StepOp, case: Case) -> list[Moments]:
    """The moments that a case has."""
    return [kind for kind in op.moments if kind.option is None or case.options.get(kind.option)]


def _parameters(values: list[torch.Tensor], case: Case) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The parameters, and their masters if the case has some."""
    master = case.options.get("master")
    if master == "split":
        halves = [rounding.split(value, case.dtype) for value in values]
        return [high for high, _ in halves], [low for _, low in halves]
    return [value.to(case.dtype) for value in values], values if master else []


def _stored(
    kinds: dict[Moments, list[torch.Tensor]], state: str
) -> tuple[dict[Moments, list[torch.Tensor]], list[torch.Tensor]]:
    """The moments in a format, and the scales of codes."""
    if state != "int8":
        dtype = BF16 if state == "bf16" else FP32
        return {kind: [one.to(dtype) for one in values] for kind, values in kinds.items()}, []
    coded = {kind: [moments.encode(one.reshape(-1), kind.signed) for one in values] for kind, values in kinds.items()}
    stored = {
        kind: [code.view(one.shape) for (code, _), one in zip(codes, kinds[kind], strict=True)]
        for kind, codes in coded.items()
    }
    return stored, [torch.stack([scale for _, scale in item]) for item in zip(*coded.values(), strict=True)]


def coster(op: StepOp, ops: float) -> Callable[[Case], Cost]:
    """Bytes of each element: parameter, moments and what belongs to them read and written, the gradient read. ``ops``
    is the arithmetic of an element."""

    def cost(case: Case) -> Cost:
        options = case.options
        state = {"bf16": 2.0, "int8": 1 + 4 / moments.BLOCK}.get(options.get("state", "fp32"), 4.0)
        master = {"split": 1, "fp32": 4}.get(options.get("master", ""), 0)
        held = case.dtype.itemsize + len(present(op, case)) * state + master + (4 if options.get("ema") else 0)
        read = options.get("grad_dtype", case.dtype).itemsize + (1 if options.get("mask") else 0)
        return Cost(ops=ops * elements(case), bytes=elements(case) * (2 * held + read), unit="fp32")

    return cost


def as_torch(op: StepOp, args: tuple[Any, ...]) -> Any:
    """The arguments by name for torch's fused kernel, ``lr`` a number or an fp32 tensor; where its dtypes or extras are
    not those of the case, fp32 copies of parameters and gradients, with fp32 moments."""
    given = op.given(args)
    lists = op.lists(given)
    dtypes = {one.dtype for tensors in (given.params, given.grads, *lists.values()) for one in tensors}
    if len(dtypes) > 1 or given.scales or given.masters:
        given.params, given.grads = ([one.float() for one in ones] for ones in (given.params, given.grads))
        for kind in lists:
            setattr(given, kind.name, [torch.zeros_like(param) for param in given.params])
    given.lr = given.lr if given.lr.dtype == torch.float32 else float(given.lr)
    return given


_EDGES = (0, 1, 7, 33, 65, 255, 257, 1000)
_SOME = (7, 65, 1000)
#: what every op is tested with beside the plain case, by dtype of the parameters
_OPTIONS: tuple[tuple[torch.dtype, dict[str, Any]], ...] = (
    (FP32, {"grad_dtype": BF16}),
    (FP32, {"state": "bf16"}),
    (FP32, {"state": "int8"}),
    (FP32, {"first": True}),
    (FP32, {"ema": True, "mask": True}),
    (FP32, {"amp": True}),
    (FP32, {"skip": True}),
    (BF16, {"stochastic": True}),
    (BF16, {"state": "bf16", "stochastic": True, "grad_dtype": FP32}),
    (BF16, {"state": "bf16"}),
    (BF16, {"master": "fp32", "ema": True, "mask": True}),
    (BF16, {"master": "split", "state": "int8"}),
    (BF16, {"master": "split", "mask": True}),
    (FP16, {"stochastic": True, "amp": True}),
    (FP16, {"master": "fp32", "grad_dtype": FP32}),
)
_TRANSFORMER = Case({"N": 768}, FP32, "transformer")
_BENCH = (
    _TRANSFORMER,
    replace(_TRANSFORMER, options={"amp": True}),
    replace(_TRANSFORMER, dtype=BF16, options={"state": "bf16", "stochastic": True}),
    replace(_TRANSFORMER, options={"state": "int8"}),
    replace(_TRANSFORMER, dtype=BF16, options={"state": "int8"}),
    replace(_TRANSFORMER, dtype=BF16, options={"master": "split", "state": "int8"}),
    Case({"N": 64}, FP32, "thousand"),
)


def cases(
    op: StepOp,
    own: Own,
    base: Options | None = None,
    refused: tuple[Invalid, ...] = (),
) -> Cases:
    """The cases that every op has, with the options ``base``, those of the op's ``own``, without, and what is refused
    of the arguments that all have, and ``refused`` of its own."""
    base = base or {}
    common = [(dtype, {**base, **options}) for dtype, options in _OPTIONS]
    return Cases(
        test=(
            # the first case is what bad calls are made of
            Case({"N": 65}, FP32, options=base),
            *(
                Case({"N": size}, dtype, options=base)
                for dtype in FLOATING
                for size in _EDGES
                if (dtype, size) != (FP32, 65)
            ),
            *(Case({"N": size}, dtype, options=options) for dtype, options in (*common, *own) for size in _SOME),
            Case({"N": 120}, BF16, "many", base),
        ),
        bench=tuple(replace(case, options={**base, **case.options}) for case in _BENCH),
        invalid=(*_invalid(op), *refused),
    )


def changed(op: StepOp, name: str, change: Callable[[Any], Any]) -> Callable[..., tuple[Any, ...]]:
    """Arguments with another ``name``."""
    index = op.arguments.index(name)
    return lambda *args: (*args[:index], change(args[index]), *args[index + 1 :])


def _item(index: int, change: Callable[[torch.Tensor], Any]) -> Callable[[list[torch.Tensor]], list[Any]]:
    return lambda tensors: [change(tensor) if i == index else tensor for i, tensor in enumerate(tensors)]


def _of_params(op: StepOp, name: str, change: Callable[[torch.Tensor], Any]) -> Callable[..., tuple[Any, ...]]:
    """Arguments with a list ``name`` that is made of the parameters."""
    return lambda *args: changed(op, name, lambda _: [change(param) for param in args[0]])(*args)


def _invalid(op: StepOp) -> tuple[Invalid, ...]:
    def bad(label: str, name: str, change: Callable[[Any], Any], match: str) -> Invalid:
        return Invalid(label, changed(op, name, change), match)

    def made(label: str, name: str, change: Callable[[torch.Tensor], Any], match: str) -> Invalid:
        return Invalid(label, _of_params(op, name, change), match)

    return (
        bad("int32 parameter", "params", _item(0, torch.Tensor.int), r"params\[0\] is int32, expected"),
        bad("missing gradient", "grads", lambda g: g[1:], "grads has 2 tensors, expected 3, one for each of params"),
        bad("int gradient", "grads", _item(1, torch.Tensor.int), r"grads\[1\] is int32, expected"),
        bad("complex gradient", "grads", _item(1, lambda t: t + 0j), r"grads\[1\] is complex64, expected"),
        bad("gradient's shape", "grads", _item(1, lambda t: t.new_zeros(3)), r"grads\[1\] has shape \(3,\), expected"),
        bad("bf16 step", "steps", _item(0, torch.Tensor.bfloat16), r"steps\[0\] is bf16, expected fp32"),
        bad("long step", "steps", _item(0, lambda t: t.expand(2).clone()), r"steps\[0\] has shape .*one element"),
        *_invalid_moments(op),
        made("split fp32", "masters", torch.Tensor.byte, r"masters\[0\] is uint8, expected fp32"),
        made("fp16 masters", "masters", torch.Tensor.half, r"masters\[0\] is fp16, expected"),
        made("bf16 averages", "emas", torch.Tensor.bfloat16, r"emas\[0\] is bf16, expected"),
        made("float masks", "masks", torch.Tensor.float, r"masks\[0\] is fp32, expected bool"),
        bad("int lr", "lr", torch.Tensor.int, "lr is int32, expected fp32 or fp64"),
        bad("long lr", "lr", lambda t: t.expand(2).clone(), "lr has shape .*expected one element"),
        *(
            one
            for name, allowed in {**op.numbers, "ema_decay": FRACTION}.items()
            for one in _invalid_number(op, name, allowed)
        ),
        bad("no norm", "max_grad_norm", lambda _: 1.0, "max_grad_norm is 1.*, but grad_norm is missing"),
        bad("int found_inf", "found_inf", lambda _: torch.tensor(1), "found_inf is int64, expected fp32 or fp64"),
    )


def _invalid_moments(op: StepOp) -> Iterator[Invalid]:
    first, *others = (kind.name for kind in op.moments)
    codes = dtype_name(op.moments[0].codes)
    yield Invalid(
        "fp16 moment",
        changed(op, first, _item(0, torch.Tensor.half)),
        rf"{first}\[0\] is fp16, expected fp32, bf16 or {codes}",
    )
    yield Invalid(
        "moments differ",
        changed(op, first, _item(1, torch.Tensor.bfloat16)),
        rf"{first}\[1\] is bf16, expected fp32 as the others",
    )
    for name in others:
        yield Invalid(
            f"bf16 {name}",
            _of_params(op, name, torch.Tensor.bfloat16),
            rf"{name}\[0\] is bf16, expected fp32, since {first} are fp32",
        )
    for kind in op.moments:
        yield Invalid(
            f"fewer {kind.name}",
            lambda *args, kind=kind: changed(op, kind.name, lambda _: args[0][1:])(*args),
            f"{kind.name} has 2 tensors, expected 3, one for each of params{', or none' if kind.option else ''}",
        )
    yield Invalid(
        "needless scales",
        lambda *args: changed(op, "scales", lambda _: args[2])(*args),
        "scales has 3 tensors, expected 0, since",
    )
    for number, needed in op.needs.items():
        yield Invalid(f"no {needed}", changed(op, needed, lambda _: []), f"{number} is .*, but {needed} is missing")


def _invalid_number(op: StepOp, name: str, allowed: str) -> Iterator[Invalid]:
    refused = {FRACTION: (1.0, -0.5), NOT_NEGATIVE: (math.nan, -1.0), FINITE: (math.nan, math.inf)}
    for value in refused.get(allowed, ()):
        match = rf"{name} is {value:g}.*, expected {re.escape(allowed)}"
        yield Invalid(f"{name} of {value:g}", changed(op, name, partial(_constant, value)), match)


def _constant(value: float, _: Any) -> float:
    return value
