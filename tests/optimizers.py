"""The optimizers that the tests run through: a new one is an entry here."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from burnish import optim


@dataclass(frozen=True)
class Entry:
    """``ours`` and its twin in torch.optim, if it has one, and the op that it calls.

    ``moments`` are those that a parameter's state has with ``options``, by key, each with the dtype of its codes;
    ``more`` are options that bring out what else it can do.
    """

    ours: type[optim.FusedOptimizer]
    theirs: type[torch.optim.Optimizer] | None
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
}
TWINS = {name: entry for name, entry in OPTIMIZERS.items() if entry.theirs is not None}
