"""The record of a kind, and the request it answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from burnish.configs import Config


class Kept(Exception):
    """Raised by ``convert``: the layer stays, for the reason given, a clause that finishes "kept, because ..."."""


class Misfit(Exception):
    """Raised by ``rebuild``: the layer in the model is not what the checkpoint's stood for; finishes "it has ..."."""


def check_rank(name: str, rank: int, limit: int) -> None:
    """Raise ValueError where a layer is too small for the rank that a rule gives."""
    if rank > limit:
        raise ValueError(
            f"{name} is {rank}, expected an integer from 1 to {limit}; a rule with burnish.Keep() leaves the layer out"
        )


@dataclass(frozen=True)
class Request:
    """One layer on its way through a swap.

    ``activation`` is what it shall compute after its product, for kinds that fuse; ``moment`` the calibrated second
    moment of its inputs; ``shape`` that of its input, where the swap is to measure; ``mesh`` the
    device mesh that the model is sharded over, if it is.
    """

    module: torch.nn.Module
    config: Config
    fqn: str
    activation: str = "none"
    moment: torch.Tensor | None = None
    shape: tuple[int, ...] | None = None
    mesh: Any = None


@dataclass(frozen=True)
class Kind:
    """How layers become others, and how a checkpoint builds those again.

    ``noun`` names the form in sentences. ``made`` are the classes it makes. ``candidate`` says whether a rule with this
    configuration speaks of a module at all, ``objection(module, parents)`` why one cannot be converted, as a clause, or
    None. ``convert`` raises :class:`Kept` to keep a layer and ValueError or TypeError to call the whole swap off.
    ``weights`` are the tensors of the new layer that stand for the old weight, which tied layers share; none where the
    new layer goes on using the old weight itself. ``races`` says whether a new layer for this module must be faster
    than the old one to take its place. ``form`` is what a checkpoint keeps of a layer beside its configuration, JSON;
    ``rebuild(found, config, form)`` makes that layer without values from what the model has in its place, or raises
    :class:`Misfit`.
    """

    config: type[Config]
    noun: str
    made: tuple[type[torch.nn.Module], ...]
    candidate: Callable[[torch.nn.Module], bool]
    objection: Callable[[torch.nn.Module, list[torch.nn.Module]], str | None]
    convert: Callable[[Request], torch.nn.Module]
    weights: tuple[str, ...]
    races: Callable[[torch.nn.Module], bool]
    form: Callable[[torch.nn.Module], dict[str, Any]]
    rebuild: Callable[[torch.nn.Module, Config, Mapping[str, Any]], torch.nn.Module]
