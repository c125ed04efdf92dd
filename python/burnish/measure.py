"""Is a layer faster than what it replaces? Times both, on inputs of the size the model gives them, on this machine.

Layers that are alike are timed together: each round takes the next layer of the group, first as it was (with the
activation that would be fused), then in its new form, so that the weights of a deep model come from memory as they do
in the model, and both see the same noise. The result is the median of the rounds.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from burnish.errors import SwapError
from burnish.nn.int8_linear import is_conv1d

Call = Callable[[torch.Tensor], Any]
_MIN_ROUNDS, _MAX_ROUNDS, _SECONDS = 7, 200, 0.15
_WARMUP = 3


@dataclass(frozen=True)
class Times:
    """Median microseconds of a layer as it was and in its new form, at ``rows`` rows; of a convolution, images."""

    rows: int
    before_us: float
    after_us: float


@dataclass(frozen=True)
class Contest:
    """One layer to time: both versions, what they are (layers of one ``kind`` are timed together), their input."""

    before: Call
    after: Call
    kind: tuple[Any, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


def shapes_of(
    model: torch.nn.Module, modules: Sequence[torch.nn.Module], measure: int | tuple[Any, ...] | Mapping[str, Any]
) -> dict[int, tuple[int, ...]]:
    """The shape of each module's input, by ``id``: the number of rows given, or what one forward pass on the example
    shows; of linear layers as ``(rows, width)``.

    The pass runs in eval mode without gradients. Modules that it does not call, or calls with nothing, are absent.

    Raises:
        SwapError: no module that the pass calls is given a row.
    """
    if isinstance(measure, int):
        return {id(module): (measure, _width(module)) for module in modules}
    shapes: dict[int, tuple[int, ...]] = {}

    def record(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = input_of(args, kwargs)
        if isinstance(module, torch.nn.modules.conv._ConvNd):
            shape = tuple(x.shape)
        else:
            shape = (x.numel() // max(x.shape[-1], 1), x.shape[-1])
        if shape[0] or id(module) not in shapes:
            shapes[id(module)] = shape

    handles = [module.register_forward_pre_hook(record, with_kwargs=True) for module in modules]
    try:
        with eval_mode(model), torch.no_grad():
            call(model, measure)
    finally:
        for handle in handles:
            handle.remove()
    found = {key: shape for key, shape in shapes.items() if shape[0]}
    if shapes and not found:
        raise SwapError("swap_: measure is an example that gives the layers no rows, expected at least one to time")
    return found


def input_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """What a layer of one input was called with, by place or by name."""
    return args[0] if args else next(iter(kwargs.values()))


def _width(module: torch.nn.Module) -> int:
    """Inputs of a linear layer; transformers' Conv1D names them differently."""
    width: int = module.nx if is_conv1d(module) else module.in_features  # type: ignore[assignment]
    return width


def call(model: torch.nn.Module, arguments: Any) -> Any:
    """``model`` on what stands for its arguments: a mapping of keywords, a tuple or list, or the only one."""
    if isinstance(arguments, Mapping):
        return model(**arguments)
    return model(*arguments) if isinstance(arguments, tuple | list) else model(arguments)


@contextmanager
def eval_mode(model: torch.nn.Module) -> Iterator[None]:
    """The model in eval mode, as Python runs it: compiled code does not see hooks that come later. Each of its modules
    is in its own mode again afterwards."""
    training = [(module, module.training) for module in model.modules()]
    for module, _ in training:
        module.training = False
    try:
        # nothing is compiled before this module is loaded, which takes a second
        with torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext():
            yield
    finally:
        for module, mode in training:
            module.training = mode


def times(contests: Sequence[Contest]) -> list[Times]:
    """The times of each contest, in their order."""
    groups: dict[Any, list[int]] = defaultdict(list)
    for index, contest in enumerate(contests):
        groups[contest.kind, contest.shape, contest.dtype, contest.device].append(index)
    results: dict[int, Times] = {}
    for members in groups.values():
        measured = _race([contests[index] for index in members])
        results.update(dict.fromkeys(members, measured))
    return [results[index] for index in range(len(contests))]


def _race(group: Sequence[Contest]) -> Times:
    first = group[0]
    x = torch.randn(first.shape, device=first.device).to(first.dtype)
    wait = torch.cuda.synchronize if first.device.type == "cuda" else lambda: None
    before: list[float] = []
    after: list[float] = []
    with torch.no_grad():
        for contest in (*group[:_WARMUP],) * _WARMUP:
            contest.before(x)
            contest.after(x)
        start = time.perf_counter()
        while len(before) < _MAX_ROUNDS and (len(before) < _MIN_ROUNDS or time.perf_counter() - start < _SECONDS):
            contest = group[len(before) % len(group)]
            before.append(_clock(contest.before, x, wait))
            after.append(_clock(contest.after, x, wait))
    return Times(first.shape[0], 1e6 * statistics.median(before), 1e6 * statistics.median(after))


def _clock(call: Call, x: torch.Tensor, wait: Callable[[], None]) -> float:
    wait()
    start = time.perf_counter()
    call(x)
    wait()
    return time.perf_counter() - start
