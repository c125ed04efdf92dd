"""torch.sparse's CSR weights in x's own dtype, for every sparse op."""

import warnings
from collections.abc import Callable

import torch
from burnish.bench import Peer
from burnish.bench.sparse_weights import SPARSE_OPS, dense_layer
from burnish.registry import Case


def supports(op: str, case: Case) -> str | None:
    if op not in SPARSE_OPS:
        return "only the forward of sparse layers"
    return "its CSR product on the CPU takes bf16 and fp32" if case.dtype == torch.float16 else None


def make(op: str, args: tuple) -> Callable[[], torch.Tensor]:
    x, weight, bias = dense_layer(op, args)
    with torch.inference_mode(False), warnings.catch_warnings():  # sparse tensors know no inference mode
        warnings.simplefilter("ignore")  # the layout is in beta
        sparse = weight.clone().to_sparse_csr()

    def run() -> torch.Tensor:
        with torch.inference_mode(False), torch.no_grad():
            y = (sparse @ x.T).T
            return y if bias is None else y + bias

    return run


PEER = Peer("torch-sparse-csr", torch.__version__, supports, make)
