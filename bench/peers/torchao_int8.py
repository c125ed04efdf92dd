"""torchao's Int8DynamicActivationInt8Weight, compiled as its manual advises: one scale a row, bf16 or fp32."""

import logging
import warnings
from collections.abc import Callable
from importlib.metadata import version

import torch
import torch.nn.functional as F

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it announces its CUDA libraries that a CPU does not need
    for _name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(_name).setLevel(logging.ERROR)
    from torchao.quantization import Int8Tensor, PerRow
    from torchao.quantization.quantize_.workflows.int8.int8_tensor import QuantizeTensorToInt8Kwargs

from burnish.bench import Peer
from burnish.ops import int8_linear_unpack
from burnish.registry import Case

_linear = torch.compile(F.linear, dynamic=False)


def supports(op: str, case: Case) -> str | None:
    if op != "int8_linear":
        return "torchao has no int8 op of this kind"
    if case.options.get("activation", "none") != "none":
        return "not written: the activation would be compiled into it"
    return None


def make(op: str, args: tuple) -> Callable[[], torch.Tensor]:
    x, weight, scale, bias, _, out_dtype = args
    width = x.shape[-1]
    quantized = Int8Tensor(
        int8_linear_unpack(weight, scale.shape[0], width),
        scale.to(x.dtype).unsqueeze(1),
        [1, width],
        x.dtype,
        act_quant_kwargs=QuantizeTensorToInt8Kwargs(granularity=PerRow()),
    )
    offset, out = None if bias is None else bias.to(x.dtype), out_dtype or x.dtype
    return lambda: _linear(x, quantized, offset).to(out)


PEER = Peer("torchao-int8", version("torchao"), supports, make)
