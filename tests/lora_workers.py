"""What the other processes of the LoRA tests run: the same training in each way of sharding."""

from __future__ import annotations

from typing import Any

import burnish
import torch
import torch.distributed as dist
from burnish.nn import Int8Linear, LoRALinear
from torch import nn

STEPS, ROWS = 3, 8
#: how the layers and the wrapper come together
WAYS = (
    "ddp",
    "adapted, then sharded",
    "sharded by layer, then adapted",
    "sharded by block, then adapted",
    "used, then adapted",
)


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.tanh(self.up(x)))


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 17), Block(17), Int8Linear(17, 17), Block(17), nn.Linear(17, 5))


def adapt(net: nn.Module) -> None:
    """Give the layers adapters; in a sharded model each process draws other values, and the layers see to the rest."""
    sharded = any(type(p).__name__ == "DTensor" for p in net.parameters())
    torch.manual_seed(5 + dist.get_rank() if sharded else 5)
    burnish.swap_(net, burnish.LoRA(r=3, lora_alpha=6))
    for layer in net.modules():
        if isinstance(layer, LoRALinear):
            nn.init.constant_(layer.lora_B, 0.05)


def train(net: nn.Module, accumulate: int, rank: int = 0, ranks: int = 1) -> None:
    """A few steps on this rank's share of the rows; the mean over ranks is the mean over all rows."""
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1)
    for step in range(STEPS):
        optimizer.zero_grad()
        for part in range(accumulate):
            x = torch.randn(ROWS, 24, generator=torch.Generator().manual_seed(10 * step + part))
            share = x[rank * ROWS // ranks : (rank + 1) * ROWS // ranks]
            (net(share).square().mean() / accumulate).backward()
        optimizer.step()


def wrapped(way: str) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    net = model()
    if way in WAYS[:2]:
        adapt(net)
    if way == "ddp":
        return nn.parallel.DistributedDataParallel(net)
    mesh = init_device_mesh("cpu", (2,))
    units = {WAYS[1]: LoRALinear, WAYS[2]: nn.Linear}.get(way, Block)
    for module in list(net.modules()):
        if isinstance(module, units):
            fully_shard(module, mesh=mesh)
    fully_shard(net, mesh=mesh)
    if way == WAYS[4]:
        net(torch.randn(4, 24)).sum().backward()
        net.zero_grad()
    if way in WAYS[2:]:
        adapt(net)
    return net


def whole(net: Any) -> dict[str, torch.Tensor]:
    """All parameters, gathered."""
    net = getattr(net, "module", net)
    return {name: getattr(p, "full_tensor", lambda p=p: p)().detach().clone() for name, p in net.named_parameters()}


def refused(folder: str) -> None:
    """What cannot be done with a sharded weight, in sentences."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    net = wrapped(WAYS[3])
    layer = LoRALinear(nn.Linear(8, 8), r=2)
    fully_shard(layer.base_layer, mesh=init_device_mesh("cpu", (2,)))
    messages = {}
    for name, call in (
        ("merge", lambda: net[1].up.merge()),
        ("to_float", lambda: net[1].up.to_float()),
        ("pissa", lambda: burnish.swap_(wrapped_plain(), burnish.LoRA(r=2, init_lora_weights="pissa"))),
        ("base alone", lambda: layer(torch.randn(2, 8))),
        ("save", lambda: burnish.save_adapter(wrapped(WAYS[1]), folder + "/adapter")),
    ):
        try:
            call()
        except Exception as error:
            messages[name] = f"{type(error).__name__}: {error}"
    torch.save(messages, f"{folder}/refused.pt")


def wrapped_plain() -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    return fully_shard(model(), mesh=init_device_mesh("cpu", (2,)))


def distributed(rank: int, folder: str) -> None:
    """One of two processes: trains in each way, and rank 0 stores what came of it."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    results: dict[Any, Any] = {}
    for way in WAYS:
        for accumulate in (1, 2):
            net = wrapped(way)
            train(net, accumulate, rank, 2)
            results[way, accumulate] = whole(net)
    if rank == 0:
        torch.save(results, f"{folder}/results.pt")
    everywhere = [p for m in net.modules() if isinstance(m, LoRALinear) for p in (m.lora_A, m.lora_B)]
    torch.save([p.detach() for p in everywhere], f"{folder}/adapters{rank}.pt")
    if rank == 0:
        burnish.save_adapter(net, f"{folder}/whole")
    dist.barrier()
    refused(folder if rank == 0 else f"{folder}/other{rank}")
    dist.destroy_process_group()
