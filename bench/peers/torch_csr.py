"""torch's own sparse matrices: the weight as CSR, times x transposed.

Its CPU product takes fp32 alone, so 16-bit weights are kept in fp32 and x and y are cast; the casts are timed.
"""

import warnings
from collections.abc import Callable

import torch
from burnish.bench import Peer
from burnish.ops.sparse24_linear import expand as expand24
from burnish.ops.sparse_linear import expand
from burnish.registry import Case


def supports(op: str, case: Case) -> str | None:
    if op not in ("sparse24_linear", "sparse_linear"):
        return "only the forward of sparse layers is timed here"
    return "torch multiplies no int8 CSR" if case.options.get("weight") == "int8" else None


def make(op: str, args: tuple) -> Callable[[], torch.Tensor]:
    x, *weight, bias = args
    N, K = weight[1].shape[0], x.shape[-1]
    dense = expand24(*weight[:2], N, K) if op == "sparse24_linear" else expand(*weight, N, K)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the layout is in beta
        csr = dense.float().to_sparse_csr()
    offset = 0 if bias is None else bias
    return lambda: ((csr @ x.float().T).T + offset).to(x.dtype)


PEER = Peer("torch-csr", torch.__version__, supports, make)
