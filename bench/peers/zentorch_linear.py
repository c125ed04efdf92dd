"""zentorch's linear layers: two for a low-rank layer, three and a sum for a LoRA layer, a dense one for a sparse one.

Weights are kept for ever: the op caches by address what it makes of them.
"""

from collections.abc import Callable
from importlib.metadata import version

import torch
import zentorch  # noqa: F401  registers the ops
from burnish.bench import Peer
from burnish.ops.sparse24_linear import expand as expand24
from burnish.ops.sparse_linear import expand
from burnish.registry import Case

_kept: list[torch.Tensor] = []


def supports(op: str, case: Case) -> str | None:
    if op not in ("lowrank_linear", "lora_linear", "sparse24_linear", "sparse_linear"):
        return "only the forward of low-rank and sparse layers is composed here"
    if case.dtype == torch.float16:
        return "zentorch takes bf16 and fp32"
    if "int8" in (case.options.get("base"), case.options.get("weight")):
        return "its int8 linear is timed by zentorch-int8"
    return (
        "another generator drops other elements, so the results cannot be compared" if case.options.get("p") else None
    )


def make(op: str, args: tuple) -> Callable[[], torch.Tensor]:
    linear = torch.ops.zentorch.zentorch_linear_unary
    if op == "lowrank_linear":
        x, A, B, bias = args
        _kept.extend((A, B))
        return lambda: linear(linear(x, A), B, bias)
    if op in ("sparse24_linear", "sparse_linear"):
        x, *weight, bias = args
        N, K = weight[1].shape[0], x.shape[-1]
        dense = expand24(*weight[:2], N, K) if op == "sparse24_linear" else expand(*weight, N, K)
        _kept.append(dense)
        return lambda: linear(x, dense, bias)
    x, weight, _, bias, A, B, _, scale, _, _ = args
    _kept.extend((weight, A, B))
    return lambda: linear(x, weight, bias).add_(linear(linear(x, A), B), alpha=scale)


PEER = Peer("zentorch-linear", version("zentorch"), supports, make)
