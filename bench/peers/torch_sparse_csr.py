"""torch.sparse's CSR weights, for every sparse op.

MKL multiplies them in fp32 alone: a bf16 user casts before and after; the casts are timed.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from burnish.bench import Peer
from burnish.bench.sparse_weights import SPARSE_OPS, dense_layer
from burnish.registry import Case


def supports(op: str, case: Case) -> str | None:
    return None if op in SPARSE_OPS else "only the forward of sparse layers"


def make(op: str, args: tuple) -> Callable[[], torch.Tensor]:
    x, weight, bias = dense_layer(op, args)
    offset = None if bias is None else bias.float()
    with torch.inference_mode(False):  # sparse tensors know none
        sparse = weight.float().clone().to_sparse_csr()

    def run() -> torch.Tensor:
        with torch.inference_mode(False), torch.no_grad():
            return F.linear(x.float(), sparse, offset).to(x.dtype)

    return run


PEER = Peer("torch-sparse-csr", torch.__version__, supports, make)
