"""What the processes of the pruning tests run: importable, so that a fresh interpreter can find it."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from burnish import prune
from torch import nn

STEPS, ROWS = 5, 8


def model() -> nn.Sequential:
    """Layers of odd sizes, some with fewer rows than there are processes, masked or, the last, not yet."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(24, 36), nn.Unflatten(1, (4, 3, 3)), nn.Conv2d(4, 7, 3, padding=1), nn.Flatten(), nn.Linear(63, 1)
    )
    prune.Pruner(net, prune.Magnitude(), prune.Unstructured(), 0.5, filter_fn=lambda _, fqn: fqn != "4").step()
    return net


def train(net: nn.Module, rank: int = 0, ranks: int = 1, pruner: prune.Pruner | None = None) -> None:
    """A few steps on this rank's share of the rows; the mean over ranks is the mean over all rows."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    for step in range(STEPS):
        x = torch.randn(ROWS, 24, generator=torch.Generator().manual_seed(step))
        share = x[rank * ROWS // ranks : (rank + 1) * ROWS // ranks]
        optimizer.zero_grad()
        net(share).square().mean().backward()
        optimizer.step()
        if pruner is not None:
            pruner.step()


def gradual(net: nn.Module) -> prune.Pruner:
    """For the layer that has no mask: more zeros at each step."""
    schedule = prune.Gradual(0, STEPS - 1)
    share = {"*4": 0.5}
    return prune.Pruner(net, prune.Magnitude(), prune.Unstructured(), share, schedule=schedule)


def distributed(rank: int, kind: str, folder: str) -> None:
    """One of two processes: trains the model under DDP, where a layer is pruned by and by, or FSDP2."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    net: Any = model()
    if kind == "ddp":
        pruner = gradual(net)
        wrapped = nn.parallel.DistributedDataParallel(net)
        train(wrapped, rank, 2, pruner)
    else:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (2,))
        for layer in (net[0], net[2], net[4]):
            fully_shard(layer, mesh=mesh)
        fully_shard(net, mesh=mesh)
        train(net, rank, 2)
    state = get_model_state_dict(net, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    masks = prune.masks(net)
    torch.save((state, masks), f"{folder}/{rank}.pt")
    dist.barrier()  # nobody leaves while another still receives
    dist.destroy_process_group()
