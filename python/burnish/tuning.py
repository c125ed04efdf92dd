"""Which of an op's implementations is the fastest on a GPU, where it was measured.

With ``BURNISH_TUNE=1`` the first call whose arguments several implementations can run times them, in turns, and keeps
the times in the cache folder (:mod:`burnish.tables`). From then on, with the variable or without, in this process and
in later ones on such a GPU, the fastest is asked first. ``BURNISH_TUNE=0`` goes by the order of the op's record alone.

A choice holds for an op and the dtypes, sizes and layouts of its tensors; the number of rows counts up to the next
power of two, and of a number among the arguments only whether it is zero. The optimizers' ops, calls that a CUDA graph
records and those with a backend forced are never measured. Implementations agree within rounding, not bit for bit:
where processes must agree in every bit, let all read the same table, or none.
"""

from __future__ import annotations

import os
import statistics
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import torch

from burnish.arguments import Args, map_tensors, places
from burnish.errors import BackendError
from burnish.tables import Table, facts

if TYPE_CHECKING:
    from burnish.registry import OpSpec

#: another implementation must be this much faster than the one that is asked first anyway
MARGIN = 1.03
ROUNDS, MIN_MS = 7, 1.0
#: of the free memory, for copies of the arguments
MEMORY_SHARE = 0.25

#: microseconds by backend, by call, as :func:`_call` names it
_Times = dict[str, dict[str, float]]
_measuring = threading.RLock()  # an implementation may call another op, which is measured meanwhile


def mode() -> str:
    """``BURNISH_TUNE``: 1 to measure, 0 to ignore what was measured, empty to use it.

    Raises:
        ValueError: it is something else.
    """
    word = os.environ.get("BURNISH_TUNE", "")
    if word not in ("", "0", "1"):
        raise ValueError(f"BURNISH_TUNE is {word!r}, expected 1, 0 or nothing")
    return word


@cache
def has_choice(spec: OpSpec) -> bool:
    """Whether calls of the op may be measured: not those that write to their arguments or take lists of tensors, as
    the optimizers' do."""
    return len(spec.impls) > 1 and "!" not in spec.schema and "[]" not in spec.schema


def times(spec: OpSpec, args: Args) -> Mapping[str, float]:
    """The median microseconds measured of such a call, by backend; empty where nothing was or nothing is to count."""
    first = next((arg for arg in args if isinstance(arg, torch.Tensor)), None)
    known = _known(first.device) if first is not None and has_choice(spec) else {}
    return known.get(_call(spec, args), {}) if known and mode() != "0" else {}


def fastest(spec: OpSpec, args: Args, backends: Sequence[str]) -> str | None:
    """The one of ``backends`` that was measured to be the fastest, None where nothing was. One that is listed earlier
    gives way only to one that is clearly faster."""
    known = times(spec, args)
    measured = [name for name in backends if name in known]
    best = min(measured, key=known.__getitem__, default=None)
    return next((name for name in measured if best and known[name] <= MARGIN * known[best]), None)


def learn(spec: OpSpec, args: Args, targets: Callable[[], Mapping[str, Callable[..., Any]]]) -> None:
    """Measure the implementations that can run the call, ``targets()`` by backend, unless it was or must not be.

    Raises:
        BackendError: one of them failed.
    """
    if mode() != "1" or not has_choice(spec):
        return
    device = next(iter(places(args).values())).device
    if any(tensor.numel() == 0 for tensor in places(args).values()) or _is_recorded(device):
        return
    name = _call(spec, args)
    with _measuring:
        if name in _known(device):
            return
        able = targets()
        if len(able) < 2:
            return
        found = {name: _measure(spec, args, able, device)}
        _known(device).update(found)
    try:
        _table(device).add(found)
    except OSError as error:
        warnings.warn(f"what was measured of {spec.name} is for this process alone: {error}", stacklevel=2)


def _is_recorded(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


@cache
def _table(device: torch.device) -> Table:
    from burnish.bench import machine

    return Table("choices", facts(device) | {"triton": machine.version("triton")})


@cache
def _known(device: torch.device) -> _Times:
    """What was measured on such a device, in this process or before it began."""
    return _table(device).read()


def _call(spec: OpSpec, args: Args) -> str:
    """The name of a call: calls of one name run at the same speed, or nearly."""
    first = next(iter(places(args).values()))
    rows = first.numel() // max(1, first.shape[-1]) if first.dim() else 1
    return " ".join((spec.name, *(_text(arg, rows, first.shape[:-1]) for arg in args)))


def _text(arg: Any, rows: int, leading: torch.Size) -> str:
    if isinstance(arg, (list, tuple)):
        return f"({' '.join(_text(each, rows, leading) for each in arg)})"
    if not isinstance(arg, torch.Tensor):
        return str(bool(arg)) if isinstance(arg, (int, float)) else str(arg)
    sizes = [*arg.shape]
    if arg.dim() and arg.shape[:-1] == leading:
        sizes = [1 << (rows - 1).bit_length() if rows else 0, sizes[-1]]
    layout = "" if arg.is_contiguous() else "T" if arg.dim() >= 2 and arg.mT.is_contiguous() else "strided"
    return f"{str(arg.dtype).removeprefix('torch.')}[{','.join(map(str, sizes))}]{layout}"


def _measure(
    spec: OpSpec, args: Args, able: Mapping[str, Callable[..., Any]], device: torch.device
) -> dict[str, float]:
    from burnish.bench import timing

    sets = _copies(args, device)
    contestants = {
        backend: timing.Contestant(backend, [partial(target, *each) for each in sets])
        for backend, target in able.items()
    }
    try:
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            timing.interleave([*contestants.values()], {}, device=device.type, rounds=ROUNDS, min_ms=MIN_MS)
    except RuntimeError as error:
        raise BackendError(f"{spec.name}: BURNISH_TUNE measures {', '.join(able)}, and one fails: {error}") from error
    return {backend: 1e6 * statistics.median(each.seconds) for backend, each in contestants.items()}


def _copies(args: Args, device: torch.device) -> list[Args]:
    """The arguments and copies of them, which together overflow the cache where memory allows."""
    from burnish.bench import machine, timing

    def copy(tensor: torch.Tensor) -> torch.Tensor:
        made = tensor.detach().clone()
        return made if made.stride() == tensor.stride() else tensor

    size = max(1, sum(tensor.nbytes for tensor in places(args).values()))
    room = int(MEMORY_SHARE * machine.free_memory(device.type)) // size
    count = min(timing.sets_wanted(size, device.type), room, timing.MAX_SETS)
    return [args, *(map_tensors(copy, args) for _ in range(count - 1))]
