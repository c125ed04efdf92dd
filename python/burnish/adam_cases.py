"""The inputs of ``adam_step``: its cases, how their arguments are made, what they cost and what torch runs for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from burnish import moments, rounding
from burnish.checks import FLOATING
from burnish.ops.grad_norm import elements, shapes
from burnish.registry import Backend, Case, Cases, Cost, Invalid

FP32, BF16, FP16 = FLOATING
#: numbers that fp32 holds, as the kernel will: what is compared is its arithmetic
BETA1, BETA2, EPS = 1 - 13421773 / 2**27, 1 - 8389 / 2**23, 2.0**-26
LR, WEIGHT_DECAY, EMA_DECAY = 2.0**-10, 2.0**-6, 1 - 2.0**-7


def make(case: Case, backend: Backend, seed: int) -> tuple[Any, ...]:
    """Options: ``grad_dtype``, ``state`` and ``master`` (formats), ``stochastic``, ``amsgrad``, ``coupled``,
    ``maximize``, ``ema``, ``mask``, ``amp`` (scaled, clipped, with a found_inf of 0) and ``skip`` (of 1)."""
    options = case.options
    generator = torch.Generator().manual_seed(seed)
    sizes = shapes(case)

    def normal(spread: float) -> list[torch.Tensor]:
        return [torch.randn(shape, generator=generator) * spread for shape in sizes]

    def steps() -> torch.Tensor:
        return torch.randint(0, 50, (), generator=generator).float()

    state = options.get("state", "fp32")
    grads = [grad.to(options.get("grad_dtype", case.dtype)) for grad in normal(1.0)]
    params, masters = _parameters(normal(1.0), case)
    kinds = [normal(0.1), [one.square() for one in normal(0.5)]]
    if options.get("amsgrad"):
        kinds.append([one.square() for one in normal(0.5)])
    stored, scales = _stored(kinds, state)
    amp = bool(options.get("amp"))
    found = torch.tensor(1.0) if options.get("skip") else torch.tensor(0.0) if amp else None
    return (
        params,
        grads,
        [steps() for _ in sizes],
        *stored,
        *([] for _ in range(3 - len(stored))),
        scales,
        masters,
        normal(1.0) if options.get("ema") else [],
        [torch.rand(shape, generator=generator) < 0.7 for shape in sizes] if options.get("mask") else [],
        torch.tensor(LR),
        BETA1,
        BETA2,
        EPS,
        WEIGHT_DECAY,
        not options.get("coupled", False),
        bool(options.get("maximize")),
        EMA_DECAY if options.get("ema") else 0.0,
        0.5 if amp else 0.0,
        torch.tensor(2.0) if amp else None,
        torch.tensor(4.0) if amp else None,
        found,
        seed + 2**40 if options.get("stochastic") else None,
    )


def _parameters(values: list[torch.Tensor], case: Case) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The parameters, and their masters if the case has some."""
    master = case.options.get("master")
    if master == "split":
        halves = [rounding.split(value, case.dtype) for value in values]
        return [high for high, _ in halves], [low for _, low in halves]
    return [value.to(case.dtype) for value in values], values if master else []


def _stored(kinds: list[list[torch.Tensor]], state: str) -> tuple[list[list[torch.Tensor]], list[torch.Tensor]]:
    """The moments in a format, and the scales of codes."""
    if state != "int8":
        dtype = BF16 if state == "bf16" else FP32
        return [[moment.to(dtype) for moment in kind] for kind in kinds], []
    coded = [[moments.encode(moment.reshape(-1), k == 0) for moment in kind] for k, kind in enumerate(kinds)]
    stored = [
        [code.view(moment.shape) for (code, _), moment in zip(codes, kind, strict=True)]
        for codes, kind in zip(coded, kinds, strict=True)
    ]
    return stored, [torch.stack([scale for _, scale in item]) for item in zip(*coded, strict=True)]


def cost(case: Case) -> Cost:
    """Bytes of each element: parameter, moments and what belongs to them read and written, the gradient read."""
    options = case.options
    kinds = 3 if options.get("amsgrad") else 2
    state = {"bf16": 2.0, "int8": 1 + 4 / moments.BLOCK}.get(options.get("state", "fp32"), 4.0)
    master = {"split": 1, "fp32": 4}.get(options.get("master", ""), 0)
    held = case.dtype.itemsize + kinds * state + master + (4 if options.get("ema") else 0)
    read = options.get("grad_dtype", case.dtype).itemsize + (1 if options.get("mask") else 0)
    return Cost(ops=16.0 * elements(case), bytes=elements(case) * (2 * held + read), unit="fp32")


def baseline(*args: Any) -> Callable[[], None]:
    """torch's fused kernel on the same parameters, gradients and first two moments; where its dtypes or extras are not
    those of the case, on fp32 copies with fp32 moments."""
    params, grads, steps, firsts, seconds, greatest, scales, masters, _, _, lr, beta1, beta2, eps, decay, *rest = args
    decoupled, maximize = rest[:2]
    dtypes = {one.dtype for one in (*params, *grads, *firsts, *seconds)}
    if len(dtypes) > 1 or scales or masters:
        params, grads = ([one.float() for one in ones] for ones in (params, grads))
        firsts, seconds, greatest = ([torch.zeros_like(p) for p in params] for _ in range(3))
    fused = torch._fused_adamw_ if decoupled else torch._fused_adam_

    def run() -> None:
        torch._foreach_add_(steps, 1)
        fused(
            params,
            grads,
            firsts,
            seconds,
            greatest,
            steps,
            lr=lr if lr.dtype == torch.float32 else float(lr),
            beta1=beta1,
            beta2=beta2,
            weight_decay=decay,
            eps=eps,
            amsgrad=bool(greatest),
            maximize=maximize,
        )

    return run


_EDGES = (0, 1, 7, 33, 65, 255, 257, 1000)
_SOME = (7, 65, 1000)
#: what is stepped beside the plain case, by dtype of the parameters
_OPTIONS: tuple[tuple[torch.dtype, dict[str, Any]], ...] = (
    (FP32, {"grad_dtype": BF16}),
    (FP32, {"state": "bf16"}),
    (FP32, {"state": "int8"}),
    (FP32, {"amsgrad": True}),
    (FP32, {"coupled": True, "maximize": True}),
    (FP32, {"ema": True, "mask": True}),
    (FP32, {"amp": True}),
    (FP32, {"skip": True}),
    (FP32, {"state": "int8", "amsgrad": True, "coupled": True, "amp": True}),
    (BF16, {"stochastic": True}),
    (BF16, {"state": "bf16", "stochastic": True, "grad_dtype": FP32}),
    (BF16, {"state": "bf16"}),
    (BF16, {"master": "fp32", "ema": True, "mask": True}),
    (BF16, {"master": "split", "state": "int8"}),
    (BF16, {"master": "split", "mask": True}),
    (FP16, {"stochastic": True, "amp": True}),
    (FP16, {"master": "split", "amsgrad": True}),
    (FP16, {"master": "fp32", "grad_dtype": FP32}),
)


def _changed(index: int, change: Callable[[Any], Any]) -> Callable[..., tuple[Any, ...]]:
    return lambda *args: (*args[:index], change(args[index]), *args[index + 1 :])


def _first(change: Callable[[torch.Tensor], Any]) -> Callable[[list[torch.Tensor]], list[Any]]:
    return lambda tensors: [change(tensors[0]), *tensors[1:]]


def _second(change: Callable[[torch.Tensor], Any]) -> Callable[[list[torch.Tensor]], list[Any]]:
    return lambda tensors: [tensors[0], change(tensors[1]), *tensors[2:]]


_NAN = float("nan")
_INVALID = (
    Invalid("int32 parameter", _changed(0, _first(torch.Tensor.int)), r"params\[0\] is int32, expected"),
    Invalid(
        "missing gradient", _changed(1, lambda g: g[1:]), "grads has 2 tensors, expected 3, one for each of params"
    ),
    Invalid("int gradient", _changed(1, _second(torch.Tensor.int)), r"grads\[1\] is int32, expected"),
    Invalid("complex gradient", _changed(1, _second(lambda t: t + 0j)), r"grads\[1\] is complex64, expected"),
    Invalid(
        "gradient's shape", _changed(1, _second(lambda t: t.new_zeros(3))), r"grads\[1\] has shape \(3,\), expected"
    ),
    Invalid("bf16 step", _changed(2, _first(torch.Tensor.bfloat16)), r"steps\[0\] is bf16, expected fp32"),
    Invalid("long step", _changed(2, _first(lambda t: t.expand(2).clone())), r"steps\[0\] has shape .*one element"),
    Invalid(
        "fp16 moment", _changed(3, _first(torch.Tensor.half)), r"exp_avgs\[0\] is fp16, expected fp32, bf16 or int8"
    ),
    Invalid("moments differ", _changed(3, _second(torch.Tensor.bfloat16)), r"exp_avgs\[1\] is bf16, expected fp32 as"),
    Invalid(
        "mixed moments", _changed(4, _first(torch.Tensor.bfloat16)), r"exp_avg_sqs\[0\] is bf16, expected fp32, since"
    ),
    Invalid(
        "two maxima", lambda *a: (*a[:5], a[4][1:], *a[6:]), "max_exp_avg_sqs has 2 tensors, expected 3, .*or none"
    ),
    Invalid("needless scales", lambda *a: (*a[:6], a[2], *a[7:]), "scales has 3 tensors, expected 0, since"),
    Invalid(
        "split fp32", lambda *a: (*a[:7], [p.byte() for p in a[0]], *a[8:]), r"masters\[0\] is uint8, expected fp32"
    ),
    Invalid("fp16 masters", lambda *a: (*a[:7], [p.half() for p in a[0]], *a[8:]), r"masters\[0\] is fp16, expected"),
    Invalid("bf16 averages", lambda *a: (*a[:8], [p.bfloat16() for p in a[0]], *a[9:]), r"emas\[0\] is bf16, expected"),
    Invalid("float masks", lambda *a: (*a[:9], a[0], *a[10:]), r"masks\[0\] is fp32, expected bool"),
    Invalid("int lr", _changed(10, torch.Tensor.int), "lr is int32, expected fp32 or fp64"),
    Invalid("long lr", _changed(10, lambda t: t.expand(2).clone()), "lr has shape .*expected one element"),
    Invalid("beta1 of 1", _changed(11, lambda b: 1.0), r"beta1 is 1.*, expected a number in \[0, 1\)"),
    Invalid("beta2 below 0", _changed(12, lambda b: -0.5), r"beta2 is -0.5, expected a number in \[0, 1\)"),
    Invalid("NaN eps", _changed(13, lambda b: _NAN), "eps is nan, expected a finite number"),
    Invalid("negative decay", _changed(14, lambda b: -1.0), "weight_decay is -1.*, expected a finite number"),
    Invalid("ema_decay of 1", _changed(17, lambda b: 1.0), r"ema_decay is 1.*, expected a number in"),
    Invalid("no norm", _changed(18, lambda b: 1.0), "max_grad_norm is 1.*, but grad_norm is missing"),
    Invalid("int found_inf", _changed(21, lambda b: torch.tensor(1)), "found_inf is int64, expected fp32 or fp64"),
)

_TRANSFORMER = Case({"N": 768}, FP32, "transformer")

CASES = Cases(
    test=(
        # the first case is what bad calls are made of
        Case({"N": 65}, FP32),
        *(Case({"N": size}, dtype) for dtype in FLOATING for size in _EDGES if (dtype, size) != (FP32, 65)),
        *(Case({"N": size}, dtype, options=options) for dtype, options in _OPTIONS for size in _SOME),
        Case({"N": 120}, BF16, "many"),
    ),
    bench=(
        _TRANSFORMER,
        replace(_TRANSFORMER, options={"amp": True}),
        replace(_TRANSFORMER, dtype=BF16, options={"state": "bf16", "stochastic": True}),
        replace(_TRANSFORMER, options={"state": "int8"}),
        replace(_TRANSFORMER, dtype=BF16, options={"state": "int8"}),
        replace(_TRANSFORMER, dtype=BF16, options={"master": "split", "state": "int8"}),
        Case({"N": 64}, FP32, "thousand"),
    ),
    invalid=_INVALID,
)
