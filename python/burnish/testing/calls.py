"""How a backend is called, and what its result is compared with.

Inputs come from the record's ``make`` on the CPU. A GPU backend gets copies on the GPU where there is one; one that is
interpreted or emulated gets the CPU tensors. The two truths: :func:`oracle`, the reference in float64 on the same,
already rounded inputs, and :func:`eager`, the reference in the inputs' own dtypes, which is what torch itself would
give.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from burnish import dispatch, native
from burnish.arguments import Args, map_tensors, places
from burnish.registry import Backend, Case, OpSpec
from burnish.testing import interpreter
from burnish.testing.interpreter import interpreting

Outputs = tuple[torch.Tensor, ...]

INTERPRETED: tuple[Backend, str] = ("triton", "this process interprets Triton kernels")
EMULATED: tuple[Backend, str] = ("native", "this process emulates CUDA kernels")
#: seeds that an emulated CUDA kernel is run with, each call but for further draws of its values
SCHEDULES = 16


class Violation(AssertionError):
    """A rule of the kit is broken; the message names the rule, the figure and the limit."""


def stand_in() -> tuple[Backend, str] | None:
    """The GPU backend that this process runs on the CPU, and therefore nothing else; why nothing else."""
    if interpreting():
        return INTERPRETED
    return EMULATED if native.emulating() else None


def backends(spec: OpSpec) -> tuple[tuple[Backend, ...], dict[str, str]]:
    """The backends to test in this process, and why each other one is left out.

    The CPU backend is always to be tested, also where its kernel is missing: that is a failure, not a skip.
    """
    table = dispatch.candidates(spec)
    run: list[Backend] = []
    skipped: dict[str, str] = {}
    listed: tuple[Backend, ...] = ("cpu", *(impl.backend for impl in spec.impls))
    for backend in listed:
        only = stand_in()
        if only is not None and backend != only[0]:
            skipped[backend] = only[1]
        elif backend == "cpu" or table[backend].startswith("yes"):
            run.append(backend)
        else:
            skipped[backend] = table[backend]
    return tuple(run), skipped


def objection(spec: OpSpec, backend: Backend, args: Args) -> str | None:
    """Why ``backend`` declines these arguments, in words; None if it runs them. It is asked of tensors that have no
    values yet, as it must not wait for any: a plan asks thousands of times."""
    impls = [impl for impl in spec.impls if impl.backend == backend]
    if not impls:
        return None
    return dispatch.objection(impls[0], map_tensors(_like_on_cuda, args) if runs_on_gpu(backend) else args)


def runs_on_gpu(backend: Backend) -> bool:
    """Whether ``backend`` gets its arguments on a GPU in this process."""
    return backend in ("triton", "native") and not stand_in() and torch.cuda.is_available()


def to_device(backend: Backend, args: Args) -> Args:
    """The arguments on the device that ``backend`` runs on; strides and storage offsets are kept."""
    return map_tensors(_to_cuda, args) if runs_on_gpu(backend) else args


def _to_cuda(tensor: torch.Tensor) -> torch.Tensor:
    storage = torch.as_strided(tensor, (_stored(tensor),), (1,), 0).cuda()
    moved = storage.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
    return moved.requires_grad_(tensor.requires_grad)


def _like_on_cuda(tensor: torch.Tensor) -> torch.Tensor:
    """An empty tensor on the GPU with the layout that :func:`_to_cuda` gives."""
    storage = torch.empty(_stored(tensor), dtype=tensor.dtype, device="cuda")
    return storage.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def _stored(tensor: torch.Tensor) -> int:
    """Elements of the storage."""
    return tensor.untyped_storage().nbytes() // tensor.itemsize


def as_outputs(result: Any) -> Outputs:
    """An op's result as a tuple of tensors."""
    if result is None:
        return ()
    return result if isinstance(result, tuple) else (result,)


@cache
def mutated(spec: OpSpec) -> set[int]:
    """The arguments that the op writes into, by the schema's word."""
    arguments = spec.overload()._schema.arguments
    return {index for index, argument in enumerate(arguments) if argument.alias_info and argument.alias_info.is_write}


def outcome(spec: OpSpec, args: Args, result: Any) -> Outputs:
    """All that a call with ``args`` made: its result, then the tensors that it wrote into."""
    written = mutated(spec)
    return as_outputs(result) + tuple(tensor for place, tensor in places(args).items() if place[0] in written)


def twin(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in memory of its own, gaps included."""
    if tensor.is_contiguous():
        return tensor.clone()
    whole = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return whole.set_(tensor.untyped_storage().clone(), tensor.storage_offset(), tensor.shape, tensor.stride())


def copies(spec: OpSpec, args: Args, copy: Callable[[torch.Tensor], torch.Tensor] = twin) -> Args:
    """``args`` with copies of what the op writes into."""
    written = mutated(spec)
    return tuple(map_tensors(copy, (arg,))[0] if index in written else arg for index, arg in enumerate(args))


def on_copies(
    spec: OpSpec, function: Callable[..., Any], copy: Callable[[torch.Tensor], torch.Tensor] = twin
) -> Callable[..., Outputs]:
    """``function``, which takes the op's arguments, as one that returns its :func:`outcome` and keeps its arguments as
    they are: what the op writes into are copies."""

    def call(*args: Any) -> Outputs:
        own = copies(spec, args, copy)
        return outcome(spec, own, function(*own))

    return call


def run(
    spec: OpSpec,
    backend: Backend,
    args: Args,
    grad: bool = False,
    draw: int = 0,
    copy: Callable[[torch.Tensor], torch.Tensor] = twin,
) -> Outputs:
    """Run the op on ``backend``, by the same road that users' calls take; ``grad`` asks for the differentiable op. The
    arguments stay as they are: an op that writes into some gets what ``copy`` makes of these.

    ``draw`` counts what differs from an earlier call in its values alone: an emulated kernel, whose schedules do not
    depend on them, then runs under schedule ``draw`` and no other.
    """
    if interpreting():
        interpreter.activate()
    moved = to_device(backend, args)

    def call() -> Outputs:
        return on_copies(spec, lambda *own: dispatch.call(spec, own, grad), copy)(*moved)

    with dispatch.use_backend(backend):
        if not native.emulating():
            return call()
        return _on_schedule(draw, call) if draw else _every_schedule(spec.stem, call)


def _every_schedule(what: str, call: Callable[[], Outputs]) -> Outputs:
    """The results of an emulated call, after :data:`SCHEDULES` runs. The seed decides what hardware leaves open: who
    goes on, what uninitialised shared memory holds, when a copy arrives. None of it may change a bit."""
    first = _on_schedule(0, call)
    for seed in range(1, SCHEDULES):
        for index, (y, expected) in enumerate(zip(_on_schedule(seed, call), first, strict=True)):
            if not torch.equal(_raw(y), _raw(expected)):
                raise Violation(f"{what}[{index}] has other bits under schedule {seed} than under schedule 0")
    return first


def _on_schedule(seed: int, call: Callable[[], Outputs]) -> Outputs:
    torch.ops.burnish.emulation_seed(seed)
    try:
        return call()
    except RuntimeError as error:
        if "CUDA on the CPU" not in str(error):
            raise
        raise Violation(f"under schedule {seed}: {error}") from error


def _raw(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


def eager(spec: OpSpec, args: Args) -> Outputs:
    """The reference in the inputs' own dtypes."""
    with torch.no_grad():
        return on_copies(spec, spec.reference)(*args)


def widen(args: Args) -> Args:
    """Every floating-point tensor, and every floating-point dtype argument, to float64."""
    args = map_tensors(lambda t: t.detach().double() if t.is_floating_point() else t, args)
    return tuple(torch.float64 if isinstance(arg, torch.dtype) and arg.is_floating_point else arg for arg in args)


def oracle(spec: OpSpec, args: Args) -> Outputs:
    """The reference in float64."""
    return eager(spec, widen(args))


def is_exact(outputs: Outputs) -> bool:
    """Whether the op makes integers: such an op, a quantiser's scales included, is bit-exact everywhere (N4)."""
    return any(not out.is_floating_point() for out in outputs)


def makes_integers(spec: OpSpec, backend: Backend, case: Case) -> bool:
    """:func:`is_exact`, asked of the op's fake."""
    return is_exact(announced(spec, spec.make(case, backend, 0)))


def announced(spec: OpSpec, args: Args) -> Outputs:
    """What the op's fake says that a call makes; what the op writes into stays as it is."""
    return outcome(spec, args, spec.fake(*args))


def resized(case: Case, first: int) -> Case:
    """The case with another size of its first dimension, the rows."""
    name = next(iter(case.dims))
    return Case({**case.dims, name: first}, case.dtype, case.values, case.options)


def rows(case: Case) -> int:
    return next(iter(case.dims.values()))


def volume(case: Case) -> int:
    """The product of the dimensions."""
    product = 1
    for size in case.dims.values():
        product *= size
    return product


def kind(case: Case) -> tuple[Any, ...]:
    """What makes cases alike but for their sizes."""
    return (case.dtype, tuple(sorted(case.options.items(), key=str)))


def kinds(spec: OpSpec) -> dict[tuple[Any, ...], list[Case]]:
    """The ordinary test cases by dtype and options, each list from small to large."""
    groups: dict[tuple[Any, ...], list[Case]] = {}
    for case in spec.cases.test:
        if case.values == "normal":
            groups.setdefault(kind(case), []).append(case)
    return {key: sorted(cases, key=volume) for key, cases in groups.items()}
