"""Parameters that every process holds whole while the layer around them is sharded: equal at first, equal gradients.

FSDP2 manages the parameters that were there when it was applied. An adapter added afterwards is small, so each process
keeps all of it: :func:`spread` gives all the values of the mesh's first process, and :func:`averaged` gives all the
mean gradient, which is what FSDP2 does for the parameters it manages. Each process must call both for the same layers
in the same order.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


def _groups(mesh: Any) -> list[Any]:
    return [mesh.get_group(dimension) for dimension in range(mesh.ndim)]


def spread(mesh: Any, *tensors: torch.Tensor) -> None:
    """Overwrite the tensors with those of the first process of the mesh."""
    for group in _groups(mesh):
        for tensor in tensors:
            dist.broadcast(tensor, src=dist.get_global_rank(group, 0), group=group)


def averaged(mesh: Any, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The tensors; their gradients are the means over the mesh's processes, in one exchange for all of them."""
    return _Averaged.apply(mesh, *tensors)  # type: ignore[no-untyped-call]


class _Averaged(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, mesh: Any, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.mesh = mesh
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        for group in _groups(ctx.mesh):
            dist.all_reduce(flat, group=group)
        flat /= ctx.mesh.size()
        parts = flat.split([gradient.numel() for gradient in gradients])
        return None, *(part.view_as(gradient) for part, gradient in zip(parts, gradients, strict=True))
