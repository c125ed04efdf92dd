"""The same composition of torch's own layers, compiled by torch.compile."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from burnish.bench import Peer
from burnish.registry import Case


def supports(op: str, case: Case) -> str | None:
    if op not in ("lowrank_linear", "lora_linear"):
        return "only the forward of low-rank layers is composed here"
    if case.options.get("base") == "int8":
        return "torch composes no int8 linear of this kind"
    return "another generator drops other elements: nothing to compare" if case.options.get("p") else None


def make(op: str, args: tuple) -> Callable[[], torch.Tensor]:
    if op == "lowrank_linear":
        x, A, B, bias = args

        def composed() -> torch.Tensor:
            return F.linear(F.linear(x, A), B, bias)

    else:
        x, weight, _, bias, A, B, _, scale, _, _ = args

        def composed() -> torch.Tensor:
            return F.linear(x, weight, bias) + F.linear(F.linear(x, A), B) * scale

    return torch.compile(composed, dynamic=False)


PEER = Peer("torch-compiled", torch.__version__, supports, make)
