"""One of two processes under torchrun that is killed twice, with the other restarted, and trains to the end.

    python -m torch.distributed.run --standalone --nproc-per-node 2 --max-restarts 2 tests/optim_killed.py FOLDER

FSDP2, int8 state, a checkpoint after every tenth of 100 steps. In its first life rank 1 kills itself as it has the
gradients of step 57, in its second as it has written its part of the checkpoint after step 80. The third life goes on
to the end, trains as much without a break, and leaves what differs in ``FOLDER/RANK.pt``; each life leaves the step it
began with in ``FOLDER/life-N``, and by name what was there of a checkpoint.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import optim_workers as workers
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict

STEPS, EVERY = 100, 10
KILLED_STEP, KILLED_SAVE = 57, 80


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Mortal(dcp.FileSystemWriter):
    """A writer whose process dies when its own files are there and the checkpoint is not complete."""

    def write_data(self, *args: Any) -> Any:
        super().write_data(*args).wait()
        die()


def complete(folder: Path) -> list[int]:
    """The checkpoints in a folder that torch.distributed.checkpoint has finished, by step."""
    return sorted(int(path.parent.name) for path in folder.glob("*/.metadata"))


def trained(kind: torch.dtype) -> tuple[Any, Any]:
    net = workers.shard(workers.model(kind))
    return net, workers.make(net, "AdamW", "int8")


def live(folder: Path, life: int, rank: int) -> tuple[Any, Any]:
    """Train from the last checkpoint to the end, or to this life's."""
    net, optimizer = trained(torch.bfloat16)
    begin = max(complete(folder), default=0)
    if begin:
        workers.restore(net, optimizer, str(folder / str(begin)))
    if rank == 0:
        parts = sorted(path.name for path in folder.glob("*") if path.name.isdigit() and any(path.iterdir()))
        (folder / f"life-{life}").write_text(" ".join([str(begin), *parts]))
    scaler, victim = workers.scaler_for(torch.bfloat16), rank == 1
    for step in range(begin, STEPS):
        hook = None
        if victim and (life, step) == (0, KILLED_STEP):
            hook = optimizer.register_step_pre_hook(lambda *_: die())
        workers.train(net, optimizer, scaler, [step], rank, 2)
        assert hook is None
        if (step + 1) % EVERY == 0:
            where = folder / str(step + 1)
            writer = Mortal if victim and (life, step + 1) == (1, KILLED_SAVE) else dcp.FileSystemWriter
            model_state, optimizer_state = get_state_dict(net, optimizer)
            dcp.save({"model": model_state, "optimizer": optimizer_state}, storage_writer=writer(where))
    return net, optimizer


def main() -> None:
    folder, life = Path(sys.argv[1]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    torch.set_num_threads(1)
    # not by torchrun's store, where a new life may find the address of a dead process
    rank, store = int(os.environ["RANK"]), f"file://{folder}/store-{life}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    resumed = live(folder, life, rank)
    net, optimizer = trained(torch.bfloat16)
    workers.train(net, optimizer, workers.scaler_for(torch.bfloat16), range(STEPS), rank, 2)
    torch.save(workers.differences(workers.whole(*resumed), workers.whole(net, optimizer)), folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
