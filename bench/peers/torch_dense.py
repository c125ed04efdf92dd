"""torch's dense linear with the factors multiplied out: what a low-rank layer replaces."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from burnish.bench import Peer
from burnish.registry import Case


def supports(op: str, case: Case) -> str | None:
    return None if op == "lowrank_linear" else "only lowrank_linear stands for one dense layer"


def make(op: str, args: tuple) -> Callable[[], torch.Tensor]:
    x, A, B, bias = args
    weight = (B.float() @ A.float()).to(x.dtype)
    return lambda: F.linear(x, weight, bias)


PEER = Peer("torch-dense", torch.__version__, supports, make)
