"""Checks of an op's values: forward, bias of the error, special values, layouts, memory, determinism, huge indices."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from burnish.arguments import Args, Place, map_tensors, places, put
from burnish.registry import Backend, Case, OpSpec
from burnish.testing import memory, numerics
from burnish.testing.calls import (
    Outputs,
    Violation,
    announced,
    eager,
    is_exact,
    kinds,
    objection,
    on_copies,
    oracle,
    resized,
    rows,
    run,
    runs_on_gpu,
    stand_in,
    to_device,
    volume,
    widen,
)
from burnish.testing.interpreter import interpreting
from burnish.testing.layouts import LAYOUTS
from burnish.testing.magnitude import magnitudes

#: a stride of 2**28 elements puts row 9 beyond element 2**31
HUGE_STRIDE, HUGE_ROWS = 2**28, 10
#: places that a special value is put in, per input: of a plain case, of a case with options, of an interpreted one
SPECIAL_POSITIONS, OPTION_POSITIONS, INTERPRETED_POSITIONS = 100, 16, 2
#: a size that no block of a kernel holds, and that none divides; the same for kernels that take multiples of 8; for an
#: interpreted product, of which each program takes milliseconds and no block is longer than 512
LONG, LONG_ALIGNED, LONG_INTERPRETED = 20011, 20008, 1031
#: elements of which every thread gets a share
SHARED = 2**18
#: the largest product of a case's dimensions that an interpreted kernel is given, a long case apart
INTERPRETED_VOLUME = 600_000


def _names(spec: OpSpec, outputs: Outputs) -> list[str]:
    return [spec.stem if len(outputs) == 1 else f"{spec.stem}[{index}]" for index in range(len(outputs))]


def run_checked(spec: OpSpec, backend: Backend, args: Args, draw: int = 0) -> Outputs:
    """Run the op; raise if it changed an input or is not what its fake announces. The results come on the CPU."""
    args = to_device(backend, args)
    before = memory.snapshot(args)
    outputs = run(spec, backend, args, draw=draw)
    if not memory.unchanged(before, args):
        raise Violation(f"C5: {spec.name} changed one of its inputs")
    for what, y, fake in zip(_names(spec, outputs), outputs, announced(spec, args), strict=True):
        for word in ("shape", "dtype", "stride"):
            real, promised = getattr(y, word), getattr(fake, word)
            real, promised = (real(), promised()) if word == "stride" else (real, promised)
            if real != promised and not (word == "stride" and y.numel() == 0):
                raise Violation(f"C1: {what} has {word} {real}, its fake announces {promised}")
    return tuple(y.cpu() for y in outputs)


def compare(spec: OpSpec, args: Args, outputs: Outputs, values: str) -> Outputs:
    """N2, or where the op or the values are exact N4, C4, N5, against the references on the same arguments; returns
    what was expected."""
    exact = is_exact(outputs)
    if exact or values == "extreme":
        rule, yts = "N4" if exact else "N5", eager(spec, args)
        for what, y, expected in zip(_names(spec, outputs), outputs, yts, strict=True):
            numerics.check_equal(rule, what, y, expected)
        return yts
    y64s, terms = magnitudes(on_copies(spec, spec.reference), args)
    for what, y, y64, of in zip(_names(spec, outputs), outputs, y64s, terms, strict=True):
        if values == "integers" and y.dtype not in of.inexact:
            numerics.check_equal("C4", what, y, y64.to(y.dtype))
        else:
            numerics.check_bound(what, y, y64, of)
    return y64s


def forward(spec: OpSpec, backend: Backend, case: Case) -> None:
    """Fake equals real, inputs unchanged, and N1 and N2, or N4, C4, N5."""
    pooled: list[list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]] = []
    for seed in range(numerics.DRAWS):
        args = spec.make(case, backend, seed)
        outputs = run_checked(spec, backend, args, seed)
        y64s = compare(spec, args, outputs, case.values)
        if is_exact(outputs) or case.values in ("integers", "extreme"):
            return
        triples = zip(outputs, y64s, eager(spec, args), strict=True)
        pooled.append([(y.ravel(), y64.double().ravel(), yt.ravel()) for y, y64, yt in triples])  # one entry an output
        if all(sum(draw[i][0].numel() for draw in pooled) >= numerics.POOL for i in range(len(outputs))):
            break
        if not any(y.numel() for y in outputs):
            break
    for index, what in enumerate(_names(spec, outputs)):
        numerics.check_eager(what, *(torch.cat([draw[index][i] for draw in pooled]) for i in range(3)))


def grows(spec: OpSpec, backend: Backend, case: Case) -> bool:
    """Whether more rows make more results, which the mean error of N3 is taken over; those of a reduction stay few."""
    sizes = [
        sum(y.numel() for y in announced(spec, spec.make(resized(case, count), backend, 0)))
        for count in (rows(case), 2 * rows(case))
    ]
    return sizes[0] < sizes[1]


def unbiased(spec: OpSpec, backend: Backend, case: Case) -> None:
    """N3, with the case's rows made many enough, or as many as the backend takes and drawn again and again."""
    narrow = announced(spec, spec.make(case, backend, 0))
    times = math.ceil(numerics.BIAS_ELEMENTS / max(y.numel() for y in narrow))
    taller = times
    while taller > 1 and objection(spec, backend, spec.make(resized(case, taller * rows(case)), backend, 0)):
        taller //= 2
    case, times = resized(case, taller * rows(case)), math.ceil(times / taller)
    pooled: list[list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]] = [[] for _ in narrow]
    for seed in range(times):
        args = spec.make(case, backend, seed)
        outputs = run_checked(spec, backend, args, seed)
        for pool, y, y64, terms in zip(
            pooled, outputs, *magnitudes(on_copies(spec, spec.reference), args), strict=True
        ):
            pool.append((y.ravel(), y64.ravel(), numerics.unit_of(y, y64, terms).ravel()))
    for what, pool in zip(_names(spec, narrow), pooled, strict=True):
        y, y64, unit = (torch.cat(parts) for parts in zip(*pool, strict=True))
        if y.numel() >= numerics.BIAS_ELEMENTS and y.is_floating_point():
            numerics.check_unbiased(what, y, y64, unit)


def special_cases(spec: OpSpec) -> Iterator[tuple[Case, int]]:
    """Of each kind a small case of few rows, and in how many places of each input it gets special values."""
    for cases in kinds(spec).values():
        small = next((case for case in cases if min(case.dims.values()) > 1), None)
        if small is not None and small.dtype.is_floating_point:
            positions = OPTION_POSITIONS if small.options else SPECIAL_POSITIONS
            yield resized(small, min(rows(small), 3)), INTERPRETED_POSITIONS if stand_in() else positions


def special_inputs(clean: Args, positions: int) -> Iterator[tuple[Place, str, Args]]:
    """``clean`` with a NaN, infinity, negative zero or subnormal in at most ``positions`` places of each floating
    input: where, what in words, and the arguments. Of a list it is the first tensor's where a kernel is interpreted."""
    floating = {place: tensor for place, tensor in places(clean).items() if tensor.is_floating_point()}
    if interpreting():
        floating = {place: tensor for place, tensor in floating.items() if place[1:] in ((), (0,))}
    for place, tensor in floating.items():
        size = tensor.numel()
        some = min(size, positions)
        for at in sorted({round(i * (size - 1) / max(some - 1, 1)) for i in range(some)}):
            for value in _specials(tensor.dtype):
                changed = tensor.clone()
                changed.view(-1)[at] = value
                yield place, f"{value} at element {at} of argument {_words(place)}", put(clean, place, changed)


def special(spec: OpSpec, backend: Backend, case: Case, positions: int) -> None:
    """N7: what special values make of a result."""
    clean = spec.make(case, backend, 0)
    first = next(place for place, tensor in places(clean).items() if tensor.is_floating_point())
    for draw, (place, what, args) in enumerate(special_inputs(clean, positions)):
        ordinary = place == first and not case.options
        _check_special(spec, backend, args, f"{spec.stem} with {what}", draw, against_torch=ordinary)


def _specials(dtype: torch.dtype) -> tuple[float, ...]:
    return (math.nan, math.inf, -math.inf, -0.0, float(torch.finfo(dtype).smallest_normal) / 2)


def _check_special(spec: OpSpec, backend: Backend, args: Args, what: str, draw: int, against_torch: bool) -> None:
    """Masks are float64's: torch's erf gelu makes NaN of +Inf in fp32 and bf16, and Inf in float64 and fp16."""
    outputs = run_checked(spec, backend, args, draw)
    if is_exact(outputs):
        for y, expected in zip(outputs, eager(spec, args), strict=True):
            numerics.check_equal("N4", what, y, expected)
        return
    for y, y64 in zip(outputs, oracle(spec, args), strict=True):
        numerics.check_mask(what, y, y64.to(y.dtype), "the reference")
    if against_torch and spec.baseline is not None:
        torchs = on_copies(spec, lambda *own: spec.baseline(*own)())(*widen(args))  # type: ignore[misc]
        for y, torch_own in zip(outputs, torchs, strict=True):
            if torch_own is not None and torch_own.shape == y.shape:
                numerics.check_mask(what, y, torch_own.to(y.dtype), "torch's own path")


def _words(place: Place) -> str:
    return "[".join(map(str, place)) + "]" * (len(place) - 1)


def strided_arguments(spec: OpSpec, args: Args) -> list[Place]:
    """The tensors, scalars aside, that may have any strides: those of which the fake does not ask contiguity. Of a list
    it is asked about the first."""
    free: dict[int, bool] = {}
    tensors = {place: tensor for place, tensor in places(args).items() if tensor.dim() > 0}
    for place, tensor in tensors.items():
        if place[0] not in free:
            gapped = LAYOUTS["every_second"](tensor if tensor.numel() > 1 else tensor.new_zeros(3, 4))
            free[place[0]] = _takes(spec, put(args, place, gapped))
    return [place for place in tensors if free[place[0]]]


def _takes(spec: OpSpec, args: Args) -> bool:
    """Whether the fake asks for no contiguity that ``args`` lack."""
    try:
        spec.fake(*args)
    except RuntimeError as error:
        return "contiguous" not in str(error)
    return True


def layout(spec: OpSpec, backend: Backend, case: Case, name: str) -> None:
    """The result has the same bits whatever the strides of an argument, and nothing is read beyond its last element."""
    original = spec.make(case, backend, 0)
    free = strided_arguments(spec, original)
    if not free:
        return
    moved = original
    for place in free:
        moved = put(moved, place, LAYOUTS[name](places(original)[place]))
    plain = map_tensors(lambda t: t.clone(memory_format=torch.contiguous_format), moved)
    expected = tuple(y.cpu() for y in run(spec, backend, plain))
    outputs = run_checked(spec, backend, map_tensors(memory.guarded, moved) if backend == "cpu" else moved)
    for what, y, wanted in zip(_names(spec, outputs), outputs, expected, strict=True):
        numerics.check_equal("layout", f"{what} of {name} inputs", y, wanted)


def batched(spec: OpSpec, backend: Backend, case: Case) -> None:
    """Leading dimensions [M, ..] -> [1, M, 1, ..] only reshape the result, where the op takes them."""
    args = spec.make(case, backend, 0)
    deep = map_tensors(lambda t: t[None, :, None] if t.dim() == 2 and t.is_floating_point() else t, args)
    try:
        spec.fake(*deep)
    except RuntimeError:
        return
    expected = run(spec, backend, args)
    for what, y, wanted in zip(_names(spec, expected), run_checked(spec, backend, deep), expected, strict=True):
        numerics.check_equal("layout", f"{what} of batched inputs", y.reshape(wanted.shape), wanted.cpu())


def guard(spec: OpSpec, backend: Backend, case: Case) -> None:
    """C5: inputs read-only between guard pages, results poisoned and before one; the bits stay the same.

    An emulated kernel had these values in :func:`forward`: every schedule is for memory that may be aligned otherwise.
    """
    args = spec.make(case, backend, 0)
    expected = run(spec, backend, args, draw=1)
    results: list[Outputs] = []
    with memory.poisoned():
        if expected[0].device.type == "cpu":  # where a write to an input faults, and need not be looked for
            for side in ("end", "start"):
                inputs = map_tensors(partial(memory.guarded, side=side), args)
                copy = partial(memory.guarded, side=side, writable=True)
                results.append(run(spec, backend, inputs, draw=0 if side == "end" else 2, copy=copy))
        else:
            results.append(run_checked(spec, backend, args))
    if backend == "cpu":
        with memory.GuardedOutputs(spec.namespace) as outputs_guard:
            results.append(run(spec, backend, args))
        outputs_guard.check()
        returned = expected[: len(spec.overload()._schema.returns)]
        if outputs_guard.allocated == 0 and any(y.numel() for y in returned):
            raise Violation(f"C5: {spec.name} allocated nothing through torch, so its results were not guarded")
    for outputs in results:
        for what, y, wanted in zip(_names(spec, expected), outputs, expected, strict=True):
            numerics.check_equal("C5", f"{what} of guarded inputs", y.cpu(), wanted.cpu())


def deterministic(spec: OpSpec, backend: Backend, case: Case) -> None:
    """Two runs give the same bits, and so do one and two threads, of which a stand-in for a GPU has none."""
    args = spec.make(case, backend, 0)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2) if stand_in() else (1, 2, 2, 1):
            torch.set_num_threads(count)
            results.append(run(spec, backend, args))
    finally:
        torch.set_num_threads(threads)
    for outputs in results[1:]:
        for what, y, first in zip(_names(spec, outputs), outputs, results[0], strict=True):
            numerics.check_equal("determinism", f"{what}, run again", y.cpu(), first.cpu())


def small_cases(spec: OpSpec, backend: Backend) -> list[Case]:
    """Of the first kind of each dtype that the backend takes, the smallest case that is not empty and of no single row
    or column."""
    chosen: dict[torch.dtype, Case] = {}
    for (dtype, _), cases in kinds(spec).items():
        solid = [case for case in cases if min(case.dims.values()) > 1]
        if solid and dtype not in chosen and objection(spec, backend, spec.make(solid[0], backend, 0)) is None:
            chosen[dtype] = solid[0]
    return list(chosen.values())


def long_cases(spec: OpSpec, backend: Backend) -> Iterator[Case]:
    """Small cases with each dimension in turn long: the loops over blocks that small sizes never enter."""
    for case in small_cases(spec, backend):
        for name in case.dims:
            odd, aligned, short = (
                Case({**case.dims, name: size}, case.dtype, case.values, case.options)
                for size in (LONG, LONG_ALIGNED, LONG_INTERPRETED)
            )
            if interpreting() and volume(odd) > INTERPRETED_VOLUME:
                yield short
            else:
                yield aligned if long_objection(spec, backend, odd) else odd


def long_objection(spec: OpSpec, backend: Backend, case: Case) -> str | None:
    """Why the op, which may have a limit, or the backend declines a long case."""
    args = spec.make(case, backend, 0)
    try:
        announced(spec, args)
    except RuntimeError as error:
        return str(error)
    return objection(spec, backend, args)


def long(spec: OpSpec, backend: Backend, case: Case) -> None:
    """What :func:`compare` says of a case that is longer than any block."""
    args = spec.make(case, backend, 0)
    compare(spec, args, run_checked(spec, backend, args, draw=1), case.values)


def shared_cases(spec: OpSpec) -> Iterator[Case]:
    """Small cases with rows for every thread to have a share, which few rows do not have."""
    for case in small_cases(spec, "cpu"):
        elements = max(t.numel() for t in places(spec.make(case, "cpu", 0)).values())
        yield resized(case, rows(case) * math.ceil(SHARED / elements))


def tall(spec: OpSpec, backend: Backend, case: Case) -> Case:
    """The case with rows that reach element 2**31 when they are spread, or as it is where a backend takes so few that
    only columns do."""
    taller = resized(case, HUGE_ROWS)
    return case if objection(spec, backend, spec.make(taller, backend, 0)) else taller


def huge(spec: OpSpec, backend: Backend, case: Case) -> None:
    """C6: each strided matrix argument in turn spans more than 2**31 elements, by rows and by columns."""
    args = spec.make(tall(spec, backend, case), backend, 0)
    expected = run(spec, backend, args)
    for place in strided_arguments(spec, args):
        matrix = places(args)[place]
        if matrix.dim() != 2:
            continue
        for axis in (0, 1):
            steps = matrix.shape[axis] - 1
            if steps * HUGE_STRIDE <= 2**31:
                continue
            # a GPU's memory is there or not: as little as reaches element 2**31
            stride = (2**31 // steps // 64 + 1) * 64 if runs_on_gpu(backend) else HUGE_STRIDE
            span = steps * stride + matrix.shape[1 - axis]
            if runs_on_gpu(backend):
                spread = torch.empty(span, dtype=matrix.dtype, device="cuda")
            else:
                spread = memory.lazy((span,), matrix.dtype)
            spread = spread.as_strided(matrix.shape, (stride, 1) if axis == 0 else (1, stride))
            spread.copy_(matrix)
            outputs = run(spec, backend, put(args, place, spread))
            for what, y, wanted in zip(_names(spec, outputs), outputs, expected, strict=True):
                numerics.check_equal(
                    "C6", f"{what} with argument {_words(place)} strided by {stride}", y.cpu(), wanted.cpu()
                )
            del spread
            if runs_on_gpu(backend):
                torch.cuda.empty_cache()  # other test processes share the GPU


def layout_cases(spec: OpSpec, backend: Backend) -> list[Case]:
    """Of each kind with edges, a small odd case and one of middling size; of an interpreted or emulated kernel, whose
    strides do not depend on options, of the first kind of each dtype that it takes."""
    chosen: dict[Any, list[Case]] = {}
    for kind, cases in kinds(spec).items():
        solid = [case for case in cases if min(case.dims.values()) > 1]
        if len(solid) < 3 or (stand_in() and objection(spec, backend, spec.make(solid[0], backend, 0))):
            continue
        chosen.setdefault(kind[0] if stand_in() else kind, [solid[0], solid[len(solid) // 2]])
    return [case for pair in chosen.values() for case in pair]
