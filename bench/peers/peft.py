"""peft's LoRA layer around nn.Linear, as get_peft_model makes it: forward in inference, or in training where a case
drops."""

from collections.abc import Callable

import peft
import torch
from burnish.bench import Peer
from burnish.registry import Case
from peft.tuners.lora import Linear, LoraConfig


def supports(op: str, case: Case) -> str | None:
    if op != "lora_linear":
        return "only lora_linear is a layer of peft's"
    if case.options.get("base") == "int8":
        return "peft's int8 base is bitsandbytes', for GPUs"
    return (
        "another generator drops other elements, so the results cannot be compared" if case.options.get("p") else None
    )


def make(op: str, args: tuple) -> Callable[[], torch.Tensor]:
    x, weight, _, bias, A, B, _, scale, _, _ = args
    base = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, dtype=x.dtype, device="meta")
    base.weight = torch.nn.Parameter(weight, requires_grad=False)
    base.bias = None if bias is None else torch.nn.Parameter(bias.to(x.dtype), requires_grad=False)
    rank = A.shape[0]
    config = LoraConfig(r=rank, lora_alpha=scale * rank, lora_dropout=0.0)
    layer = Linear(base, "default", config, r=rank, lora_alpha=scale * rank)
    layer.lora_A["default"].weight = torch.nn.Parameter(A)
    layer.lora_B["default"].weight = torch.nn.Parameter(B)
    layer.eval()
    return lambda: layer(x)


PEER = Peer("peft", peft.__version__, supports, make)
