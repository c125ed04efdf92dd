"""How the kernels of :mod:`burnish.kernels.common.steps` are launched: what the host makes of a step op's arguments."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from burnish.kernels.common import lists, target
from burnish.kernels.common.lists import TYPES, Launch, Table
from burnish.kernels.common.moments import STATE_BLOCK
from burnish.kernels.common.steps import Format
from burnish.kernels.common.variants import Variant
from burnish.step_checks import ROWS as TENSOR

if TYPE_CHECKING:
    from burnish.step_op import StepOp

#: rows of coefficients that no optimizer passes
MOST = 24
#: blocks of 256 a program, its warps, and tensors a program of the scalars: 8 elements a thread, one call of Philox
ROWS, WARPS, ITEMS = 4, 4, 128
#: a thread of the steps: 512 threads of a multiprocessor keep enough of its memory's bandwidth asked for
REGISTERS = 128

_FP32, _BF16, _FP16, _INT8 = tl.float32, tl.bfloat16, tl.float16, tl.int8
_POINTERS = {"table_ptr": "*i64", "coefficients_ptr": "*fp32", "items": "i32"}
_device = attrgetter("device")


@dataclass(frozen=True)
class Call:
    """A step that is to be launched: the op's arguments by name, and what of them lies on the device."""

    given: Any
    table: Table
    numbers: torch.Tensor
    coefficients: torch.Tensor
    base: Format

    def format(self, one: Launch) -> Format:
        parameter, gradient = one.types
        return replace(self.base, parameter=parameter, gradient=gradient, aligned=one.aligned)


def log2(base: float) -> float:
    """What :func:`burnish.kernels.common.steps.power` takes."""
    return math.log2(base) if base else -math.inf


def objection(op: StepOp, args: tuple[Any, ...]) -> str | None:
    """Why the kernels cannot run these arguments of a step op, in words."""
    given = op.given(args)
    if not given.params:
        return None
    device = given.params[0].device
    for name in ("params", "steps", "scales"):
        strange = next((one for one in map(_device, getattr(given, name)) if one != device), None)
        if strange is not None:
            return f"{name} has a tensor on {strange}, expected {device}, where params[0] is"
    own = (name for name, allowed in op.numbers.items() if allowed == TENSOR)
    for name in ("lr", "grad_norm", "grad_scale", "found_inf", *own):
        scalar = getattr(given, name)
        if scalar is not None and scalar.device != device:
            return f"{name} is on {scalar.device}, expected {device}, where params[0] is"
    return target.objection(given.params[0])


def launch(
    kernels: tuple[Any, Any], op: StepOp, given: Any, own: tuple[float, ...], joins: float = 0.0, option: bool = False
) -> None:
    """Step everything, by the op's kernels around ``make_coefficients`` and ``step_blocks``; the rest as
    :func:`prepare` has it."""
    if not given.params:
        return
    scalars_kernel, step_kernel = kernels
    with target.on_device(given.params[0]):
        call = prepare(op, given, own, joins, option)
        make_scalars(scalars_kernel, call)
        step_elements(step_kernel, call)


def prepare(
    op: StepOp, given: Any, own: tuple[float, ...], joins: float = 0.0, option: bool = False, chunk: int | None = None
) -> Call:
    """What the kernels of a step read.

    Args:
        given: the op's arguments by name; there are parameters.
        own: its own numbers.
        joins: the weight decay that joins the gradient.
        option: see :class:`Format`.
        chunk: see :func:`burnish.kernels.common.lists.table`.
    """
    device, kinds = given.params[0].device, op.lists(given)
    table = lists.table(
        ROWS * STATE_BLOCK.value,
        (given.params, given.grads),
        (given.steps, given.scales),
        (given.masters, given.emas, given.masks, *kinds.values()),
        chunk,
    )
    common = (given.max_grad_norm, -1.0 if given.maximize else 1.0, joins, given.ema_decay)
    base = Format(
        _FP32,
        _FP32,
        TYPES[next(iter(kinds.values()))[0].dtype] if kinds else _FP32,
        tuple(kind.signed for kind in kinds),
        "" if not given.masters else "split" if given.masters[0].dtype == torch.uint8 else "fp32",
        average=bool(given.emas),
        masked=bool(given.masks),
        random=given.seed is not None,
        coupled=joins != 0,
        option=option,
    )
    numbers = lists.numbers((*common, *own), device)
    return Call(given, table, numbers, torch.empty(MOST * table.items, dtype=torch.float32, device=device), base)


def make_scalars(scalars_kernel: Any, call: Call, **own: Any) -> None:
    """Launch an op's kernel that writes the coefficients, with the arguments that it alone has."""
    given, items = call.given, call.table.items
    scalars = (given.grad_norm, given.grad_scale, given.found_inf)
    scalars_kernel[(triton.cdiv(items, ITEMS),)](
        *(call.table.rows, call.numbers, call.coefficients, items, given.lr),
        *(given.lr if one is None else one for one in scalars),
        *(one is not None for one in scalars),
        **own,
        BLOCK=ITEMS,
        num_warps=WARPS,
        enable_fp_fusion=False,
    )


def step_elements(step_kernel: Any, call: Call) -> None:
    """Launch an op's kernel that steps the elements."""
    table = call.table
    for one in filter(attrgetter("blocks"), table.launches):
        step_kernel[(one.blocks,)](
            *(table.rows, call.coefficients, table.items, one.first, one.count, call.given.seed or 0),
            FORMAT=call.format(one),
            BLOCKS=ROWS,
            num_warps=WARPS,
            enable_fp_fusion=False,
            **target.registers(REGISTERS),
        )


def variants(
    kernels: tuple[Any, Any], kinds: Iterable[tuple[tuple[bool, ...], bool]], every: bool = False
) -> Iterator[Variant]:
    """What the gates compile of an op in :func:`formats`."""
    scalars_kernel, step_kernel = kernels
    yield from scalar_variants(scalars_kernel)
    yield from element_variants(step_kernel, formats(kinds, every), {"seed": "i64"})


def formats(
    kinds: Iterable[tuple[tuple[bool, ...], bool]], every: bool = False, coupled: bool = True
) -> dict[str, Format]:
    """Each set of an op's moments (``signed``, ``option``) in fp32, and the first in other formats; with ``every``, for
    one op, all formats and additions, which no optimizer's element has a part in."""
    plain = [Format(_FP32, _FP32, _FP32, signed, option=option) for signed, option in kinds]
    base = replace(plain[0], coupled=coupled)
    half = replace(base, parameter=_BF16, gradient=_BF16)
    found = {f"fp32-{number}": one for number, one in enumerate(plain)}
    found["bf16-random"] = replace(half, gradient=_FP32, moments=_BF16, random=True)
    found["bf16-split-int8"] = replace(half, moments=_INT8, master="split")
    if every:
        found["ragged"] = replace(base, aligned=False)
        found["bf16-ragged"] = replace(half, moments=_BF16, random=True, aligned=False)
        found["bf16-master"] = replace(half, master="fp32", average=True, masked=True)
        found["fp16-random"] = replace(base, parameter=_FP16, gradient=_FP16, random=True)
        found["fp16-split"] = replace(found["fp16-random"], random=False, master="split", average=True, masked=True)
    return found


def scalar_variants(scalars_kernel: Any, *own: str) -> Iterator[Variant]:
    """Of the kernel that writes the coefficients; ``own`` are fp64 tensors that it alone has."""
    types = _POINTERS | {"numbers_ptr": "*fp64", "lr_ptr": "*fp64", "norm_ptr": "*fp32", "scale_ptr": "*fp32"}
    types |= {"found_ptr": "*fp32"} | {f"{name}_ptr": "*fp64" for name in own}
    for label, given in (("scaled", True), ("plain", False)):
        flags = {f"HAS_{name.upper()}": given for name in ("norm", "scale", "found", *own)}
        yield Variant(label, scalars_kernel, types, {**flags, "BLOCK": ITEMS}, WARPS)


def element_variants(
    kernel: Any, chosen: Mapping[str, Format], types: Mapping[str, str], **constants: Any
) -> Iterator[Variant]:
    """Of a kernel over the elements, with the arguments that it alone has."""
    types = {**_POINTERS, "first": "i32", "count": "i32", **types}
    for label, one in chosen.items():
        narrow = not one.aligned and one.parameter != _FP32
        fixed = {"FORMAT": one, "BLOCKS": ROWS, **constants}
        yield Variant(label, kernel, types, fixed, WARPS, narrow=narrow, registers=REGISTERS)
