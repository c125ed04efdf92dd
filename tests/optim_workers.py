"""What the processes of the optimizer tests run: importable, so that a fresh interpreter can find it."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from burnish import optim
from optimizers import OPTIMIZERS
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

HALF, ROWS = 50, 8
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
#: options whose state also has to come back as it was
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "clipped": {"max_grad_norm": 0.5},
    "averaged": {"ema_decay": 0.9, "master_weights": "fp32"},
    "split": {"master_weights": "split", "state_dtype": "bf16"},
    "rounded": {"stochastic_rounding": True, "seed": 7, "state_dtype": "bf16"},
    "int8": {"state_dtype": "int8", "ema_decay": 0.9},
}
#: those that an optimizer has with more of its own
MORE = ("clipped", "int8")
#: those whose bits do not depend on how parameters are cut
RESHARDED = ("plain", "averaged", "split")


def model(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Layers of odd sizes, one longer than a block of int8 moments, one with fewer rows than there are processes."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 33), nn.Tanh(), nn.Linear(33, 7), nn.Tanh(), nn.Linear(7, 1)).to(dtype)


def make(net: nn.Module, name: str = "AdamW", variant: str = "plain") -> optim.FusedOptimizer:
    """Two groups, one with its own learning rate."""
    parameters = list(net.parameters())
    groups = [{"params": parameters[:3], "lr": 3e-2}, {"params": parameters[3:]}]
    entry = OPTIMIZERS[name]
    options: dict[str, Any] = entry.options | (entry.more if variant in MORE else {}) | VARIANTS[variant]
    return entry.ours(groups, lr=1e-2, weight_decay=0.1, **options)  # type: ignore[call-arg]


def scaler_for(dtype: torch.dtype) -> Any:
    """With fp16 one whose scale overflows now and then."""
    on = dtype is torch.float16
    return torch.amp.GradScaler("cpu", init_scale=2.0**20, growth_interval=5, enabled=on)


def train(net: nn.Module, optimizer: Any, scaler: Any, steps: Iterable[int], rank: int = 0, ranks: int = 1) -> int:
    """Steps on this rank's share of the rows; returns how many of them the scaler did not let through."""
    dtype, skipped = next(net.parameters()).dtype, 0
    for step in steps:
        x = torch.randn(ROWS, 24, generator=torch.Generator().manual_seed(step)).to(dtype)
        share = x[rank * ROWS // ranks : (rank + 1) * ROWS // ranks]
        optimizer.zero_grad()
        loss = (net(share) - 1).float().square().mean()
        scaler.scale(loss).backward()
        before = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        skipped += scaler.get_scale() < before
    return skipped


def push(net: nn.Module, optimizer: Any, scaler: Any, steps: Iterable[int]) -> None:
    """Steps on gradients that do not depend on how the parameters are cut; with a scaler scaled, and each tenth time
    infinite."""
    for step in steps:
        scale = float(scaler.scale(torch.ones(())))
        fill(net, step, float("inf") if scale > 1 and step % 10 == 7 else scale)
        scaler.step(optimizer)
        scaler.update()


def steady_scaler(dtype: torch.dtype) -> Any:
    """With fp16 one whose scale the gradients of :func:`push` do not overflow, in any of their elements."""
    return torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=5, enabled=dtype is torch.float16)


def fill(net: nn.Module, step: int, scale: float = 1.0) -> None:
    """Gradients that are the same for every number of processes."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    for number, parameter in enumerate(net.parameters()):
        draw = torch.Generator().manual_seed(1000 * step + number)
        grad = (torch.randn(parameter.shape, generator=draw) * scale).to(parameter.dtype)
        if isinstance(parameter, DTensor):
            grad = distribute_tensor(grad, parameter.device_mesh, parameter.placements, src_data_rank=None)
        parameter.grad = grad


def shard(net: nn.Sequential, apart: bool = True) -> nn.Module:
    """FSDP2 over both processes, each layer ``apart`` or all together: half the time a step, for the same shards."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    for layer in (net[0], net[2], net[4]) if apart else ():
        fully_shard(layer, mesh=mesh)
    fully_shard(net, mesh=mesh)
    return net


def wrapped(kind: str, dtype: torch.dtype, apart: bool = True) -> Any:
    """The model under DDP or FSDP2."""
    net = model(dtype)
    return nn.parallel.DistributedDataParallel(net) if kind == "ddp" else shard(net, apart)


def save(net: nn.Module, optimizer: Any, folder: str) -> None:
    """By torch.distributed.checkpoint."""
    model_state, optimizer_state = get_state_dict(net, optimizer)
    dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder)


def restore(net: nn.Module, optimizer: Any, folder: str) -> None:
    """What :func:`save` saved, into a model and an optimizer that are as new."""
    model_state, optimizer_state = get_state_dict(net, optimizer)
    state = {"model": model_state, "optimizer": optimizer_state}
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(net, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])


def whole(net: nn.Module, optimizer: Any) -> dict[str, Tensor]:
    """Copies of parameters and state, gathered, by name."""
    options = StateDictOptions(full_state_dict=True)
    parameters, state = get_state_dict(net, optimizer, options=options)
    flat = {f"parameter {name}": value for name, value in parameters.items()}
    for name, values in state["state"].items():
        flat |= {f"{key} of {name}": value for key, value in values.items()}
    return {key: value.clone() for key, value in flat.items()}


def differences(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    """What differs in a bit or in its dtype."""
    if one.keys() != other.keys():
        return sorted(one.keys() ^ other.keys())
    return [key for key in one if one[key].dtype != other[key].dtype or not torch.equal(one[key], other[key])]


def resumed(kind: str, rank: int, case: tuple[str, str, str], folder: str) -> list[str]:
    """Differences between 100 steps, with a checkpoint after 50, and 50 steps from that checkpoint."""
    dtype_name, name, variant = case
    dtype = DTYPES[dtype_name]
    straight, scaler = wrapped(kind, dtype, apart=False), scaler_for(dtype)
    optimizer = make(straight, name, variant)
    train(straight, optimizer, scaler, range(HALF), rank, 2)
    save(straight, optimizer, folder)
    second, other_scaler = wrapped(kind, dtype, apart=False), scaler_for(dtype)
    again = make(second, name, variant)
    restore(second, again, folder)
    other_scaler.load_state_dict(copy.deepcopy(scaler.state_dict()))
    found = [f"loaded: {text}" for text in differences(whole(second, again), whole(straight, optimizer))]
    train(second, again, other_scaler, range(HALF, 2 * HALF), rank, 2)
    train(straight, optimizer, scaler, range(HALF, 2 * HALF), rank, 2)
    return found + differences(whole(second, again), whole(straight, optimizer))


def distributed(rank: int, kind: str, cases: list[tuple[str, str, str]], folder: str) -> None:
    """One of two processes: resumes in each case; with FSDP2, also leaves and takes checkpoints of one process."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    found: dict[Any, Any] = {}
    for case in cases:
        found[case] = resumed(kind, rank, case, f"{folder}/{'-'.join(case)}")
    torch.save(found, f"{folder}/{rank}.pt")
    dist.barrier()  # nobody leaves while another still receives
    dist.destroy_process_group()


def push_half(net: nn.Module, name: str, variant: str, folder: str) -> None:
    """Half the steps, and a checkpoint of them; the scaler beside it."""
    optimizer, scaler = make(net, name, variant), steady_scaler(next(net.parameters()).dtype)
    push(net, optimizer, scaler, range(HALF))
    save(net, optimizer, folder)
    if not dist.is_initialized() or dist.get_rank() == 0:
        torch.save(scaler.state_dict(), f"{folder}.scaler")


def push_rest(net: nn.Module, name: str, variant: str, folder: str) -> tuple[nn.Module, Any]:
    """The other half, from such a checkpoint."""
    optimizer, scaler = make(net, name, variant), steady_scaler(next(net.parameters()).dtype)
    restore(net, optimizer, folder)
    scaler.load_state_dict(torch.load(f"{folder}.scaler"))
    push(net, optimizer, scaler, range(HALF, 2 * HALF))
    return net, optimizer


def resharded(rank: int, cases: list[tuple[str, str, str]], folder: str) -> None:
    """One of two processes: half the steps for a checkpoint, the other half from one of a single process."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    for dtype, name, variant in cases:
        case = f"{folder}/{dtype}-{name}-{variant}"
        push_half(shard(model(DTYPES[dtype])), name, variant, f"{case}-2")
        net, optimizer = push_rest(shard(model(DTYPES[dtype])), name, variant, f"{case}-1")
        state = whole(net, optimizer)
        if rank == 0:
            torch.save(state, f"{case}.pt")
    dist.barrier()
    dist.destroy_process_group()


def mask_and_average(net: nn.Module) -> tuple[dict[str, Tensor], list[bool]]:
    """What is gathered of a masked model while averages stand in it, and at which steps nothing changed."""
    masks = {}
    for number, (name, parameter) in enumerate(net.named_parameters()):
        draw = torch.Generator().manual_seed(number)
        masks[name] = torch.rand(parameter.shape, generator=draw) < 0.5
    optimizer = optim.AdamW(net.named_parameters(), masks=masks, ema_decay=0.5, lr=0.1)
    scaler, still = torch.amp.GradScaler("cpu", init_scale=1.0), []
    for step in range(3):
        scaler.scale(torch.ones(()))  # as a loss would be
        fill(net, step)
        if step == 1:  # in the last row, which one of two processes has
            grad: Any = next(iter(net.parameters())).grad
            held = getattr(grad, "_local_tensor", grad)
            if held is grad or dist.get_rank() == 1:
                held[-1, -1] = float("inf")
        before = whole(net, optimizer)
        scaler.step(optimizer)
        scaler.update(1.0)
        still.append(not differences(before, whole(net, optimizer)))
    with optimizer.swap_ema():
        return whole(net, optimizer), still


def whole_state_refused() -> str:
    """What a sharded optimizer says to the plain tensors of a whole one."""
    net = model()
    plain = make(net)
    push(net, plain, steady_scaler(torch.float32), range(1))
    try:
        make(shard(model())).load_state_dict(plain.state_dict())
    except ValueError as error:
        return str(error)
    return ""


def masked(rank: int, folder: str) -> None:
    """One of two processes: the same with FSDP2."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.save((*mask_and_average(shard(model())), whole_state_refused()), f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def parity(rank: int, kind: str, folder: str) -> None:
    """One of two processes: a short training with clipping, whose parameters rank 0 stores."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    net = wrapped(kind, torch.float32)
    optimizer = make(net, variant="clipped")
    train(net, optimizer, scaler_for(torch.float32), range(10), rank, 2)
    state = whole(net, optimizer)
    torch.save(state, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
