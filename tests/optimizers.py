"""The optimizers that the tests run through: a new one is an entry here. And what watches the ops they call."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import paper_optimizers
import torch
from burnish import optim
from torch.utils._python_dispatch import TorchDispatchMode


@dataclass(frozen=True)
class Entry:
    """``ours`` and its twin in torch.optim or, where it has none, in plain torch, and the op that it calls.

    ``moments`` are those that a parameter's state has with ``options``, by key, each with the dtype of its codes;
    ``more`` are options that bring out what else it can do.
    """

    ours: type[optim.FusedOptimizer]
    theirs: type[torch.optim.Optimizer]
    op: str
    moments: dict[str, torch.dtype]
    options: dict[str, Any] = field(default_factory=dict)
    more: dict[str, Any] = field(default_factory=dict)


_ADAM = {"exp_avg": torch.int8, "exp_avg_sq": torch.uint8}

OPTIMIZERS = {
    "Adam": Entry(optim.Adam, torch.optim.Adam, "adam_step", _ADAM, more={"amsgrad": True}),
    "AdamW": Entry(optim.AdamW, torch.optim.AdamW, "adam_step", _ADAM, more={"amsgrad": True}),
    "SGD": Entry(
        optim.SGD, torch.optim.SGD, "sgd_step", {"momentum_buffer": torch.int8}, {"momentum": 0.9}, {"nesterov": True}
    ),
    "Adagrad": Entry(
        optim.Adagrad,
        torch.optim.Adagrad,
        "adagrad_step",
        {"sum": torch.uint8},
        more={"initial_accumulator_value": 0.5, "lr_decay": 0.1},
    ),
    "RMSprop": Entry(
        optim.RMSprop,
        torch.optim.RMSprop,
        "rmsprop_step",
        {"square_avg": torch.uint8, "momentum_buffer": torch.int8},
        {"momentum": 0.9},
        {"alpha": 0.9},
    ),
    "Lion": Entry(
        optim.Lion, paper_optimizers.Lion, "lion_step", {"exp_avg": torch.int8}, more={"betas": (0.95, 0.98)}
    ),
    "LAMB": Entry(
        optim.LAMB, paper_optimizers.LAMB, "lamb_step", _ADAM, more={"trust_clip": True, "bias_correction": False}
    ),
}
#: those that torch.optim also has
TWINS = {name: entry for name, entry in OPTIMIZERS.items() if entry.theirs.__module__.startswith("torch.")}


class Calls(TorchDispatchMode):
    """The ops of burnish that are called inside."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "burnish":
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))
