"""torch's own dynamic int8 linear (FBGEMM): one scale for the whole activation, fp32 in and out.

What ``torch.ao.quantization.quantize_dynamic`` swaps in. A bf16 user casts before and after; the casts are timed.
"""

from collections.abc import Callable

import torch
import torch.ao.nn.quantized.dynamic  # registers the packed weight's type
from burnish.bench import Peer
from burnish.errors import BackendError
from burnish.ops import int8_linear_unpack
from burnish.registry import Case
from torch.nn.functional import gelu, silu

#: by the op's activation code
_CURVES = (lambda z: z, torch.relu, gelu, lambda z: gelu(z, approximate="tanh"), silu)


def supports(op: str, case: Case) -> str | None:
    return None if op == "int8_linear" else "torch has no int8 op of this kind"


def make(op: str, args: tuple) -> Callable[[], torch.Tensor]:
    x, weight, scale, bias, activation, out_dtype = args
    if x.is_cuda:
        raise BackendError("FBGEMM is for CPUs")
    channels = scale.shape[0]
    canonical = int8_linear_unpack(weight, channels, x.shape[-1])
    quantized = torch._make_per_channel_quantized_tensor(
        canonical, scale.double(), torch.zeros(channels, dtype=torch.long), 0
    )
    packed = torch.ops.quantized.linear_prepack(quantized, None if bias is None else bias.float())
    linear, curve, out = torch.ops.quantized.linear_dynamic, _CURVES[activation], out_dtype or x.dtype

    return lambda: curve(linear(x.float(), packed, True)).to(out)  # True: 7-bit activations, which cannot saturate


PEER = Peer("torch-int8", torch.__version__, supports, make)
