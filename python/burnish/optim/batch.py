"""What one call of a step op steps: parameters of a group that are of one kind, with all that belongs to them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from burnish.optim import options, tensors

if TYPE_CHECKING:
    from burnish.optim.norm import Scaling

_GOLDEN, _WORD = 0x9E3779B97F4A7C15, 2**64 - 1

#: the state of a batch by entry; entries that its group does not have are not there
Columns = dict[str, list[Tensor]]


@dataclass(frozen=True)
class Batch:
    """Parameters of one group, one dtype and one device, which one call steps: what this process holds of each."""

    group: Mapping[str, Any]
    origin: list[Any]
    params: list[Tensor]
    grads: list[Tensor]
    masks: list[Tensor]
    lane: int

    @property
    def device(self) -> torch.device:
        return self.params[0].device

    @property
    def seed(self) -> int | None:
        """The seed of this step's rounding: another for each group, kind of parameter and shard."""
        if not self.group["stochastic_rounding"]:
            return None
        mixed = _mix(_mix(self.group["seed"]) ^ self.lane)
        return _mix(mixed ^ tensors.shard_index(self.origin[0])) >> 1

    def arguments(self, state: Columns, scaling: Scaling) -> dict[str, Any]:
        """Those of a step that do not depend on the optimizer, parameters, gradients and steps aside."""
        total, grad_scale, found_inf = scaling.on(self.device)
        return {
            "scales": state.get("scales", []),
            "masters": state.get("master", []),
            "emas": state.get("ema", []),
            "masks": self.masks,
            "lr": options.rate(self.group, self.device),
            "maximize": self.group["maximize"],
            "ema_decay": self.group["ema_decay"] or 0.0,
            "max_grad_norm": scaling.max_grad_norm,
            "grad_norm": total,
            "grad_scale": grad_scale,
            "found_inf": found_inf,
            "seed": self.seed,
        }


def next_seed(seed: int) -> int:
    """The seed of a group's next step."""
    return (seed + _GOLDEN) & _WORD


def _mix(word: int) -> int:
    """SplitMix64's output function (Steele, Lea and Flood 2014)."""
    word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9 & _WORD
    word = (word ^ word >> 27) * 0x94D049BB133111EB & _WORD
    return word ^ word >> 31
