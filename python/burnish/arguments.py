"""The tensors among an op's positional arguments, which are tensors, lists of tensors and plain values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Args = tuple[Any, ...]
#: where a tensor is: ``(argument,)`` or, in a list, ``(argument, item)``
Place = tuple[int, ...]


def places(args: Args) -> dict[Place, torch.Tensor]:
    """Every tensor of ``args``, by where it is."""
    found: dict[Place, torch.Tensor] = {}
    for index, arg in enumerate(args):
        if isinstance(arg, torch.Tensor):
            found[index,] = arg
        elif isinstance(arg, (list, tuple)):
            found |= {(index, item): each for item, each in enumerate(arg) if isinstance(each, torch.Tensor)}
    return found


def put(args: Args, place: Place, tensor: torch.Tensor) -> Args:
    """``args`` with another tensor at a place."""
    index = place[0]
    if len(place) == 1:
        return (*args[:index], tensor, *args[index + 1 :])
    changed = list(args[index])
    changed[place[1]] = tensor
    return (*args[:index], changed, *args[index + 1 :])


def map_tensors(function: Callable[[torch.Tensor], torch.Tensor], args: Args) -> Args:
    """``args`` with each tensor replaced by what ``function`` makes of it."""

    def mapped(arg: Any) -> Any:
        if isinstance(arg, (list, tuple)):
            return [mapped(each) for each in arg]
        return function(arg) if isinstance(arg, torch.Tensor) else arg

    return tuple(mapped(arg) for arg in args)
