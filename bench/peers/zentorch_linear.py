"""zentorch's linear layers, composed: two for a low-rank layer, three and a sum for a LoRA layer, the dense one for a
sparse layer.

Weights are kept for ever: the op caches by address what it makes of them.
"""

from collections.abc import Callable
from importlib.metadata import version

import torch
import zentorch  # noqa: F401  registers the ops
from burnish.bench import Peer
from burnish.bench.sparse_weights import SPARSE_OPS, dense_bytes, dense_layer
from burnish.registry import Case

_kept: list[torch.Tensor] = []


def supports(op: str, case: Case) -> str | None:
    if op not in ("lowrank_linear", "lora_linear", *SPARSE_OPS):
        return "only the forward of low-rank and sparse layers is composed here"
    if case.dtype == torch.float16:
        return "zentorch takes bf16 and fp32"
    if case.options.get("base") == "int8":
        return "its int8 linear is timed by zentorch-int8, for int8_linear"
    return (
        "another generator drops other elements, so the results cannot be compared" if case.options.get("p") else None
    )


def make(op: str, args: tuple) -> Callable[[], torch.Tensor]:
    linear = torch.ops.zentorch.zentorch_linear_unary
    if op in SPARSE_OPS:
        x, weight, bias = dense_layer(op, args)
        _kept.append(weight)
        return lambda: linear(x, weight, bias)
    if op == "lowrank_linear":
        x, A, B, bias = args
        _kept.extend((A, B))
        return lambda: linear(linear(x, A), B, bias)
    x, weight, _, bias, A, B, _, scale, _, _ = args
    _kept.extend((weight, A, B))
    return lambda: linear(x, weight, bias).add_(linear(linear(x, A), B), alpha=scale)


def reads(op: str, case: Case) -> int:
    if op in SPARSE_OPS:
        return dense_bytes(case)
    sizes = case.dims
    factors = sizes["R"] * (sizes["N"] + sizes["K"])
    return (factors if op == "lowrank_linear" else factors + sizes["N"] * sizes["K"]) * case.dtype.itemsize


PEER = Peer("zentorch-linear", version("zentorch"), supports, make, reads=reads)
