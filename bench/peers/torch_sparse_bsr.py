"""torch.sparse's BSR weights, whose form bsr_linear's values and indices have.

MKL multiplies them in fp32 alone: a bf16 user casts before and after; the casts are timed.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from burnish.bench import Peer
from burnish.bench.sparse_weights import dense_layer
from burnish.registry import Case


def supports(op: str, case: Case) -> str | None:
    if op != "bsr_linear":
        return "only bsr_linear keeps whole blocks"
    rows, columns = case.options["block"].split("x")
    return None if rows == columns else "MKL takes square blocks"


def make(op: str, args: tuple) -> Callable[[], torch.Tensor]:
    x, weight, bias = dense_layer(op, args)
    block = tuple(args[1].shape[1:])
    offset = None if bias is None else bias.float()
    with torch.inference_mode(False):  # sparse tensors know none
        sparse = weight.float().clone().to_sparse_bsr(block)

    def run() -> torch.Tensor:
        with torch.inference_mode(False), torch.no_grad():
            return F.linear(x.float(), sparse, offset).to(x.dtype)

    return run


PEER = Peer("torch-sparse-bsr", torch.__version__, supports, make)
