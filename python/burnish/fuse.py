"""Activations that directly follow a linear layer, so that the layer can compute them in its epilogue.

That nothing happens in between is proved, in two ways: neighbours in an nn.Sequential that the code around it calls as
a whole, and does not index, slice or loop over; or the parent's forward, whose code names its children and nothing
else, is run on opaque tokens, and the linear's token goes into the activation and nowhere else. transformers'
BertIntermediate, GPT2MLP, LlamaMLP and their kin are found like that, whatever their children are called.

Only activations that are the same function as one of the epilogue's are taken: GELU's erf form and its tanh
approximation are two functions.
"""

from __future__ import annotations

import dis
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from burnish.bytecode import codes, reads_attribute

#: where a module hangs: parent, the parent's fqn, name of the child
Place = tuple[torch.nn.Module, str, str]

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
#: transformers' activation modules by class name; the other GELUs there are other functions
_TRANSFORMERS = {
    "GELUActivation": "gelu",
    "GELUTanh": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",
    "NewGELUActivation": "gelu_tanh",
    "SiLUActivation": "silu",
}


@dataclass(frozen=True)
class Fusion:
    """``child`` of ``parent``, at ``fqn``, is the activation that follows a linear layer."""

    parent: torch.nn.Module
    child: str
    fqn: str
    activation: str


def activation_name(module: torch.nn.Module) -> str | None:
    """The epilogue's name for an activation module; None if it is another function."""
    cls = type(module)
    if isinstance(module, torch.nn.GELU):
        return {"none": "gelu", "tanh": "gelu_tanh"}.get(module.approximate) if cls is torch.nn.GELU else None
    if cls.__module__ == "transformers.activations":
        return _TRANSFORMERS.get(cls.__name__)
    return {torch.nn.ReLU: "relu", torch.nn.SiLU: "silu"}.get(cls)


def find(
    parent: torch.nn.Module, child: str, parent_fqn: str, places: Callable[[torch.nn.Module], Sequence[Place]]
) -> Fusion | None:
    """The activation that directly follows the linear layer ``parent.child``, if it can be fused.

    Hooks on either module, or a replaced forward, see the value in between: then nothing is fused.

    Args:
        parent, child: where the linear layer is.
        parent_fqn: of the parent.
        places: where a module of the model hangs.
    """
    name = follower(parent, child)
    if name is None or (_is_sequence(parent) and not _called_whole(parent, places)):
        return None
    module = parent._modules[name]
    if module is None or _observed(module) or _observed(parent._modules[child]):
        return None
    activation = activation_name(module)
    if activation is None:
        return None
    return Fusion(parent, name, f"{parent_fqn}.{name}" if parent_fqn else name, activation)


def _observed(module: torch.nn.Module | None) -> bool:
    return module is None or "forward" in vars(module) or any(getattr(module, name) for name in _HOOKS)


def _is_sequence(module: torch.nn.Module) -> bool:
    return type(module).forward is torch.nn.Sequential.forward


def _called_whole(sequence: torch.nn.Module, places: Callable[[torch.nn.Module], Sequence[Place]]) -> bool:
    """Whether no code of the modules above an nn.Sequential does anything with it but call it."""
    for owner, _, name in places(sequence):
        if _is_sequence(owner):
            if not _called_whole(owner, places):
                return False
        elif any(name in _taken(cls) for cls in _classes(owner, places)):
            return False
    return True


def _classes(module: torch.nn.Module, places: Callable[[torch.nn.Module], Sequence[Place]]) -> Iterator[Any]:
    """The class of a module and those of the modules above it."""
    yield type(module)
    for owner, _, _ in places(module):
        yield from _classes(owner, places)


@lru_cache(maxsize=1024)
def _taken(cls: type) -> frozenset[str]:
    """The attributes that methods of a class, its constructor aside, take hold of without calling them at once."""
    return frozenset(
        instruction.argval
        for base in cls.__mro__
        if base.__module__.partition(".")[0] != "torch"
        for name, value in vars(base).items()
        if name != "__init__"
        for code in codes(value)
        for instruction in dis.get_instructions(code)
        if reads_attribute(instruction)
    )


def follower(parent: torch.nn.Module, child: str) -> str | None:
    """The child that ``parent`` calls on the result of ``child``, once and with nothing in between; None if unknown."""
    if "forward" in vars(parent):
        return None
    if _is_sequence(parent):
        names = list(parent._modules)
        after = names.index(child) + 1
        return names[after] if after < len(names) else None
    code = getattr(type(parent).forward, "__code__", None)
    if code is None or code.co_freevars or not {child} <= set(code.co_names) <= set(parent._modules):
        return None
    trace = _Trace()
    try:
        result = type(parent).forward(_Stub(trace, code.co_names), _Token(trace))
    except Exception:  # whatever a forward does with an opaque token: it is not the pattern looked for
        return None
    calls = [call for call in trace.calls if call.child == child]
    if len(calls) != 1 or not isinstance(result, _Token) or result is calls[0].result:
        return None
    users = [call for call in trace.calls if any(argument is calls[0].result for argument in call.arguments)]
    if len(users) != 1 or users[0].child is None or len(users[0].arguments) != 1:
        return None
    once = [call.child for call in trace.calls].count(users[0].child) == 1
    return users[0].child if once else None


@dataclass(frozen=True)
class _Call:
    """``child`` (None for an operator) took ``arguments`` and gave ``result``."""

    child: str | None
    arguments: tuple[Any, ...]
    result: _Token


class _Trace:
    def __init__(self) -> None:
        self.calls: list[_Call] = []

    def record(self, child: str | None, *arguments: Any) -> _Token:
        self.calls.append(_Call(child, arguments, _Token(self)))
        return self.calls[-1].result


class _Token:
    """Stands for a tensor: arithmetic gives another token, anything else raises."""

    __hash__ = None  # type: ignore[assignment]

    def __init__(self, trace: _Trace) -> None:
        self._trace = trace

    def _operator(self, *others: Any) -> _Token:
        return self._trace.record(None, self, *others)

    def _refuse(self, *others: Any) -> Any:
        raise TypeError("a token has no value")

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = _operator
    __bool__ = __eq__ = __ne__ = __lt__ = __gt__ = __le__ = __ge__ = _refuse


class _Stub:
    """Stands for the parent: has its children, as functions that record their calls, and nothing else."""

    def __init__(self, trace: _Trace, names: tuple[str, ...]) -> None:
        for name in names:
            vars(self)[name] = lambda *arguments, _name=name: trace.record(_name, *arguments)
