"""torch's linear on the base alone, without the adapter: no way to run a LoRA layer, but what it is measured against.

Its result is not the layer's, so its tolerance is infinite.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from burnish.bases import format_of
from burnish.bench import Peer
from burnish.registry import Case


def supports(op: str, case: Case) -> str | None:
    return None if op in ("lora_linear", "lora_linear_backward") else "only a LoRA layer has a frozen base"


def make(op: str, args: tuple) -> Callable[[], Any]:
    if op == "lora_linear":
        x, weight, weight_scale, bias = args[:4]
        base = format_of(weight).dense(weight, weight_scale, x)
        return lambda: F.linear(x, base, bias)
    dy, x, weight, weight_scale = args[:4]
    base = format_of(weight).dense(weight, weight_scale, x)
    rest = tuple(torch.zeros(0) for _ in range(3))
    return lambda: (dy @ base, *rest)


PEER = Peer("torch-frozen", torch.__version__, supports, make, tolerance=math.inf)
