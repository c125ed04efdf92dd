"""What each configuration does to layers: one record a configuration, read by swaps, checkpoints and reports.

To add one: the configuration in :mod:`burnish.configs`, the layer in :mod:`burnish.nn`, a module here with its
:class:`Kind`, and an entry in :data:`KINDS`. A layer that a kind makes has two attributes that reports use: ``dtype``,
of the float layer it stands for, and ``summary``, what it is in a few words.
"""

from __future__ import annotations

import torch

from burnish.configs import Config
from burnish.kinds.int8 import INT8
from burnish.kinds.kind import Kept, Kind, Misfit, Request
from burnish.kinds.lora import LORA
from burnish.kinds.lowrank import LOWRANK
from burnish.kinds.sparse import BLOCK_SPARSE, SPARSE, SPARSE24

__all__ = ["KINDS", "Kept", "Kind", "Misfit", "Request", "made_by", "named", "of", "takers"]

KINDS: dict[type[Config], Kind] = {kind.config: kind for kind in (INT8, LORA, LOWRANK, BLOCK_SPARSE, SPARSE24, SPARSE)}


def of(config: Config | None) -> Kind | None:
    """The kind of a configuration; None for those that swap nothing."""
    return KINDS.get(type(config)) if config is not None else None


def made_by(module: torch.nn.Module) -> Kind | None:
    """The kind that makes layers of this module's class."""
    return next((kind for kind in KINDS.values() if type(module) in kind.made), None)


def named(name: str) -> Kind | None:
    """The kind that makes layers of the class with this name."""
    return next((kind for kind in KINDS.values() if name in [made.__name__ for made in kind.made]), None)


def takers(module: torch.nn.Module) -> frozenset[type[Config]]:
    """The configurations that speak of a module, whether they can convert it or not; all of one swapped already."""
    swapped = made_by(module) is not None
    return frozenset(config for config, kind in KINDS.items() if swapped or kind.candidate(module))
