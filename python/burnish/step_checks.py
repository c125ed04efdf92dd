"""What a step op takes, and the sentence where it does not; csrc/step_arguments.cpp says the same.

:func:`check` is the fake of every op of :mod:`burnish.step_op`: it looks at dtypes, shapes, strides, devices, lengths
and numbers, never at values of tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch

from burnish.checks import check_devices, check_floating, check_scalar
from burnish.moments import BLOCK
from burnish.registry import dtype_name

if TYPE_CHECKING:
    from burnish.step_op import StepOp

#: what a number of an op may be
FRACTION, NOT_NEGATIVE, FINITE = "a number in [0, 1)", "a finite number, at least 0", "a finite number"
FLAG = "bool"
#: not a number: a tensor with a row for each parameter, or None
ROWS = "a tensor or None"
_ALLOWED: dict[str, Callable[[float], bool]] = {
    FRACTION: lambda number: number >= 0 and number < 1,
    NOT_NEGATIVE: lambda number: number >= 0 and number < math.inf,
    FINITE: math.isfinite,
}


def check(op: StepOp, given: Any) -> None:
    """Raise RuntimeError where an argument is not what :mod:`burnish.step_op` says."""
    _check_lengths(op, given)
    ranges = {**op.numbers, "ema_decay": FRACTION, "max_grad_norm": NOT_NEGATIVE}
    for name, expected in ranges.items():
        number = getattr(given, name)
        torch._check(
            expected in (FLAG, ROWS) or _ALLOWED[expected](number),
            lambda name=name, number=number, expected=expected: f"{op.name}: {name} is {number}, expected {expected}",
        )
    for name, needed in {**op.needs, "max_grad_norm": "grad_norm"}.items():
        number, there = getattr(given, name), getattr(given, needed)
        torch._check(
            number == 0 or (there is not None and (there != [] or not given.params)),
            lambda name=name, number=number, needed=needed: f"{op.name}: {name} is {number}, but {needed} is missing",
        )
    scalars = {name: getattr(given, name) for name in ("lr", "grad_norm", "grad_scale", "found_inf")}
    check_scalar(op.name, **scalars)
    if given.params:
        _check_formats(op, given)
    alike = ("grads", *(kind.name for kind in op.moments), "masters", "emas", "masks")
    for index, param in enumerate(given.params):
        _check_param(op, index, param)
        check_floating(op.name, **{f"grads[{index}]": given.grads[index]})
        for name in alike:
            if getattr(given, name):
                _check_alike(op, f"{name}[{index}]", getattr(given, name)[index], index, param)
        check_scalar(op.name, **{f"steps[{index}]": given.steps[index]})
        _check_dtype(op, "steps", index, given.steps, (torch.float32,))
        if given.scales:
            _check_scales(op, index, given.scales, (len(op.lists(given)), -(-param.numel() // BLOCK)))
    if op.refuse is not None:
        op.refuse(given)


def _check_lengths(op: StepOp, given: Any) -> None:
    optional = {kind.name for kind in op.moments if kind.option} | {"scales", "masters", "emas", "masks"}
    for name in op.arguments[1 : op.arguments.index("lr")]:
        tensors = getattr(given, name)
        torch._check(
            len(tensors) == len(given.params) or (name in optional and not tensors),
            lambda name=name, tensors=tensors: (
                f"{op.name}: {name} has {len(tensors)} tensors, expected {len(given.params)}, "
                "one for each of params" + (", or none" if name in optional else "")
            ),
        )


def _check_dtype(
    op: StepOp, name: str, index: int, tensors: list[torch.Tensor], allowed: tuple[torch.dtype, ...], why: str = ""
) -> None:
    words = [dtype_name(dtype) for dtype in allowed]
    expected = " or ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
    torch._check(
        tensors[index].dtype in allowed,
        lambda: f"{op.name}: {name}[{index}] is {dtype_name(tensors[index].dtype)}, expected {expected}{why}",
    )


def _check_formats(op: StepOp, given: Any) -> None:
    """One dtype for all moments, and for all masters; scales if the moments are codes."""
    lists = op.lists(given)
    first = next(iter(lists), None)
    dtype = lists[first][0].dtype if first else torch.float32
    since = f", since {first.name} are {dtype_name(dtype)}" if first else ", since there are no moments"
    coded = first is not None and dtype == first.codes
    for index in range(len(given.params)):
        for kind, tensors in lists.items():
            if kind is first:
                _check_dtype(op, kind.name, index, tensors, (torch.float32, torch.bfloat16, kind.codes))
                _check_dtype(op, kind.name, index, tensors, (dtype,), " as the others are")
            else:
                _check_dtype(op, kind.name, index, tensors, (kind.codes if coded else dtype,), since)
        if given.masters:
            _check_dtype(op, "masters", index, given.masters, (torch.float32, torch.uint8))
            _check_dtype(op, "masters", index, given.masters, (given.masters[0].dtype,), " as the others are")
            if given.params[index].dtype == torch.float32:
                why = f", since params[{index}] is fp32"
                _check_dtype(op, "masters", index, given.masters, (torch.float32,), why)
        if given.emas:
            _check_dtype(op, "emas", index, given.emas, (torch.float32,))
        if given.masks:
            _check_dtype(op, "masks", index, given.masks, (torch.bool,))
    expected = len(given.params) if coded else 0
    torch._check(
        len(given.scales) == expected,
        lambda: f"{op.name}: scales has {len(given.scales)} tensors, expected {expected}{since}",
    )


def _check_param(op: StepOp, index: int, param: torch.Tensor) -> None:
    check_floating(op.name, **{f"params[{index}]": param})
    if param.is_contiguous():
        return
    laid = sorted((stride, size) for size, stride in zip(param.shape, param.stride(), strict=True) if size != 1)
    gapless = laid[0][0] == 1 and all(wide == narrow * size for (narrow, size), (wide, _) in pairwise(laid))
    torch._check(
        gapless,
        lambda: (
            f"{op.name}: params[{index}] has gaps or overlaps in memory, "
            "expected it contiguous, in any order of dimensions"
        ),
    )


def _check_alike(op: StepOp, name: str, tensor: torch.Tensor, index: int, param: torch.Tensor) -> None:
    check_devices(op.name, param, **{name: tensor})
    torch._check(
        tensor.shape == param.shape,
        lambda: (
            f"{op.name}: {name} has shape {tuple(tensor.shape)}, expected {tuple(param.shape)}, that of params[{index}]"
        ),
    )
    pairs = zip(param.shape, param.stride(), tensor.stride(), strict=True)
    torch._check(
        param.numel() == 0 or all(size <= 1 or wanted == given for size, wanted, given in pairs),
        lambda: (
            f"{op.name}: {name} has other strides than params[{index}], expected both contiguous or in the same order"
        ),
    )


def _check_scales(op: StepOp, index: int, scales: list[torch.Tensor], shape: tuple[int, int]) -> None:
    torch._check(
        scales[index].dtype == torch.float32 and scales[index].is_contiguous(),
        lambda: f"{op.name}: scales[{index}] is {dtype_name(scales[index].dtype)}, expected fp32, contiguous",
    )
    torch._check(
        tuple(scales[index].shape) == shape,
        lambda: f"{op.name}: scales[{index}] has shape {tuple(scales[index].shape)}, expected {shape}",
    )
