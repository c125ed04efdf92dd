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
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the layout is in beta
        csr = weight.to_sparse_csr()
    return lambda: (csr @ x.T).T if bias is None else (csr @ x.T).T + bias


PEER = Peer("torch-sparse-csr", torch.__version__, supports, make)
