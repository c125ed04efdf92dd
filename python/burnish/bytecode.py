"""What the code of a class does with the children of its instances, read from its instructions."""

from __future__ import annotations

import dis
import inspect
import sys
from collections.abc import Iterator
from functools import lru_cache
from types import CodeType
from typing import Any

import torch

#: what may be asked of a weight without computing with it
_ASKED = {"device", "dim", "dtype", "is_cuda", "is_meta", "ndim", "numel", "requires_grad", "shape", "size"}


def codes(value: Any) -> Iterator[CodeType]:
    """The code of what a class has under a name, with all code inside it; nothing for what is no function."""
    function: Any = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
    code = getattr(inspect.unwrap(function), "__code__", None)
    left = [code] if isinstance(code, CodeType) else []
    while left:
        code = left.pop()
        left += [constant for constant in code.co_consts if isinstance(constant, CodeType)]
        yield code


def reads_attribute(instruction: dis.Instruction) -> bool:
    """Whether it takes an attribute without calling it at once."""
    # a method call's load: an opcode of its own until Python 3.11, a bit of the argument since
    called = sys.version_info >= (3, 12) and instruction.arg is not None and instruction.arg & 1
    return instruction.opname == "LOAD_ATTR" and not called


@lru_cache(maxsize=1024)
def weights_read(cls: type) -> frozenset[str]:
    """The children whose weight ``forward`` takes, or a method or property that it comes to, in whatever branch. What
    only asks for a dtype, a device or a shape does not count."""
    found: set[str] = set()
    seen: set[str] = set()
    left = ["forward"]
    while left:
        name = left.pop()
        if name in seen:
            continue
        seen.add(name)
        for base in cls.__mro__:
            if base is torch.nn.Module:
                break
            names: set[str] = set()
            for code in codes(vars(base).get(name)):
                names.update(code.co_names)
                found.update(_weights_read_by(code))
            left += names
            if name in vars(base) and name not in names:  # nothing there calls the one that it overrides
                break
    return frozenset(found)


def _weights_read_by(code: CodeType) -> Iterator[str]:
    instructions: list[Any] = [None, *dis.get_instructions(code)]
    for caller, _, child, weight, user in zip(*(instructions[start:] for start in range(5)), strict=False):
        taken = reads_attribute(child) and reads_attribute(weight) and weight.argval == "weight"
        asked = user.opname in ("LOAD_ATTR", "LOAD_METHOD") and user.argval in _ASKED
        if taken and not asked and getattr(caller, "argval", None) != "isinstance":
            yield child.argval
