"""What scales the gradients of a step: GradScaler's scale, and the norm of all of them together.

The norm is of every parameter's gradient, in all groups, on all devices and in all shards: sums of squares, in float64
where they are added here, one reduction for each mesh.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from burnish.ops.grad_norm import grad_norm
from burnish.optim import tensors

if TYPE_CHECKING:
    from burnish.optim.batch import Batch
    from burnish.optim.fused import FusedOptimizer


@dataclass(frozen=True)
class Scaling:
    """fp32 scalars; each has a copy on every device that asks for one.

    ``norm`` is there with a ``max_grad_norm`` above 0, the others when a GradScaler put them on the optimizer.
    """

    max_grad_norm: float
    norm: Tensor | None
    grad_scale: Tensor | None
    found_inf: Tensor | None

    @classmethod
    def of(cls, optimizer: FusedOptimizer, batches: Sequence[Batch]) -> Scaling:
        """That of the step that ``batches`` are."""
        scale: Tensor | None = getattr(optimizer, "grad_scale", None)
        found: Tensor | None = getattr(optimizer, "found_inf", None)
        limit = batches[0].group["max_grad_norm"]
        norm = None if limit is None else total_norm(batches, scale)
        return cls(0.0 if limit is None else float(limit), norm, scale, found)

    def on(self, device: torch.device) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Norm, scale and what was found, on ``device``."""
        return _on(self.norm, device), _on(self.grad_scale, device), _on(self.found_inf, device)


def _on(value: Tensor | None, device: torch.device) -> Tensor | None:
    return None if value is None else value.to(device, torch.float32, non_blocking=True).reshape(())


def total_norm(batches: Sequence[Batch], grad_scale: Tensor | None) -> Tensor:
    """The norm of the unscaled gradients of ``batches``, fp32, on the first one's device."""
    parts: dict[Any, list[Batch]] = {}
    for batch in batches:
        first = batch.origin[0]
        mesh = (first.device_mesh, tensors.shard_dims(first)) if tensors.is_sharded(first) else None
        parts.setdefault((batch.device, mesh), []).append(batch)
    squares = []
    for (device, mesh), members in parts.items():
        norm, _ = grad_norm([grad for batch in members for grad in batch.grads], _on(grad_scale, device))
        if mesh is None and len(parts) == 1:
            return norm
        squares.append(reduced(norm.double().square(), mesh).to(batches[0].device, non_blocking=True))
    return torch.stack(squares).sum().sqrt().float()


def reduced(square: Tensor, mesh: Any) -> Tensor:
    """Sums of squares, added over the shards on a mesh, the same bits in each process."""
    if mesh is not None:
        from torch import distributed

        device_mesh, dims = mesh
        for dim in dims:
            distributed.all_reduce(square, group=device_mesh.get_group(dim))
    return square
