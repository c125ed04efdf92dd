"""Two processes for a test: forked from a server that has imported torch and its distributed parts, once a test run."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from typing import Any

import torch.multiprocessing as mp

multiprocessing.set_forkserver_preload(
    ["burnish.nn", "burnish.optim", "burnish.prune"]
    + [f"torch.distributed.{part}" for part in ("checkpoint.state_dict", "fsdp", "tensor")]
)


def run(function: Callable[..., None], *args: Any) -> None:
    """``function(rank, *args)`` in each; a failure of either is raised."""
    mp.start_processes(function, args=args, nprocs=2, start_method="forkserver")
