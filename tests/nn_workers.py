"""What the other processes of the layer tests run: importable, so that a fresh interpreter can find it."""

from __future__ import annotations

import itertools
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import burnish
import torch
import torch.distributed as dist
from burnish.nn import (
    BlockSparseLinear,
    Int8Linear,
    LowRankConv2d,
    LowRankLinear,
    Sparse24Linear,
    SparseConv2d,
    SparseLinear,
)
from torch import nn

STEPS, ROWS = 4, 8


def model() -> nn.Module:
    """Frozen int8 layers with trainable biases around a trainable float layer."""
    torch.manual_seed(0)
    return nn.Sequential(Int8Linear(24, 33, activation="gelu"), nn.Linear(33, 16), Int8Linear(16, 5, activation="silu"))


def lowrank_model() -> nn.Module:
    """Trainable factors, some with fewer rows than there are processes."""
    torch.manual_seed(0)
    return nn.Sequential(
        LowRankLinear(24, 36, rank=5),
        nn.Unflatten(1, (4, 3, 3)),
        LowRankConv2d(4, 7, 3, padding=1, rank=3, scheme="tucker2"),
        nn.Flatten(),
        LowRankLinear(63, 5, rank=1),
    )


class Beside(nn.Module):
    """A layer and what goes past it, so that gradients do where the layer has no weights."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Any) -> Any:
        return x + self.layer(x)


def sparse_model() -> nn.Module:
    """Trainable values: blocks and single weights in odd numbers, fewer blocks than there are processes, and none."""
    torch.manual_seed(0)
    empty = nn.Linear(21, 21)
    nn.init.zeros_(empty.weight)
    return nn.Sequential(
        BlockSparseLinear(24, 36, density=0.9, block=(4, 16)),
        Sparse24Linear(36, 36),
        nn.Unflatten(1, (4, 3, 3)),
        SparseConv2d(4, 7, 3, padding=1, density=0.3, block=16),
        nn.Flatten(),
        SparseLinear(63, 21, density=0.25),
        Beside(BlockSparseLinear.from_float(empty)),
        Sparse24Linear(21, 8, values="int8"),
        BlockSparseLinear(8, 5, density=1, values="int8"),
    )


def train(net: nn.Module, rank: int = 0, ranks: int = 1) -> None:
    """A few steps on this rank's share of the rows; the mean over ranks is the mean over all rows."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for step in range(STEPS):
        x = torch.randn(ROWS, 24, generator=torch.Generator().manual_seed(step))
        share = x[rank * ROWS // ranks : (rank + 1) * ROWS // ranks]
        optimizer.zero_grad()
        net(share).square().mean().backward()
        optimizer.step()


#: what the processes train, one after the other
MODELS = {"int8": model, "lowrank": lowrank_model, "sparse": sparse_model}


def distributed(rank: int, kind: str, folder: str) -> None:
    """One of two processes: trains each model under DDP or FSDP2, and rank 0 stores the gathered state dicts."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    for name, make in MODELS.items():
        _distributed(rank, kind, make(), f"{folder}/{name}")
    dist.barrier()  # nobody leaves while another still receives
    dist.destroy_process_group()


def _distributed(rank: int, kind: str, net: Any, path: str) -> None:
    if kind == "ddp":
        net = nn.parallel.DistributedDataParallel(net)
    else:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (2,))
        for layer in net:
            fully_shard(layer, mesh=mesh)
        fully_shard(net, mesh=mesh)
    train(net, rank, 2)
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict

    net = net.module if kind == "ddp" else net
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(net, options=whole)
    if rank == 0:
        torch.save(state, f"{path}-state.pt")
    dist.barrier()
    # and back in: what was gathered loads into the sharded model
    loaded = torch.load(f"{path}-state.pt", weights_only=True)
    with torch.no_grad():
        for tensor in (*net.parameters(), *net.buffers()):
            tensor.zero_()
    set_model_state_dict(net, loaded, options=StateDictOptions(full_state_dict=True))
    again = get_model_state_dict(net, options=whole)
    if rank == 0:
        torch.save(again, f"{path}-again.pt")


def numbered(number: int) -> nn.Module:
    """A model in which every tensor tells the number it was saved with."""
    net = nn.Sequential(Int8Linear(256, 512), nn.Linear(512, 256), Int8Linear(256, 256))
    with torch.no_grad():
        for layer in net:
            state = layer.state_dict()
            layer.load_state_dict({key: torch.full_like(value, 1 + number % 100) for key, value in state.items()})
    return net


def save_forever(folder: str, start: int) -> None:
    """Save numbered models until killed; ``committed`` tells the last number whose save returned."""
    torch.set_num_threads(1)
    committed = Path(folder) / "committed"
    for number in itertools.count(start):
        burnish.save(numbered(number), Path(folder) / "model")
        committed.with_suffix(".new").write_text(str(number))
        committed.with_suffix(".new").replace(committed)


def save_many(folder: str, number: int, count: int) -> None:
    """One of several writers of the same folder."""
    torch.set_num_threads(1)
    for _ in range(count):
        burnish.save(numbered(number), folder)
        time.sleep(0.001)


def serve() -> None:
    """Fork a process for each ``[function, arguments]`` that comes as a line of JSON: starts in milliseconds, because
    torch is imported already. Prints its id, and its exit status when asked with an empty line."""
    for line in sys.stdin:
        if not line.strip():
            print(json.dumps([os.waitstatus_to_exitcode(os.wait()[1])]), flush=True)
            continue
        function, arguments = json.loads(line)
        child = os.fork()
        if child == 0:
            try:
                globals()[function](*arguments)
            finally:
                os._exit(0 if sys.exc_info()[0] is None else 1)
        print(json.dumps([child]), flush=True)


if __name__ == "__main__":
    serve()
