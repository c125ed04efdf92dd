"""zentorch's dynamic int8 linear: symmetric, one scale a row, bf16 or fp32 in and out; a sparse weight made dense.

Weights go in unpacked: the op packs them at the first call and keeps that in a cache whose key is the weight's address,
so a weight here is never freed; a later one at the same address would silently get the old one's result. The weight
prepacked by ``zentorch_weight_prepack_for_dynamic_qlinear`` gives wrong results at 4096 x 4096 (2.13.0.2, Zen 4).
"""

from collections.abc import Callable
from importlib.metadata import version

import torch
import zentorch  # noqa: F401  registers the ops
from burnish.bench import Peer
from burnish.ops import ACTIVATIONS, int8_linear_unpack
from burnish.ops.sparse24_linear import expand
from burnish.registry import Case

_kept: list[torch.Tensor] = []


def supports(op: str, case: Case) -> str | None:
    if op != "int8_linear" and case.options.get("weight") != "int8":
        return "zentorch has no int8 op of this kind"
    if op not in ("int8_linear", "sparse24_linear"):
        return "only the forward of int8 layers is timed here"
    if case.dtype == torch.float16:
        return "zentorch takes bf16 and fp32"
    if case.options.get("activation", "none") != "none":
        return "zentorch fuses no activation into its dynamic int8 linear"
    return None


def make(op: str, args: tuple) -> Callable[[], torch.Tensor]:
    if op == "sparse24_linear":
        x, values, metadata, scale, bias = args
        canonical, out_dtype = expand(values, metadata, scale.shape[0], x.shape[-1]), None
    else:
        x, weight, scale, bias, activation, out_dtype = args
        assert activation == ACTIVATIONS["none"]
        canonical = int8_linear_unpack(weight, scale.shape[0], x.shape[-1])
    _kept.append(canonical)
    linear, out = torch.ops.zentorch.zentorch_dynamic_qlinear, out_dtype or x.dtype
    if out == x.dtype:
        return lambda: linear(x, canonical, scale, bias)
    return lambda: linear(x, canonical, scale, bias).to(out)


PEER = Peer("zentorch-int8", version("zentorch"), supports, make)
